"""Tiny runs for the tests of training: in this process, or in one of their own that may be killed."""

import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from anchor_attn.train.loop.checkpoints import Checkpoints, check_checkpoint
from anchor_attn.train.loop.losses import LOSSES, read_losses
from anchor_attn.train.loop.run import train
from anchor_attn.train.loop.settings import settings_from
from anchor_attn.train.loop.settings_file import merged

TEXTS = [f"def f{i}(x):\n    return x * {i} + {i * i}\n" * (1 + i % 5) for i in range(200)]
STEPS = 12
PRELOADED = [
    "accelerate", "datasets", "torchdata.stateful_dataloader", "transformers.models.llama.modeling_llama",
    "anchor_attn.hf", "anchor_attn.rope", "anchor_attn.train.loop.run", "anchor_attn.train.plan.models",
    "anchor_attn.train.loop.trainer",
]  # fmt: skip
SAME = (
    "step",
    "loss",
    "tokens",
    "lr",
    "grad_norm",
    "pairs_of_full",
)  # in two equal runs, to the last bit


def write_corpus(folder: Path) -> Path:
    """A file of short documents."""
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def write_model_config(folder: Path, **changes) -> Path:
    """A llama that draws numbers while it trains, so that a lost state of the generator shows."""
    from transformers import LlamaConfig

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaConfig(**{**sizes, "attention_dropout": 0.1, "vocab_size": 257, **changes}).save_pretrained(folder)
    return folder / "config.json"


def tiny_settings(folder: Path, **changes):
    """Settings of a run of a second, on the corpus and the model in `folder`."""
    plain = {
        "model": str(folder / "config.json"),
        "data": {"sources": [{"path": str(folder / "corpus.jsonl")}]},
        "packing": {"seq_len": 64},
        "training": {
            "max_steps": STEPS,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "save_steps": 3,
            "save_total_limit": 2,
        },
    }
    return settings_from(merged(plain, changes))


def steps_of(out: Path):
    """What two equal runs have in common, line by line."""
    return [tuple(line[name] for name in SAME) for line in read_losses(out / LOSSES)]


def assert_nothing_is_lost(out: Path, reference) -> None:
    """Lines are those of an undisturbed run, every visible checkpoint is whole, and `latest` is one of them."""
    lines = steps_of(out)
    assert lines == reference[: len(lines)]
    for step in Checkpoints(out).steps():
        assert check_checkpoint(out / f"checkpoint-{step}")[1] is None
        assert step <= len(lines)
    if (out / "latest").is_symlink():
        assert check_checkpoint(out / "latest")[1] is None


# --- processes of their own ------------------------------------------------------------------------------------------


def child_context():
    """A server with everything imported, whose children are born in milliseconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)  # all that a run imports, or every child would take its seconds for it
    return context


def run_in_child(folder: Path, out: Path, seconds: float | None, number=signal.SIGKILL) -> int:
    """Train with --resume in a process of its own, and send it a signal after some seconds; its exit code."""
    process = child_context().Process(target=_child, args=(folder, out))
    process.start()
    process.join(seconds)
    if process.is_alive() and seconds is not None:
        os.kill(process.pid, number)
    process.join()
    return process.exitcode


def _child(folder: Path, out: Path) -> None:
    with (folder / "said.txt").open("a") as said:
        outcome = train(tiny_settings(folder), out, resume=True, say=lambda line: print(line, file=said, flush=True))
    sys.exit(0 if outcome.step == STEPS or outcome.stopped else 3)


def seconds_of(folder: Path, out: Path) -> float:
    """What an undisturbed run takes."""
    start = time.perf_counter()
    assert run_in_child(folder, out, None) == 0
    return time.perf_counter() - start


def run_on_processes(processes: int, folder: Path, out: Path, **changes) -> list[dict]:
    """The lines of a run of several processes, as torchrun starts them."""
    children = [
        child_context().Process(target=_rank, args=(rank, processes, folder, out, changes)) for rank in range(processes)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    assert [child.exitcode for child in children] == [0] * processes
    return read_losses(out / LOSSES)


def _rank(rank: int, processes: int, folder: Path, out: Path, changes: dict) -> None:
    store = f"file://{folder / f'store-{out.name}'}"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=processes)
    os.environ |= {name: str(rank) for name in ("RANK", "LOCAL_RANK")}
    os.environ |= {name: str(processes) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    train(tiny_settings(folder, **changes), out, say=lambda _: None)
    dist.destroy_process_group()
