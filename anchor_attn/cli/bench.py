"""`anchor-attn bench`."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

TIMED = "attention, routes, step"


class Subject(StrEnum):
    """What to time."""

    attention = "attention"
    routes = "routes"
    step = "step"
    mask = "mask"
    packing = "packing"
    rope = "rope"


# What each subject can be told besides rounds, seed, device and out, which all know.
KNOWN = {
    Subject.attention: {
        "seq_len", "sweep", "distribution", "shortest", "longest", "heads", "head_dim", "dtype", "flex", "budget_s",
    },
    Subject.routes: {"seq_len", "heads", "head_dim", "dtype", "budget_s"},
    Subject.step: {
        "seq_len", "distribution", "shortest", "longest", "dtype", "size", "engine", "rivals", "checkpointing",
        "budget_s",
    },
    Subject.mask: {"seq_len"},
    Subject.packing: {"seq_len"},
    Subject.rope: {"seq_len", "quick"},
}  # fmt: skip


def bench_command(
    subject: Annotated[
        Subject,
        typer.Argument(
            help="attention: forward, backward and both; routes: the table that engine='auto' chooses by; step: a "
            "training step; mask: block masks against torch's builder; packing: rows against TRL's pack_dataset; rope: "
            "perplexity under every extension method, of a model that is trained for it."
        ),
    ] = Subject.attention,
    seq_len: Annotated[
        int | None,
        typer.Option(
            help="Tokens a row, the anchor included; 16384 for attention, 4096 for routes (16384 on CUDA), 8192 for a "
            "step, 4096 for packing, 8192 … 4194304 for masks, 256 for rope."
        ),
    ] = None,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="1K, 2K, … 128K tokens of every distribution (attention).")
    ] = False,
    distribution: Annotated[
        str | None,
        typer.Option(
            help="Of document lengths: uniform, web-text, all-short, one-long, prolong-like; several with commas "
            "(attention), one (step)."
        ),
    ] = None,
    shortest: Annotated[int | None, typer.Option(help="Tokens of uniform's shortest document; 300.")] = None,
    longest: Annotated[int | None, typer.Option(help="Tokens of uniform's longest document; 1400.")] = None,
    heads: Annotated[
        str | None, typer.Option(help="Query heads, or query/key heads: 8, 32/8. 8 on a CPU, 32/8 on CUDA.")
    ] = None,
    head_dim: Annotated[int | None, typer.Option(help="Head size; 64 on a CPU, 128 on CUDA.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; float32 on a CPU, bfloat16 on CUDA.")
    ] = None,
    flex: Annotated[
        bool,
        typer.Option("--flex", help="Compile flex on a CPU, for its forward (attention); takes 15 s."),
    ] = False,
    size: Annotated[str | None, typer.Option(help="tiny, laptop, small or 1b (step); laptop.")] = None,
    engine: Annotated[str | None, typer.Option(help="Of the wrapped models (step); auto.")] = None,
    rivals: Annotated[
        str | None, typer.Option(help="Which, with commas (step): full, intra_doc, anchor, transformers; all.")
    ] = None,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Layers keep their inputs alone (step).")
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="A tiny model for a few steps: that it runs, and nothing else (rope).")
    ] = False,
    rounds: Annotated[
        int | None,
        typer.Option(help="Counted rounds at most; rivals alternate, medians are reported. 20 for masks, 5 otherwise."),
    ] = None,
    budget_s: Annotated[
        float | None,
        typer.Option(
            help=f"Seconds ({TIMED}): no round is begun after them, and no rival run whose round takes a quarter. A "
            "row of attention 100, of a sweep 30; all routes 420; a step without end."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of lengths and values.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="Folder of bench.csv; runs/bench-<subject> when left out.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the records as JSON instead of the table.")] = False,
) -> None:
    """Time our code against named rivals on the same input, after a parity check in the same run."""
    from anchor_attn.cli.bench_subjects import SUBJECTS, Task
    from anchor_attn.results import check_device, check_folder, describe_environment

    given = {
        "seq_len": seq_len, "sweep": sweep or None, "distribution": distribution, "shortest": shortest,
        "longest": longest, "heads": heads, "head_dim": head_dim, "dtype": dtype, "flex": flex or None, "size": size,
        "engine": engine, "rivals": rivals, "checkpointing": checkpointing or None, "budget_s": budget_s,
        "quick": quick or None,
    }  # fmt: skip
    given = {name: value for name, value in given.items() if value is not None}
    _check_options(subject, given, rounds)
    check_device(device)
    out = Path(f"runs/bench-{subject}") if out is None else out
    check_folder(out)
    said = Console(stderr=True, highlight=False, soft_wrap=True)
    environment = describe_environment(device) | {"subject": subject.value}
    task = Task(given, rounds, seed, device, out, environment, (lambda line: None) if as_json else said.print)
    outcome = SUBJECTS[subject.value](task)
    if as_json:
        typer.echo(json.dumps({"meta": outcome.meta, "records": outcome.records}, indent=1))
        return
    console = Console()
    meta = outcome.meta
    console.print(f"{outcome.title}, {meta['device_name']}, {meta['threads']} threads", highlight=False)
    console.print(outcome.table, crop=False)
    for line in outcome.lines:
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"Written: {', '.join(str(path) for path in outcome.files)}", highlight=False, soft_wrap=True)


def _check_options(subject: Subject, given: dict[str, Any], rounds: int | None) -> None:
    if rounds is not None and rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}; pass 5.")
    for name in given:
        if name not in KNOWN[subject]:
            option = f"--{name.replace('_', '-')}"
            knowing = " or ".join(other for other, known in KNOWN.items() if name in known)
            raise ValueError(f"{option} must be for {knowing}, got bench {subject}; leave it out.")
    if not given.get("budget_s", 1) > 0:
        raise ValueError(f"budget_s must be above 0, got {given['budget_s']}; pass 100.")
