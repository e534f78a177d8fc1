"""How far RoPE in low precision is from relative: the same query and key, all positions moved.

    score(n, m; Δ)  =  rotate(query, n + Δ) · rotate(key, m + Δ) · scale          the same for every Δ, but for rounding
    drift           =  score(n, m; Δ) − score(n, m; 0)

of every pair of a query and a key that it sees, and the same of the attention weights. Beside each stands its floor:
what float64 drifts by under the same shift.

Source: https://arxiv.org/abs/2411.13476, sections 2 and 3.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from anchor_attn.drift.memory import check_memory
from anchor_attn.drift.parts import parts_of
from anchor_attn.drift.pipelines import Pipeline, Tallied, measure_part
from anchor_attn.drift.policies import DTYPES, POSITION_LIMIT, Policy, find_policies
from anchor_attn.drift.predict import predict_all
from anchor_attn.drift.records import create_records
from anchor_attn.drift.report import DriftRecord, DriftReport
from anchor_attn.drift.spectrum import measure_spectrum
from anchor_attn.drift.states import LLAMA_THETA, States, list_layers, random_states
from anchor_attn.drift.view import BY_LENGTH, Queries, View, count_queries
from anchor_attn.masks import PackedLayout
from anchor_attn.masks.layout import PositionPolicy, checked_int
from anchor_attn.masks.patterns import Pattern
from anchor_attn.rope.precision import inverse_frequencies

SHIFTS = (16, 1_000, 30_000, 130_000, 1_000_000, 4_000_000)


def measure_drift(
    query: Tensor | None = None,
    key: Tensor | None = None,
    *,
    states: States | Sequence[States] | None = None,
    inv_freq: Tensor | None = None,
    theta: float = LLAMA_THETA,
    policies: Sequence[str | Policy] | None = None,
    shifts: Sequence[int] = SHIFTS,
    queries: Queries = BY_LENGTH,
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
            "by length": 512 up to 16,384 tokens, then 2^23 over the length, 64 from 131,072 on.
        stages: measure each stage of each policy alone too.
        layout: the documents of the row; one document when None.
        pattern: which pairs are looked at, "full", "intra_doc" or "anchor".
        position_policy: "continuous" or "reset", before the shift.
        seed: of random states.
        say: told what is being done.

    What rounding predicts is an expectation over pairs: of a handful, as in a row of 3 tokens, a measurement scatters
    around it by more than a factor of 2. Positions beyond 2^24 are no longer all float32 numbers; a policy whose angles
    are float32 rounds them too, and that is measured and not refused.

    Returns:
        Records by policy, stage, shift, distance, key, layer, head and frequency pair, with what rounding predicts.

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
            "shifts": list(shifts), "queries": count_queries(first.seq_len, queries), "pattern": pattern,
            "position_policy": position_policy,
            "policies": {policy.name: policy.stage_roundings for policy in found}, "seed": seed,
        },
    )  # fmt: skip


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
    check_memory(states.seq_len, states.head_dim)
    pipelines = [Pipeline(policy) for policy in policies]
    if stages:
        pipelines += [Pipeline(policy, stage) for policy in policies for stage in policy.stages]
    tallied = Tallied.of(states, pipelines, shifts)
    for part in parts_of(states, view):
        for piece in part.pieces():
            measure_part(piece, tallied)
    predicted = predict_all(states, list(tallied.asked), shifts, view)
    return [*create_records(states, pipelines, tallied, predicted), *measure_spectrum(states, policies, shifts, view)]


def checked_shifts(shifts: Sequence[int], seq_len: int, policies: Sequence[Policy]) -> tuple[int, ...]:
    """Shifts as integers, smallest first, each once.

    Raises:
        TypeError: a shift that is no integer, or no sequence of them.
        ValueError: none, one below 1, one beyond what float64 angles or a policy's positions hold.
    """
    if isinstance(shifts, str) or not isinstance(shifts, Iterable):
        raise TypeError(f"shifts must be a sequence of integers, got {shifts!r}; pass [16, 1_000], say.")
    checked = sorted({checked_int(shift, "shifts") for shift in shifts})
    if not checked or checked[0] < 1:
        raise ValueError(f"shifts must be at least 1 each, got {list(shifts)}; pass [16, 1_000], say.")
    if seq_len >= POSITION_LIMIT:
        raise ValueError(
            f"seq_len must stay below {POSITION_LIMIT:,} tokens, got {seq_len:,}: beyond it a position times a "
            "frequency is not exact in float64; pass fewer tokens."
        )
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
        return list_layers(states)
    if (query is None) != (key is None):
        raise ValueError(
            f"query and key must come together, got {'key' if query is None else 'query'} alone; pass both."
        )
    if query is None or key is None:
        return [random_states(theta=theta, seed=seed)]
    if inv_freq is None:
        inv_freq = inverse_frequencies(query.shape[-1], theta)
    return [States(query.detach().cpu(), key.detach().cpu(), inv_freq.detach().cpu())]
