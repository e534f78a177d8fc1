"""`anchor-attn drift`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from anchor_attn.cli.options import errors_by_options

if TYPE_CHECKING:
    from anchor_attn.drift.view import Queries

PAPER_SEQUENCES = 50


@errors_by_options
def drift_command(
    model: Annotated[
        str | None,
        typer.Option(
            help="A checkpoint: a folder or a hub name; tiny, laptop or small: fresh weights. Random query "
            "and key when left out."
        ),
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="What the model reads: a file, a folder, stdlib or a hub name; random tokens.")
    ] = None,
    text_column: Annotated[str, typer.Option(help="Column that holds the text of documents.")] = "text",
    tokenizer: Annotated[
        str | None, typer.Option(help="bytes, a folder or a hub name; the model's own when left out.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Most documents to read; all when left out.")] = None,
    sequences: Annotated[
        int | None, typer.Option(help=f"How many sequences; 1, and {PAPER_SEQUENCES} for --paper.")
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Of the model: 0,5,11; all when left out.")] = None,
    policies: Annotated[
        str | None, typer.Option(help="Names apart by commas: bf16_cos_sin,exact; all when left out.")
    ] = None,
    shifts: Annotated[
        str | None, typer.Option(help="By how many tokens positions move: 16,1000,4M, the default up to 4M.")
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(help="Tokens of the row, several for drift against length: 512,2Ki; 2048, or 1024 of a model."),
    ] = None,
    documents: Annotated[
        str | None,
        typer.Option(help="Or tokens of the documents of the row, 300,500,223: does an anchor reduce the drift?"),
    ] = None,
    theta: Annotated[float | None, typer.Option(help="Base of the frequencies at random; 10000.")] = None,
    queries: Annotated[
        int | None,
        typer.Option(
            help="Queries that are measured of a row, evenly; 512 up to 16Ki tokens, then fewer, 64 from 128Ki on; "
            "all for --paper, 128 for --sweep."
        ),
    ] = None,
    fix: Annotated[
        bool, typer.Option("--fix", help="Which rope_precision of wrap removes it, before and after.")
    ] = False,
    paper: Annotated[
        bool, typer.Option("--paper", help="The protocol of the paper's figure 1 instead, written as paper.json.")
    ] = False,
    sweep: Annotated[
        bool,
        typer.Option("--sweep", help="Every base and extension method instead, written as sweep.json, .csv and .png."),
    ] = False,
    fail_above: Annotated[
        float | None, typer.Option(help="Exit code 1 if the mean |Δ score| of a policy is above it, at any shift.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; as saved when left out.")] = None,
    seed: Annotated[int, typer.Option(help="Of random states, weights, tokens and the choice of sequences.")] = 0,
    device: Annotated[str, typer.Option(help="Where the model runs, cpu or cuda; drift is measured on the CPU.")] = (
        "cpu"
    ),
    out: Annotated[Path, typer.Option(help="Folder of drift.json, drift.csv, drift.html and drift.png.")] = Path(
        "runs/drift"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print drift.json instead of the tables.")] = False,
) -> None:
    """Measure how far RoPE in low precision is from relative, stage by stage.

    Without an argument on random query and key, in seconds. With --model on those of its layers, and the whole model.
    """
    from anchor_attn.cli.drift_input import check_lengths, read_documents_row, read_numbers, read_policies
    from anchor_attn.cli.drift_run import Asked, run_drift
    from anchor_attn.cli.drift_subject import ModelInput
    from anchor_attn.drift.measure import SHIFTS
    from anchor_attn.results import check_device, check_folder, check_seed

    check_device(device)
    check_seed(seed)
    given = {
        "text": text, "tokenizer": tokenizer, "limit": limit, "layers": layers, "dtype": dtype,
        "sequences": None if paper else sequences,
    }  # fmt: skip
    _check_fit(model, theta, fail_above, given)
    if sweep:
        given = {"model": model, "documents": documents, "fix": fix or None, "paper": paper or None}
        _check_alone("--sweep", {**given, "fail_above": fail_above})
    if paper:
        _check_alone(
            "--paper", {"documents": documents, "fix": fix or None, "fail_above": fail_above, "shifts": shifts}
        )
    count = (PAPER_SEQUENCES if paper else 1) if sequences is None else sequences
    if count < 1:
        raise ValueError(f"sequences must be at least 1, got {count}; pass 1.")
    source = None
    if model is not None:
        chosen = None if layers is None else read_numbers(layers, "layers")
        source = ModelInput(model, text, text_column, tokenizer, limit, count, dtype, seed, device, chosen)
    asked = Asked(
        policies=None if policies is None else read_policies(policies),
        shifts=list(SHIFTS) if shifts is None else read_numbers(shifts, "shifts"),
        lengths=[] if lengths is None else read_numbers(lengths, "lengths"),
        queries=_queries(queries, paper, sweep),
        theta=theta,
        layout=read_documents_row(documents),
        fix=fix,
        fail_above=fail_above,
        source=source,
        seed=seed,
    )
    check_lengths(asked.lengths, asked.layout)
    check_folder(out)
    said = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
    say = (lambda line: None) if as_json or model is None else said.print
    environment = _describe(device, seed)
    if sweep:
        from anchor_attn.cli.drift_sweep import run_sweep

        run_sweep(asked, out, environment, as_json)
        return
    if paper:
        from anchor_attn.cli.drift_paper import run_paper

        run_paper(asked, count, out, environment, as_json, lambda line: None if as_json else said.print(line))
        return
    run_drift(asked, out, environment, as_json, say)


def _check_fit(model: str | None, theta: float | None, fail_above: float | None, given: dict[str, Any]) -> None:
    """Options that would be dropped without a word."""
    for name, value in given.items():
        if model is None and value is not None:
            raise ValueError(
                f"{name} must stand beside a model, got {value!r} without one; pass --model, or leave it out."
            )
    if model is not None and theta is not None:
        raise ValueError(f"theta must be left out beside a model, got {theta:g}; its config says its own.")
    if fail_above is not None and not fail_above >= 0:
        raise ValueError(f"fail_above must be at least 0, got {fail_above}; pass 0.01, say.")


def _queries(given: int | None, paper: bool, sweep: bool) -> "Queries":
    """How many are measured of a row: all of the paper's, fewer where many measurements are asked for."""
    from anchor_attn.drift.sweep import QUERIES as OF_SWEEP
    from anchor_attn.drift.view import BY_LENGTH

    return given if given is not None else None if paper else OF_SWEEP if sweep else BY_LENGTH


def _check_alone(option: str, given: dict[str, Any]) -> None:
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name} must be left out beside {option}, got {value!r}; run it without {option}.")


def _describe(device: str, seed: int) -> dict[str, Any]:
    from anchor_attn.results import describe_environment

    command = " ".join(["anchor-attn", *sys.argv[1:]])
    return {**describe_environment(device), "seed": seed, "command": command}
