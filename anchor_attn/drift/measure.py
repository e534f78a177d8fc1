"""How far RoPE in low precision is from relative: the same query and key, all positions moved.

    score(n, m; Δ)  =  rotate(query, n + Δ) · rotate(key, m + Δ) · scale          the same for every Δ, but for rounding
    drift           =  score(n, m; Δ) − score(n, m; 0)

of every pair of a query and a key that it sees, and the same of the attention weights. Beside each stands its floor:
what float64 drifts by under the same shift.

Source: https://arxiv.org/abs/2411.13476, sections 2 and 3.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from anchor_attn.bench.memory import available_bytes
from anchor_attn.drift.policies import (
    DTYPES,
    FP64,
    POSITION_LIMIT,
    Policy,
    Stage,
    find_policies,
    multiply,
    rotate,
    weigh,
)
from anchor_attn.drift.report import DriftRecord, DriftReport
from anchor_attn.drift.states import LLAMA_THETA, States, random_states
from anchor_attn.drift.tally import Bins, Pairs, Sums, Tallies
from anchor_attn.masks import PackedLayout
from anchor_attn.masks.layout import PositionPolicy, checked_int
from anchor_attn.masks.patterns import Pattern, packed_mask_mod
from anchor_attn.rope.precision import inverse_frequencies

SHIFTS = (16, 1_000, 30_000, 130_000, 1_000_000, 4_000_000)
QUERIES = 512
# Of scores that are held at once, and so of the memory that a measurement takes beside rotated keys.
BLOCK_PAIRS = 2**21
Level = Literal["scores", "attention"]
LEVELS: tuple[Level, ...] = ("scores", "attention")


@dataclass(frozen=True)
class Pipeline:
    """A policy, or one stage of it in float64."""

    policy: Policy
    stage: Stage | None = None

    @property
    def applied(self) -> Policy:
        """What is computed with."""
        return self.policy if self.stage is None else self.policy.alone(self.stage)


def measure_drift(
    query: Tensor | None = None,
    key: Tensor | None = None,
    *,
    states: States | Sequence[States] | None = None,
    inv_freq: Tensor | None = None,
    theta: float = LLAMA_THETA,
    policies: Sequence[str | Policy] | None = None,
    shifts: Sequence[int] = SHIFTS,
    queries: int | None = QUERIES,
    stages: bool = True,
    layout: PackedLayout | None = None,
    pattern: Pattern = "full",
    position_policy: PositionPolicy = "continuous",
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> DriftReport:
    """Measure by how much scores and attention change when all positions move.

        measure_drift(shifts=[1000]).at("exact", 1000).mean_abs      2.6e-3, of a random normal

    Args:
        query: before rotation, floating [B, H, S, D]; random, 2,048 tokens, when nothing is given.
        key: of the same layer [B, K, S, D]; K divides H.
        states: instead of query and key: of one layer or of several, as `capture_states` returns them.
        inv_freq: float32 [R/2], for query and key; plain RoPE of the head size when None.
        theta: its base.
        policies: names of `POLICIES` or a `Policy`; all of them when None. float64 is always measured.
        shifts: Δ, each at least 1.
        queries: how many are measured, evenly over the row, the last among them; None for all. Keys are never left out.
        stages: measure each stage of each policy alone too.
        layout: the documents of the row; one document when None.
        pattern: which pairs are looked at, "full", "intra_doc" or "anchor".
        position_policy: "continuous" or "reset", before the shift.
        seed: of random states.
        say: told what is being done.

    Returns:
        Records by policy, stage, shift, distance, key, layer and head.

    Raises:
        ValueError: query without key, nan, shapes that do not fit, an unknown policy, a shift that positions or a
            policy cannot hold, or states too large for the memory at hand.
    """
    layers = _as_layers(query, key, states, inv_freq, theta, seed)
    found = find_policies(policies)
    shifts = checked_shifts(shifts, max(layer.seq_len for layer in layers), found)
    records: list[DriftRecord] = []
    for layer in layers:
        if layer.layer is not None:
            say(f"layer {layer.layer}")
        view = View.of(layer, layout, pattern, position_policy, queries)
        records += measure_states(layer, found, shifts, view, stages)
    first = layers[0]
    return DriftReport(
        records=tuple(records),
        settings={
            "seq_len": first.seq_len, "head_dim": first.head_dim, "heads": first.query.shape[1], "layers": len(layers),
            "shifts": list(shifts), "queries": queries, "pattern": pattern, "position_policy": position_policy,
            "policies": {policy.name: policy.stage_roundings for policy in found}, "seed": seed,
        },
    )  # fmt: skip


@dataclass(frozen=True)
class View:
    """Which queries are measured, which keys each of them sees, and where both stand.

    Attributes:
        rows: places of the queries, int64 [Q].
        position_ids: before a shift, int64 [B, S].
        sees: visible keys, bool [Q, S], of a row of the batch and some of the queries.
    """

    rows: Tensor
    position_ids: Tensor
    sees: Callable[[int, Tensor], Tensor]

    @classmethod
    def of(
        cls,
        states: States,
        layout: PackedLayout | None = None,
        pattern: Pattern = "full",
        position_policy: PositionPolicy = "continuous",
        queries: int | None = None,
    ) -> "View":
        """The pairs of a pattern, `queries` of them evenly over the row.

        Raises:
            ValueError: a layout of other shape, an unknown pattern or policy, or no queries.
        """
        batch, seq_len = states.query.shape[0], states.seq_len
        if layout is None:
            layout = PackedLayout.from_lengths([[seq_len]] * batch, anchor_tokens=0)
        if (layout.batch_size, layout.seq_len) != (batch, seq_len):
            raise ValueError(
                f"layout must describe {batch} rows of {seq_len} tokens, got {layout.batch_size} of {layout.seq_len}; "
                "pass the layout of these states."
            )
        mask_mod = packed_mask_mod(layout, pattern, states.sliding_window, keep_anchor=False)
        keys = torch.arange(seq_len)

        def sees(row: int, rows: Tensor) -> Tensor:
            return mask_mod(torch.tensor(row), torch.tensor(0), rows[:, None], keys[None])

        return cls(_sampled(seq_len, queries), layout.position_ids(position_policy).long(), sees)


def measure_states(
    states: States, policies: Sequence[Policy], shifts: Sequence[int], view: View, stages: bool
) -> list[DriftRecord]:
    """The records of one layer.

    Args:
        states: query and key.
        policies: float64 last.
        shifts: checked.
        view: which pairs.
        stages: measure stages alone too.
    """
    _check_memory(states)
    pipelines = [Pipeline(policy) for policy in policies]
    if stages:
        pipelines += [Pipeline(policy, stage) for policy in policies for stage in policy.stages]
    # What two policies have in common is measured once: the same stage alone, rounded to the same.
    shared: dict[Policy, list[Pipeline]] = {}
    for pipeline in pipelines:
        shared.setdefault(_unnamed(pipeline.applied), []).append(pipeline)
    bins = Bins.below(states.seq_len)
    heads = states.query.shape[1]
    found: dict[tuple[Policy, int, Level], Tallies] = {}
    sizes = {level: Tallies(heads, bins, bins, True) for level in LEVELS}
    for applied, asking in shared.items():
        detailed = any(pipeline.stage is None for pipeline in asking)
        for shift in shifts:
            for level in LEVELS:
                found[applied, shift, level] = Tallies(heads, bins, bins, detailed)
        for part in _parts(states, view):
            _measure_part(part, applied, shifts, found, sizes if applied == _unnamed(FP64) else None)
    return [
        record
        for applied, asking in shared.items()
        for pipeline in asking
        for shift in shifts
        for level in LEVELS
        for record in _records(states, pipeline, shift, level, bins, found, sizes[level])
    ]


def checked_shifts(shifts: Sequence[int], seq_len: int, policies: Sequence[Policy]) -> tuple[int, ...]:
    """Shifts as integers, smallest first, each once.

    Raises:
        TypeError: a shift that is no integer.
        ValueError: none, one below 1, one beyond what float64 angles or a policy's positions hold.
    """
    checked = sorted({checked_int(shift, "shifts") for shift in shifts})
    if not checked or checked[0] < 1:
        raise ValueError(f"shifts must be at least 1 each, got {list(shifts)}; pass [16, 1_000], say.")
    last = checked[-1] + seq_len - 1
    if last >= POSITION_LIMIT:
        raise ValueError(
            f"shifts must stay below {POSITION_LIMIT - seq_len + 1:,} for {seq_len:,} tokens, got {checked[-1]:,}: "
            "beyond it a position times a frequency is not exact in float64; pass a smaller shift."
        )
    for policy in policies:
        most = torch.finfo(DTYPES[policy.angles]).max
        if last > most:
            raise ValueError(
                f"shifts must leave positions up to {most:,.0f} for policy {policy.name!r}, whose angles are "
                f"{policy.angles}, got {checked[-1]:,}; pass a smaller shift, or other policies."
            )
    return tuple(checked)


# --- the loops -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Some heads of one row of the batch: what fits into memory at once."""

    states: States
    query: Tensor  # [h, Q, D]
    key: Tensor  # [h, S, D]
    heads: slice
    rows: Tensor
    position_ids: Tensor  # [S]
    sees: Callable[[Tensor], Tensor]
    sinks: Tensor | None

    def rotated(self, shift: int, policy: Policy) -> tuple[Tensor, Tensor]:
        """Query and key of a policy, all positions moved."""
        position_ids = self.position_ids + shift
        query = rotate(self.query, position_ids[self.rows], self.states, policy)
        return query, rotate(self.key, position_ids, self.states, policy)

    def blocks(self) -> Iterator[slice]:
        """Of queries."""
        size = max(1, BLOCK_PAIRS // (len(self.query) * self.key.shape[1]))
        return (slice(start, start + size) for start in range(0, len(self.rows), size))


def _parts(states: States, view: View) -> Iterator[Part]:
    batch, heads, seq_len, _ = states.query.shape
    repeats = heads // states.key.shape[1]
    together = max(1, BLOCK_PAIRS // (min(len(view.rows), 64) * seq_len))
    for row in range(batch):
        for start in range(0, heads, together):
            part = slice(start, min(heads, start + together))
            key_heads = torch.arange(part.start, part.stop) // repeats
            yield Part(
                states=states,
                query=states.query[row, part][:, view.rows],
                key=states.key[row, key_heads],
                heads=part,
                rows=view.rows,
                position_ids=view.position_ids[row],
                sees=lambda rows, row=row: view.sees(row, rows),  # type: ignore[misc]
                sinks=None if states.sinks is None else states.sinks[part],
            )


def _measure_part(
    part: Part,
    policy: Policy,
    shifts: Sequence[int],
    found: dict[tuple[Policy, int, Level], Tallies],
    sizes: dict[Level, Tallies] | None,
) -> None:
    seq_len = part.key.shape[1]
    bins = Bins.below(seq_len)
    scale, softcap = part.states.score_scale, part.states.softcap
    still = part.rotated(0, policy)
    pairs = [Pairs(part.sees(part.rows[block]), part.rows[block], bins, bins) for block in part.blocks()]

    def values(rotated: tuple[Tensor, Tensor], block: slice, visible: Tensor) -> dict[Level, Tensor]:
        scores = multiply(rotated[0][:, block], rotated[1], scale, policy)
        capped = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        return {"scores": scores.masked_fill(~visible, 0.0), "attention": weigh(capped, visible, policy, part.sinks)}

    for shift in shifts:
        moved = part.rotated(shift, policy)
        for block, seen in zip(part.blocks(), pairs, strict=True):
            before, after = (values(rotated, block, seen.visible) for rotated in (still, moved))
            for level in LEVELS:
                seen.tally((after[level] - before[level]).abs(), part.heads, found[policy, shift, level])
                if sizes is not None and shift == shifts[0]:
                    seen.tally(before[level].abs(), part.heads, sizes[level])


# --- records ---------------------------------------------------------------------------------------------------------


def _records(
    states: States,
    pipeline: Pipeline,
    shift: int,
    level: Level,
    bins: Bins,
    found: dict[tuple[Policy, int, Level], Tallies],
    sizes: Tallies,
) -> Iterator[DriftRecord]:
    tallies, floors = (found[policy, shift, level] for policy in (_unnamed(pipeline.applied), _unnamed(FP64)))
    whole = float(tallies.overall().total[0])

    def record(
        by: str, sums: Sums, floor: Sums, size: Sums, place: int, low: int | None, high: int | None
    ) -> DriftRecord:
        count, total = float(sums.count[place]), float(sums.total[place])
        mean = total / count
        value = float(size.total[place]) / count
        return DriftRecord(
            level=level,
            policy=pipeline.policy.name,
            stage=pipeline.stage,
            shift=shift,
            layer=states.layer,
            by=by,
            low=low,
            high=high,
            pairs=int(count),
            mean_abs=mean,
            max_abs=float(sums.largest[place]),
            rms=math.sqrt(float(sums.squares[place]) / count),
            relative=mean / value if value else None,
            mean_value=value,
            share=total / whole if whole else None,
            floor=float(floor.total[place]) / count,
        )

    yield record("all", tallies.overall(), floors.overall(), sizes.overall(), 0, None, None)
    if pipeline.stage is not None:
        return
    for head in range(len(tallies.by["head"].count)):
        yield record("head", tallies.by["head"], floors.by["head"], sizes.by["head"], head, head, head)
    for by in ("distance", "key"):
        for place, (low, high) in enumerate(bins.bounds()):
            if tallies.by[by].count[place]:
                yield record(by, tallies.by[by], floors.by[by], sizes.by[by], place, low, high)


# --- what is asked for -----------------------------------------------------------------------------------------------


def _as_layers(
    query: Tensor | None,
    key: Tensor | None,
    states: States | Sequence[States] | None,
    inv_freq: Tensor | None,
    theta: float,
    seed: int,
) -> list[States]:
    if states is not None:
        if query is not None or key is not None or inv_freq is not None:
            raise ValueError("states must come alone, got query, key or inv_freq beside them; pass one or the other.")
        layers = [states] if isinstance(states, States) else list(states)
        if not layers:
            raise ValueError("states must hold one layer at least, got none; pass what capture_states returns.")
        return layers
    if (query is None) != (key is None):
        raise ValueError(
            f"query and key must come together, got {'key' if query is None else 'query'} alone; pass both."
        )
    if query is None or key is None:
        return [random_states(theta=theta, seed=seed)]
    if inv_freq is None:
        inv_freq = inverse_frequencies(query.shape[-1], theta)
    return [States(query.detach().cpu(), key.detach().cpu(), inv_freq.detach().cpu())]


def _sampled(seq_len: int, queries: int | None) -> Tensor:
    """Places of so many queries, evenly over the row, the last among them."""
    if queries is None or queries >= seq_len:
        return torch.arange(seq_len)
    if checked_int(queries, "queries") < 1:
        raise ValueError(f"queries must be at least 1, got {queries}; pass {QUERIES}, or None for all.")
    return (torch.arange(1, queries + 1) * seq_len) // queries - 1


def _check_memory(states: States) -> None:
    """Rotated keys of one head stand in float64 twice, and a few times more while they are made."""
    needed, free = 12 * 8 * states.seq_len * states.head_dim, available_bytes(torch.device("cpu"))
    if free is not None and needed > free:
        fitting = free // (12 * 8 * states.head_dim)
        raise ValueError(
            f"states must fit into memory, got {states.seq_len:,} tokens, which take {needed / 2**30:.1f} GiB of "
            f"{free / 2**30:.1f} free; pass at most {fitting:,} tokens."
        )


def _unnamed(policy: Policy) -> Policy:
    """The same but for its name."""
    return replace(policy, name="")
