"""Rates of this machine from a few measured steps, and how far they foretell others.

    seconds = dense operations / dense rate + operations in attention's cells / attention rate

Two patterns of one length give both rates, for they differ in attention alone. What is no product – norms, the loss,
the optimizer – grows with the tokens and is inside the dense rate, which therefore holds for that model only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from anchor_attn.bench.memory import available_bytes
from anchor_attn.masks.patterns import Pattern
from anchor_attn.train.plan.devices import FLASH_TILE, Device, Rates, recognize_device
from anchor_attn.train.plan.memory import Dtype
from anchor_attn.train.plan.models import ModelShape
from anchor_attn.train.plan.tiles import CpuTile, Tile
from anchor_attn.train.plan.work import Flops, count_row, executed_flops

ROUNDS = 3
PATTERNS_OF_RATES: tuple[Pattern, ...] = ("full", "intra_doc")


@dataclass(frozen=True)
class StepSeconds:
    """A measured step, on one row.

    Attributes:
        pattern: who attended to whom.
        lengths: tokens of each document of the row, the anchor not counted.
        seconds: of its fastest round: what else runs on a machine can only slow one down.
        slowest_s: of its rounds.
        peak_bytes: of tensors, above what was held before.
    """

    pattern: Pattern
    lengths: tuple[int, ...]
    seconds: float
    slowest_s: float = 0.0
    peak_bytes: int | None = None

    @property
    def seq_len(self) -> int:
        """Tokens of the row, the anchor included."""
        return 1 + sum(self.lengths)


@dataclass(frozen=True)
class Prediction:
    """A step as it was foretold beside what it took.

    Attributes:
        seq_len: tokens of the row.
        pattern: who attended to whom.
        measured_s: what it took.
        predicted_s: what was foretold.
        error: the second over the first, minus 1.
        is_calibration: whether the rates come from this step.
    """

    seq_len: int
    pattern: Pattern
    measured_s: float
    predicted_s: float
    error: float
    is_calibration: bool


def local_device(device: str, torch_device_name: str = "") -> Device:
    """This machine's CPU, or its GPU, as one device.

    Of a GPU that the table lacks, and of a CPU, the peak is unknown: a plan then says no MFU.
    """
    if device == "cuda":
        name = torch_device_name or torch.cuda.get_device_name()
        known = recognize_device(name)
        if known is not None:
            return known
        total = float(torch.cuda.get_device_properties(0).total_memory)
        return _alone(name, total, FLASH_TILE)
    free = available_bytes(torch.device("cpu"))
    return _alone("cpu", float("inf") if free is None else float(free), CpuTile(256, 512, is_whole=False))


def _alone(name: str, memory_bytes: float, tile: Tile) -> Device:
    """A device of which memory alone is known; what it sends takes no time, for it has nobody to send to."""
    inf = float("inf")
    return Device(name, None, memory_bytes, inf, inf, inf, node_devices=1, tile=tile, source="this machine")


def measure_steps(
    size: dict[str, Any],
    rows: Sequence[Sequence[int]],
    patterns: Sequence[Pattern],
    device: str,
    seed: int,
    rounds: int = ROUNDS,
    dtype: Dtype = "float32",
) -> list[StepSeconds]:
    """Time forward, backward and AdamW of a wrapped Llama, a row and a pattern after another.

    Args:
        size: fields of a LlamaConfig.
        rows: tokens of each document of each row.
        patterns: to time.
        device: "cpu" or "cuda".
        seed: of weights and tokens.
        rounds: counted.
        dtype: of weights and compute.
    """
    from anchor_attn.bench.step import bench_step
    from anchor_attn.bench.timing import Row
    from anchor_attn.masks import PackedLayout

    found = []
    for lengths in rows:
        row = Row(PackedLayout.from_lengths([list(lengths)]))
        timings = bench_step(row, size, rounds, device, seed, dtype=getattr(torch, dtype), names=list(patterns))
        found += [
            StepSeconds(
                timing.pattern,
                tuple(lengths),
                timing.fastest_s,
                timing.slowest_s or timing.fastest_s,
                timing.peak_bytes,
            )
            for timing in timings
            if timing.fastest_s is not None
        ]
    return found


def calibrate(shape: ModelShape, tile: Tile, measured: Sequence[StepSeconds]) -> Rates:
    """The rates that two steps, or in the mean several, ran at.

    Args:
        shape: of the measured model.
        tile: of the device's kernels.
        measured: two steps at least, with different shares of attention.

    Raises:
        ValueError: fewer, or seconds that no two rates explain.
    """
    if len(measured) < 2:
        raise ValueError(f"measured must hold two steps, got {len(measured)}; measure full and intra_doc of one row.")
    work = [_work(shape, tile, step) for step in measured]
    seconds = np.array([step.seconds for step in measured])
    # Relative errors count: otherwise the longest step alone would decide.
    scaled = np.array([[each.dense, each.attention] for each in work]) / seconds[:, None]
    (dense, attention), *_ = np.linalg.lstsq(scaled, np.ones(len(measured)), rcond=None)
    if not (dense > 0 and attention > 0):
        raise ValueError(
            "measured must give rates above 0, got steps in which more attention took no longer; "
            "measure longer rows, on a machine that does nothing else."
        )
    names = " and ".join(f"{step.pattern} at {step.seq_len:,} tokens" for step in measured)
    return Rates(1 / float(dense), 1 / float(attention), f"measured: {names}")


def predict_steps(
    shape: ModelShape, tile: Tile, rates: Rates, measured: Sequence[StepSeconds], calibration: Sequence[StepSeconds]
) -> list[Prediction]:
    """Foretell measured steps from rates.

    Args:
        shape: of the measured model.
        tile: of the device's kernels.
        rates: as `calibrate` gives them.
        measured: to foretell.
        calibration: of them, those that the rates come from.
    """
    found = []
    for step in measured:
        work = _work(shape, tile, step)
        predicted = work.dense / rates.dense_flops_per_s + work.attention / rates.attention_flops_per_s
        error = predicted / step.seconds - 1
        found.append(Prediction(step.seq_len, step.pattern, step.seconds, predicted, error, step in calibration))
    return found


def _work(shape: ModelShape, tile: Tile, step: StepSeconds) -> Flops:
    row = count_row(shape, step.lengths, step.pattern, tile)
    return executed_flops(shape, row.tokens, row.cells, checkpointing=False)
