"""`anchor-attn bench`."""

import json
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table


class Subject(StrEnum):
    """What to time."""

    attention = "attention"
    step = "step"


def bench_command(
    subject: Annotated[
        Subject, typer.Argument(help="attention: forward and backward alone; step: a training step.")
    ] = Subject.attention,
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens a row, the anchor included; 16384 for attention, 8192 for a step.")
    ] = None,
    shortest: Annotated[int, typer.Option(help="Tokens of the shortest document.")] = 300,
    longest: Annotated[int, typer.Option(help="Tokens of the longest document.")] = 1400,
    rounds: Annotated[int, typer.Option(help="Counted rounds; rivals alternate, medians are reported.")] = 5,
    seed: Annotated[int, typer.Option(help="Of lengths and values.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="Folder of bench.csv; runs/bench-<subject> when left out.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the records as JSON instead of the table.")] = False,
) -> None:
    """Time our engines against named rivals on the same row, after a parity check in the same run."""
    from anchor_attn import bench
    from anchor_attn.masks import PackedLayout
    from anchor_attn.results import check_device, check_folder, describe_environment, write_csv
    from anchor_attn.train.presets import SIZES

    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}; pass 5.")
    check_device(device)
    out = Path(f"runs/bench-{subject}") if out is None else out
    check_folder(out)
    if seq_len is None:
        seq_len = {Subject.attention: 16_384, Subject.step: 8_192}[subject]
    lengths = bench.draw_lengths(seq_len - 1, shortest, longest, seed)
    layout = PackedLayout.from_lengths([lengths])
    if subject is Subject.attention:
        sizes = {"num_heads": 8, "head_dim": 64}
        timings = bench.bench_attention(layout, **sizes, rounds=rounds, device=device, seed=seed)
    else:
        sizes = SIZES["laptop"]
        timings = bench.bench_step(layout, sizes, rounds, device, seed)
    records = [asdict(timing) for timing in timings]
    meta = {
        **describe_environment(device),
        "subject": subject.value,
        "dtype": "float32",
        "shapes": sizes,
        "document_lengths": lengths,
        "seed": seed,
        "rounds": rounds,
    }
    write_csv(out / "bench.csv", records, meta)
    if as_json:
        typer.echo(json.dumps({"meta": meta, "records": records}, indent=1))
        return
    table = Table("rival", "seconds", "min–max", "speed-up", "pairs", box=box.SIMPLE_HEAD)
    for timing in timings:
        table.add_row(
            timing.name,
            f"{timing.seconds:.3f}",
            f"{timing.fastest_s:.3f}–{timing.slowest_s:.3f}",
            f"{timing.speedup:.2f} ×",
            f"{100 * timing.share_of_ideal / timing.speedup:.0f} %",
        )
    console = Console()
    console.print(
        f"{subject}, {seq_len:,} tokens in {len(lengths)} documents of {min(lengths):,}–{max(lengths):,}, float32, "
        f"{meta['device_name']}, {meta['threads']} threads, medians of {rounds} alternating rounds",
        highlight=False,
    )
    console.print(table)
    console.print(f"Written: {out / 'bench.csv'}", highlight=False, soft_wrap=True)
