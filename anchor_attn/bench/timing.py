"""Rivals in turn, round by round, so that a noisy machine disturbs all of them alike; medians, and their spread."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import torch

from anchor_attn.bench.memory import available_bytes, measure_peak, release
from anchor_attn.masks import PATTERNS, PackedLayout, attended_pairs
from anchor_attn.masks.patterns import Pattern


@dataclass(frozen=True)
class Timing:
    """What one phase of one rival took.

    Attributes:
        name: of the rival.
        engine: of ours, or whose it is.
        kernel: what computed it.
        form: of our sum; "" for others.
        route: engine, kernel and form as `engine=` takes them; "" for others.
        pattern: who attended to whom.
        phase: "forward" (without gradients), "backward" (alone), "both", or "step".
        distribution: of the document lengths.
        documents: in the row.
        seq_len: tokens a row.
        rounds: how many were counted.
        seconds: median of the counted rounds; None where the rival was left out.
        fastest_s: of the counted rounds.
        slowest_s: of the counted rounds.
        speedup: full's seconds over these; None where full was left out.
        share_of_ideal: the speedup, over full's pairs divided by this pattern's pairs. It is also the rate of
            floating-point operations on attended pairs, over that of full attention on the same row.
        tokens_per_s: of the batch, padding left out.
        tflops_per_s: 10¹² operations a second, counted on attended pairs alone; None for a step.
        peak_bytes: the most that tensors took at once in one round, all phases, above what was held before.
        left_out: why the rival was not timed; "" where it was.
    """

    name: str
    engine: str
    kernel: str
    form: str
    route: str
    pattern: Pattern
    phase: str
    distribution: str
    documents: int
    seq_len: int
    rounds: int = 0
    seconds: float | None = None
    fastest_s: float | None = None
    slowest_s: float | None = None
    speedup: float | None = None
    share_of_ideal: float | None = None
    tokens_per_s: float | None = None
    tflops_per_s: float | None = None
    peak_bytes: int | None = None
    left_out: str = ""


class Watch:
    """Seconds by name: `with watch("forward"):` waits for the device before and after."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time what runs inside."""
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        self.seconds[phase] = time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class Rival:
    """Something to time.

    Attributes:
        name: unlike any other's.
        engine: of ours, or whose it is.
        kernel: what computes it.
        pattern: who attends to whom.
        run: does one round of it, each phase inside `watch(phase)`.
        form: of our sum; "" for others.
        phases: what a round gives.
        is_dense: whether its time grows with all S × S cells, and not with the attended ones.
        bytes_a_cell: what it allocates for each of the S × S cells.
    """

    name: str
    engine: str
    kernel: str
    pattern: Pattern
    run: Callable[[Watch], Any]
    form: str = ""
    phases: tuple[str, ...] = ("both",)
    is_dense: bool = False
    bytes_a_cell: float = 0.0

    def cells(self, layout: PackedLayout) -> float:
        """The pairs that its seconds grow with."""
        return sum(attended_pairs(layout, "full" if self.is_dense else self.pattern)) * (2 if self.is_dense else 1)


@dataclass(frozen=True)
class Row:
    """What all rivals of a comparison compute on.

    Attributes:
        layout: one packed batch.
        distribution: of its document lengths.
        flops_a_pair: floating-point operations of each phase for an attended pair, all heads; none for a step.
    """

    layout: PackedLayout
    distribution: str = ""
    flops_a_pair: Mapping[str, float] = field(default_factory=dict)


@dataclass
class Pace:
    """How fast rivals were when they were last run, to foretell how long a round of theirs will take."""

    seconds_a_cell: dict[str, float] = field(default_factory=dict)

    def note(self, rival: Rival, layout: PackedLayout, seconds: float) -> None:
        """Keep what a round took."""
        self.seconds_a_cell[rival.name] = seconds / rival.cells(layout)

    def foretell(self, rival: Rival, layout: PackedLayout) -> float:
        """Seconds of a round; 0 where nothing is known of the rival."""
        return self.seconds_a_cell.get(rival.name, 0.0) * rival.cells(layout)


