"""The worked examples train, and all four train the same: losses and weights of one loop are those of the others."""

import ast
import importlib.util
import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from anchor_attn import wrap
from anchor_attn.hf import is_wrapped
from anchor_attn.train import PackedCollator, pack_documents
from anchor_attn.train.presets import create_model

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))
STEPS, LEARNING_RATE = 4, 1e-2

# What the frameworks say of their own futures, of this machine, and of too few workers.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def packed():
    """Rows of several documents each, whose tokens repeat: what a few steps can learn."""
    documents = [[3 + (start + step) % 7 for step in range(length)] for start, length in enumerate((9, 4, 13, 6) * 9)]
    return pack_documents(documents, seq_len=33)


@pytest.fixture(scope="module")
def rows():
    return packed()


def tiny():
    torch.manual_seed(0)
    return create_model("tiny", 257, 64, 256)


def tokenizer():
    words = Tokenizer(models.WordLevel({str(number): number for number in range(256)} | {"<s>": 256}))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<s>", eos_token="<s>")


def run(name, model, rows, folder):
    """The losses of an example on a model."""
    if name == "trl_sft":
        pytest.importorskip("trl", reason="trl is not installed")
        here = {"output_dir": str(folder), "use_cpu": True, "bf16": False, "save_strategy": "no", "report_to": "none"}
        return load(name).train(model, tokenizer(), rows, STEPS, LEARNING_RATE, **here)
    if name == "lightning_module":
        pytest.importorskip("lightning", reason="lightning is not installed")
        parts = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        return load(name).train(model, rows, STEPS, LEARNING_RATE, accelerator="cpu", **dict.fromkeys(parts, False))
    return load(name).train(model, rows, STEPS, LEARNING_RATE)


def own_loop(rows, pattern="anchor", decays_norms=True, rows_a_step=1):
    """The loop that all of them should be, written out, and its trained model."""
    model = wrap(tiny(), pattern=pattern).train()
    norms = [weight for weight in model.parameters() if weight.ndim == 1]
    others = [weight for weight in model.parameters() if weight.ndim > 1]
    groups = [{"params": others}, {"params": norms, "weight_decay": 0.1 if decays_norms else 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    losses = []
    for index in range(STEPS):
        optimizer.zero_grad()
        loss = model(**PackedCollator()([rows[rows_a_step * index + row] for row in range(rows_a_step)])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses, model


def test_there_is_an_example_for_each_framework():
    assert NAMES == ["accelerate_loop", "lightning_module", "plain_torch", "trl_sft"]


@pytest.mark.parametrize("name", NAMES)
def test_an_example_trains_as_the_loop_that_is_written_out(name, rows, tmp_path):
    # transformers' Trainer, on which TRL stands, leaves norms out of the weight decay.
    expected, reference = own_loop(rows, decays_norms=name != "trl_sft")
    model = tiny()
    losses = run(name, model, rows, tmp_path)

    assert is_wrapped(model)
    assert losses == pytest.approx(expected, rel=2e-5)
    assert losses[-1] < losses[0]
    for (key, weight), (own, other) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        assert key.removeprefix("module.") == own
        torch.testing.assert_close(weight, other, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("pattern", ["full", "intra_doc"])
def test_another_mask_would_give_other_losses(pattern, rows):
    """Otherwise the test above could not tell whether an example lost the document ids."""
    expected, _ = own_loop(rows)
    others, _ = own_loop(rows, pattern=pattern)

    assert max(abs(math.log(a / b)) for a, b in zip(expected, others, strict=True)) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_short_and_says_how_it_is_started(name):
    text = (EXAMPLES / f"{name}.py").read_text()

    assert len(text.splitlines()) < 60
    assert f"examples/{name}.py path/to/model corpus.jsonl" in ast.get_docstring(ast.parse(text))


@pytest.mark.parametrize("arguments", [[], ["one"], ["one", "two", "three"]], ids=len)
@pytest.mark.parametrize("name", NAMES)
def test_an_example_without_its_two_arguments_says_which_and_ends_with_2(name, arguments, monkeypatch, capsys):
    for package in {"trl_sft": ["trl"], "lightning_module": ["lightning"]}.get(name, []):
        pytest.importorskip(package, reason=f"{package} is not installed")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    out, err = capsys.readouterr()

    assert (stop.value.code, out) == (2, "")
    assert err.startswith(f"usage: {name}.py [-h] model corpus\n")
    assert err.count("\n") == 2


@pytest.mark.slow
def test_two_processes_of_accelerate_train_as_one_that_sees_both_rows(rows, tmp_path):
    expected, _ = own_loop(rows, rows_a_step=2)
    script = tmp_path / "two.py"
    script.write_text(
        f"import sys; sys.path[:0] = [{str(EXAMPLES.parent / 'tests')!r}]\n"
        "import json, os, test_examples as here\n"
        f"losses = here.load('accelerate_loop').train(here.tiny(), here.packed(), {STEPS}, {LEARNING_RATE})\n"
        f"open({str(tmp_path)!r} + '/' + os.environ['RANK'], 'w').write(json.dumps(losses))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "ACCELERATE_USE_CPU": "true"})

    assert ended.returncode == 0, ended.stderr[-2000:]
    for rank in ("0", "1"):
        assert json.loads((tmp_path / rank).read_text()) == pytest.approx(expected, rel=2e-5)
