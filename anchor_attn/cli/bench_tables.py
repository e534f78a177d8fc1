"""The tables that `anchor-attn bench` prints."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich import box
from rich.table import Table

from anchor_attn.bench.report import HEADER, list_lines
from anchor_attn.bench.routes import RouteTiming
from anchor_attn.bench.timing import Timing
from anchor_attn.cli.tables import keep_whole

TERMINAL_COLUMNS = 7  # the rest of the columns is in the files

Columns = dict[str, Callable[[Any], str]]


def attention_table(timings: Sequence[Timing]) -> Table:
    """A line a rival, a section a row; the files hold more columns."""
    lines, last = list_lines(timings), None
    table, cells = Table(box=box.SIMPLE_HEAD), [line.cells()[:TERMINAL_COLUMNS] for line in lines]
    for place, column in enumerate(zip(HEADER, *cells, strict=False)):
        # Nothing is cut short: in a narrow terminal the table runs over its edge.
        shown = [cell for cell in column if not cell.startswith("left out")]
        table.add_column(column[0], justify="right" if place else "left", no_wrap=True, min_width=max(map(len, shown)))
    for line, row in zip(lines, cells, strict=True):
        if (line.seq_len, line.distribution) != last:
            last = line.seq_len, line.distribution
            table.add_row(f"{line.seq_len:,} tokens, {line.distribution}", style="bold")
        table.add_row(*(row if line.whole.seconds is not None else [line.name, *["–"] * (TERMINAL_COLUMNS - 1)]))
    return table


def reasons(timings: Iterable[Timing]) -> list[str]:
    """Why rivals were left out, a line each."""
    absent = [line for line in list_lines(timings) if line.whole.left_out]
    return [
        f"Left out: {line.name}, {line.seq_len:,} tokens, {line.distribution}: {line.whole.left_out}" for line in absent
    ]


def route_table(timings: Sequence[RouteTiming]) -> Table:
    """A line a kind of call and route, the fastest first."""
    columns: Columns = {
        "route": lambda timing: timing.route,
        "seconds": lambda timing: f"{timing.seconds:.4f}",
        "min–max": lambda timing: f"{timing.fastest_s:.4f}–{timing.slowest_s:.4f}",
        "compile s": lambda timing: "–" if timing.compile_s is None else f"{timing.compile_s:.1f}",
    }
    table, cases = _empty(*columns, first="kind of call"), dict[tuple[Any, ...], list[RouteTiming]]()
    for timing in timings:
        cases.setdefault((timing.features, timing.pattern, timing.needs_grad), []).append(timing)
    for (features, pattern, needs_grad), own in cases.items():
        name = f"{pattern}, {features}, {'with' if needs_grad else 'without'} gradients"
        for place, timing in enumerate(sorted(own, key=lambda timing: timing.seconds)):
            table.add_row("" if place else name, *(show(timing) for show in columns.values()))
        table.add_section()
    return keep_whole(table)


def step_table(timings: Sequence[Timing]) -> Table:
    """A line a rival."""
    return _filled(timings, {
        "seconds": lambda timing: f"{timing.seconds:.3f}",
        "min–max": lambda timing: f"{timing.fastest_s:.3f}–{timing.slowest_s:.3f}",
        "speed-up": lambda timing: _ratio(timing.speedup, 2),
        "pairs": lambda timing: "–"
        if timing.speedup is None
        else f"{100 * timing.share_of_ideal / timing.speedup:.0f} %",
        "GB": lambda timing: "–" if timing.peak_bytes is None else f"{timing.peak_bytes / 1e9:.1f}",
    })  # fmt: skip


def mask_table(timings: Sequence[Any]) -> Table:
    """A line a builder and length."""
    return _filled(timings, {
        "tokens": lambda timing: f"{timing.seq_len:,}",
        "ms": lambda timing: f"{1e3 * timing.seconds:,.2f}",
        "full": lambda timing: f"{timing.blocks_full:,}",
        "partial": lambda timing: f"{timing.blocks_partial:,}",
        "MB": lambda timing: f"{timing.table_bytes / 1e6:,.1f}",
        "eager": lambda timing: _ratio(timing.ratio_to_eager, 0),
    })  # fmt: skip


def packing_table(timings: Sequence[Any]) -> Table:
    """A line a packer."""
    return _filled(timings, {
        "seconds": lambda timing: f"{timing.seconds:.3f}",
        "M tokens/s": lambda timing: f"{timing.tokens_per_s / 1e6:,.0f}",
        "rows": lambda timing: f"{timing.rows:,}",
        "dropped": lambda timing: f"{timing.dropped_tokens:,}",
        "wrapped": lambda timing: _ratio(timing.ratio_to_wrapped, 2),
        "bfd": lambda timing: _ratio(timing.ratio_to_bfd, 2),
    })  # fmt: skip


def _filled(timings: Iterable[Any], columns: Columns) -> Table:
    table = _empty(*columns)
    for timing in timings:
        if timing.seconds is None:
            continue
        table.add_row(timing.name, *(show(timing) for show in columns.values()))
    return keep_whole(table)


def _empty(*columns: str, first: str = "rival") -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _ratio(ratio: float | None, digits: int) -> str:
    """A ratio as "3.20 ×"; "–" where the rival was not run."""
    return "–" if ratio is None else f"{ratio:,.{digits}f} ×"
