#!/usr/bin/env bash
# What has to be measured on a GPU, in under nine minutes: benchmarks/gpu.sh [FOLDER]
#
#   tests         parity, gradients, no sync, no recompilation: pytest -m gpu
#   determinism   two calls, equal bits
#   routes        every route by seconds: the table that engine='auto' chooses by
#   attention     16K, 64K in documents of 8K (the rate against dense causal), 64K and 128K of web text
#   step          a model of 1.1B at 64K, full against anchor
#
# It needs torch, transformers, typer, rich and pytest, and no install: the package is laid out by links. A part that
# fails stops none of the others; the script then ends with 1. Each part has a limit of seconds.
set -uo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}

if ! device=$("$python" -c 'import torch; assert torch.cuda.is_available(); print(torch.cuda.get_device_name())' 2>/dev/null); then
  echo "gpu.sh: no CUDA device that $python's torch can see; run it on a machine that has one." >&2
  exit 2
fi

results=${1:-$root/benchmarks/results/${device//[^A-Za-z0-9.-]/-}}
mkdir -p "$results" || exit 2
results=$(cd "$results" && pwd)
links=$(mktemp -d)
trap 'rm -rf "$links"' EXIT

# anchor_attn, with masks/ and train/ inside it, as an install has them.
mkdir "$links/anchor_attn"
ln -s "$root"/anchor_attn/* "$links/anchor_attn/"
ln -s "$root/masks" "$links/anchor_attn/masks"
ln -s "$root/train" "$links/anchor_attn/train"
export PYTHONPATH="$links:$root/tests${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 CUBLAS_WORKSPACE_CONFIG=:4096:8
cd "$links" || exit 2 # from the checkout, ./anchor_attn would shadow the whole package

summary=$results/summary.txt
failed=0
: >"$summary"

# part NAME SECONDS COMMAND...: run it, keep its output, note how it ended
part() {
  local name=$1 limit=$2 began=$SECONDS code
  shift 2
  echo "== $name"
  timeout --kill-after=10 "$limit" "$@" >"$results/$name.log" 2>&1
  code=$?
  tail -n 25 "$results/$name.log"
  case $code in
    0) ended=passed ;;
    124 | 137) ended="stopped after $limit s" failed=1 ;;
    *) ended="failed ($code)" failed=1 ;;
  esac
  printf '%-24s %-22s %4d s\n' "$name" "$ended" $((SECONDS - began)) >>"$summary"
}

# shellcheck disable=SC2329 # called by run
tests() {
  "$python" -m pytest -q --rootdir "$root" -c "$root/pyproject.toml" -m gpu -rs "$@"
}

# shellcheck disable=SC2329 # called by run
bench() {
  "$python" -c 'from anchor_attn.cli import main; main()' bench "$@" --device cuda
}

# timeout runs commands, not functions: each part is a shell of its own that knows them.
export root python
export -f tests bench
run() { part "$1" "$2" bash -c '"$@"' bash "${@:3}"; }

same_bits='bit_for_bit or same_bits'
run tests 130 tests "$root"/tests/test_{gpu,kernels,merge,flex}.py -k "not ($same_bits)"
run determinism 45 tests "$root/tests/test_gpu.py" -k "$same_bits"
run routes 110 bench routes --budget-s 75 --rounds 5 --out "$results/routes"
for row in "16K-web-text 16384 --distribution web-text" "64K-documents-of-8K 65536 --shortest 8000 --longest 8192" \
  "64K-web-text 65536 --distribution web-text" "128K-web-text 131072 --distribution web-text"; do
  read -r -a words <<<"$row"
  run "attention-${words[0]}" 45 bench attention --seq-len "${words[@]:1}" --budget-s 15 \
    --out "$results/attention-${words[0]}"
done
run step-1b-64K 75 bench step --size 1b --seq-len 65536 --distribution web-text --rivals full,anchor --checkpointing \
  --rounds 2 --budget-s 40 --out "$results/step-1b-64K"

"$python" -c 'import matplotlib' 2>/dev/null || echo "no pictures: matplotlib is not installed" >>"$summary"
echo "== summary: $device, $SECONDS s, $results"
cat "$summary"
exit "$failed"
