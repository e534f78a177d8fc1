"""The command line: useful with no argument, one line and exit code 2 for bad input, no traceback."""

import json
import subprocess
import sys
from importlib.metadata import version

import pytest

from anchor_attn.cli import main
from anchor_attn.train import compare as compare_room
from anchor_attn.train.run import run_arm

SMALL = ["--model", "tiny", "--seq-len", "128", "--steps", "2"]


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {i} " * 9, "body": "x" * 50}) + "\n" for i in range(60)))
    return str(path)


@pytest.fixture
def run(monkeypatch, capsys):
    monkeypatch.setattr(compare_room, "_run_in_own_process", run_arm)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["anchor-attn", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    return call


def test_with_no_argument_it_shows_its_commands(run):
    code, out, err = run()
    assert code == 0
    assert "compare" in out
    assert "bench" in out
    assert not err


def test_it_says_its_version(run):
    assert run("--version") == (0, f"anchor-attn {version('anchor-attn')}\n", "")


@pytest.mark.parametrize("command", ["compare", "mask", "probe", "bench"])
def test_every_command_explains_its_options(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    for option in ("--out", "--json", "--seed", "--device"):
        assert option in out


def test_compare_prints_a_table_and_writes_its_files(run, corpus, tmp_path):
    out_dir = tmp_path / "out"
    code, out, err = run("compare", "--data", corpus, *SMALL, "--arms", "full,anchor", "--out", str(out_dir))
    assert code == 0
    assert "held-out" in out
    assert "full − anchor" in out
    assert "anchor, seed 0: 2 steps" in err
    assert {"results.json", "report.html", "masks.png", "loss.png"} <= {path.name for path in out_dir.iterdir()}


def test_compare_as_json_prints_the_result_file_and_nothing_else(run, corpus, tmp_path):
    arguments = ["compare", "--data", corpus, *SMALL, "--arms", "anchor", "--out", str(tmp_path), "--json"]
    code, out, _ = run(*arguments)
    assert code == 0
    assert json.loads(out) == json.loads((tmp_path / "results.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope"], "No such command 'nope'"),
        (["compare", "--steps", "many"], "Invalid value for '--steps'"),
        (["compare", "--nope"], "No such option"),
        (["compare", "--steps", "0"], "steps must be at least 1, got 0; pass more."),
        (["compare", "--seeds", "0"], "seeds must be at least 1, got 0; pass 3 for an interval."),
        (["compare", "--arms", "anchored"], "arm must be one of full, intra_doc, anchor"),
        (["compare", "--arms", ","], "arms must name at least one"),
        (["compare", "--data", "absent.jsonl"], "source must be 'stdlib'"),
        (["compare", "--data", "CORPUS", "--text-column", "words"], "words"),
        (["compare", "--data", "CORPUS", "--cut", "maybe"], "cut must be one of"),
        (["compare", "--data", "CORPUS", "--seq-len", "1"], "seq_len must be at least 3, got 1"),
        (["compare", "--data", "CORPUS", "--tokenizer", "./absent"], "tokenizer must be 'bytes'"),
        (["compare", "--data", "CORPUS", "--model", "absent.json"], "model must be a config file that exists"),
        (["compare", "--device", "warp"], "device must be cpu or cuda"),
        (["compare", "--seed", "-1"], "seed must lie between 0 and 2**32 - 1, got -1"),
        (["compare", "--arms", "full+bos+reset,full+reset+bos"], "arms must differ, got full+reset+bos, full+reset"),
        (["compare", "--arms", "full+bos+bos"], "arm must be one of"),
        (["compare", "--out", "CORPUS"], "out must be a folder that can be written"),
        (["bench", "--out", "CORPUS"], "out must be a folder that can be written"),
        (["bench", "--seq-len", "0"], "seq_len must hold documents"),
        (["bench", "--shortest", "0"], "shortest and longest must be lengths in this order"),
        (["bench", "nothing"], "Invalid value for"),
        (["bench", "--rounds", "0"], "rounds must be at least 1, got 0"),
        (["bench", "--seq-len", "9"], "seq_len must hold documents of 300 to 1400 tokens, got room for 8"),
        (["bench", "--device", "warp"], "device must be cpu or cuda"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, corpus, tmp_path, arguments, message):
    arguments = [corpus if argument == "CORPUS" else argument for argument in arguments]
    known = arguments[0] != "nope" and "--out" not in arguments
    code, out, err = run(*arguments, *(["--out", str(tmp_path / "out")] if known else []))
    last = err.strip().splitlines()[-1]
    assert code == 2
    assert last.startswith("anchor-attn: ")
    assert message in last
    assert "Traceback" not in err
    assert not out


def test_an_interrupt_is_one_line_and_exit_code_130(run, corpus, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare_room, "_run_in_own_process", interrupt)
    code, _, err = run("compare", "--data", corpus, *SMALL)
    assert code == 130
    assert err.strip().splitlines()[-1] == "anchor-attn: interrupted"


def test_a_failed_check_is_exit_code_1(run, monkeypatch, tmp_path):
    from anchor_attn.bench import parity

    monkeypatch.setattr(parity, "FACTORS", {"out": -1e9, "gradients": -1e9})
    code, _, err = run("bench", "--seq-len", "1024", "--rounds", "1", "--out", str(tmp_path))
    assert code == 1
    assert "must agree with the reference before it is timed" in err


@pytest.mark.slow
def test_the_installed_command_compares_in_processes_of_their_own(corpus, tmp_path):
    command = [sys.executable, "-c", "from anchor_attn.cli import main; main()", "compare", "--data", corpus, *SMALL]
    ended = subprocess.run(
        [*command, "--arms", "full,anchor", "--out", "out"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    records = json.loads((tmp_path / "out" / "results.json").read_text())["records"]
    assert [record["arm"] for record in records] == ["full", "anchor"]
    assert "Written" in ended.stdout