def time_rivals(
    rivals: Sequence[Rival], row: Row, rounds: int, budget_s: float = math.inf, pace: Pace | None = None
) -> list[Timing]:
    """Time rivals in turn, after one round that is not counted and in which memory is measured.

    No round is begun after `budget_s` seconds but the first counted one. A rival is left out, with the reason in its
    records, where one round would take more than a quarter of the budget, or its S × S cells more than the memory.
    Ratios are to the rival of the pattern "full".

    Args:
        rivals: names differ; one at most has the pattern "full".
        row: what they compute on.
        rounds: how many are counted at most.
        budget_s: seconds for all of them.
        pace: what is known of them from shorter rows; gets what is found here.
    """
    pace = Pace() if pace is None else pace
    device, started = row.layout.device, time.perf_counter()
    absent = {rival.name: reason for rival in rivals if (reason := _reason(rival, row, budget_s, pace))}
    peaks: dict[str, int | None] = {}
    for rival in rivals:
        if rival.name in absent:
            continue
        release(device)
        try:
            with measure_peak(device) as peak:
                rival.run(Watch(device))
        except torch.OutOfMemoryError as error:
            absent[rival.name] = f"out of memory: {str(error).partition('.')[0]}"
        else:
            peaks[rival.name] = peak.tensor_bytes
    present = [rival for rival in rivals if rival.name not in absent]
    seconds: dict[str, list[dict[str, float]]] = {rival.name: [] for rival in rivals}
    for number in range(rounds):
        if number and time.perf_counter() - started > budget_s:
            break
        for rival in present:
            watch, began = Watch(device), time.perf_counter()
            rival.run(watch)
            pace.note(rival, row.layout, time.perf_counter() - began)
            seconds[rival.name].append(watch.seconds)
    return _timings(rivals, row, seconds, peaks, absent)


def _reason(rival: Rival, row: Row, budget_s: float, pace: Pace) -> str:
    """Why a rival is not to be run on a row; "" where nothing is against it."""
    foretold = pace.foretell(rival, row.layout)
    if foretold > budget_s / 4:
        return f"a round would take about {foretold:,.0f} s; pass --budget-s {math.ceil(4 * foretold)}"
    needed = rival.bytes_a_cell * row.layout.batch_size * row.layout.seq_len**2
    free = available_bytes(row.layout.device)
    if free is not None and needed > free:
        return f"its S × S cells would take {needed / 2**30:,.0f} GiB, {free / 2**30:,.0f} GiB are free"
    return ""


def _timings(
    rivals: Sequence[Rival],
    row: Row,
    seconds: Mapping[str, Sequence[Mapping[str, float]]],
    peaks: Mapping[str, int | None],
    absent: Mapping[str, str],
) -> list[Timing]:
    layout = row.layout
    pairs = {pattern: sum(attended_pairs(layout, pattern)) for pattern in PATTERNS}
    full = next((seconds[rival.name] for rival in rivals if rival.pattern == "full"), ())
    timings = []
    for rival, phase in [(each, phase) for each in rivals for phase in each.phases]:
        timing = Timing(
            name=rival.name,
            engine=rival.engine,
            kernel=rival.kernel,
            form=rival.form,
            route="/".join((rival.engine, rival.kernel, rival.form)) if rival.form else "",
            pattern=rival.pattern,
            phase=phase,
            distribution=row.distribution,
            documents=layout.num_documents,
            seq_len=layout.seq_len,
            peak_bytes=peaks.get(rival.name),
            left_out=absent.get(rival.name, ""),
        )
        taken = [found[phase] for found in seconds[rival.name]]
        if taken:
            full_s = median(found[phase] for found in full) if full else None
            timing = _timed(timing, taken, full_s, pairs, row)
        timings.append(timing)
    return timings


def _timed(
    timing: Timing, taken: Sequence[float], full_s: float | None, pairs: Mapping[Pattern, int], row: Row
) -> Timing:
    """The same record with its seconds, and what follows from them."""
    seconds, own_pairs, flops = median(taken), pairs[timing.pattern], row.flops_a_pair.get(timing.phase)
    speedup = None if full_s is None else full_s / seconds
    return replace(
        timing,
        rounds=len(taken),
        seconds=seconds,
        fastest_s=min(taken),
        slowest_s=max(taken),
        speedup=speedup,
        share_of_ideal=None if speedup is None else speedup * own_pairs / pairs["full"],
        tokens_per_s=sum(row.layout.row_tokens) / seconds,
        tflops_per_s=None if flops is None else flops * own_pairs / seconds / 1e12,
    )
