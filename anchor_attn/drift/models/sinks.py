"""How much attention the first token gets, head by head, beside its share of the drift.

    head    attention on the first token    its share of |drift|
    0       0.62                            0.31
    1       0.01                            0.02

A head that rests on its first token drifts where it looks; so says the paper of the first token, and here is what it
is told by.

Source: https://arxiv.org/abs/2411.13476, section 3; attention sinks: https://arxiv.org/abs/2309.17453.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from anchor_attn.drift.measure import checked_shifts
from anchor_attn.drift.parts import Part, parts_of
from anchor_attn.drift.policies import FP64, Policy, find_policies
from anchor_attn.drift.states import States, list_layers
from anchor_attn.drift.view import BY_LENGTH, Queries, View
from anchor_attn.masks import PackedLayout
from anchor_attn.masks.layout import PositionPolicy
from anchor_attn.masks.patterns import Pattern


@dataclass(frozen=True)
class SinkRecord:
    """The first token of one head, over the queries that see it.

    Attributes:
        policy: by name.
        shift: of all positions.
        layer: of the model; None for states of none.
        head: of the query.
        attention: mean weight on the first token, in float64, unshifted.
        mean_abs: mean |drift| of that weight.
        drift_share: of all |drift| of the head's attention; None where nothing drifts.
    """

    policy: str
    shift: int
    layer: int | None
    head: int
    attention: float
    mean_abs: float
    drift_share: float | None

    def record(self) -> dict[str, Any]:
        """As a result file has it."""
        return asdict(self)


def measure_sinks(
    states: States | Sequence[States],
    policy: str | Policy = "bf16_cos_sin",
    shift: int = 1000,
    *,
    queries: Queries = BY_LENGTH,
    layout: PackedLayout | None = None,
    pattern: Pattern = "full",
    position_policy: PositionPolicy = "continuous",
) -> list[SinkRecord]:
    """Measure what the first token of each row gets of the attention, and of its drift.

        max(measure_sinks(states, "bf16_cos_sin", 1000), key=lambda each: each.attention)

    In a packed row the first token is the anchor. The records of `measure_drift(…)` by key hold the same of all heads
    together, in the bin of key 0.

    Args:
        states: of one layer or of several.
        policy: a name of `POLICIES`, or a policy.
        shift: Δ, at least 1.
        queries: as `measure_drift`.
        layout: as `measure_drift`.
        pattern: as `measure_drift`.
        position_policy: as `measure_drift`.

    Returns:
        One a layer and head.

    Raises:
        ValueError: as `measure_drift`.
    """
    layers = list_layers(states)
    chosen = find_policies([policy])[0]
    checked_shifts([shift], max(layer.seq_len for layer in layers), [chosen])
    return [
        record
        for layer in layers
        for record in _records(layer, chosen, shift, View.of(layer, layout, pattern, position_policy, queries))
    ]


def _records(states: States, policy: Policy, shift: int, view: View) -> list[SinkRecord]:
    # Of each head: queries that see the first token, their weights on it, its |drift|, and that of all tokens.
    count, weight, first, total = torch.zeros(4, states.query.shape[1], dtype=torch.float64)
    for part in parts_of(states, view):
        exact, still, moved = (part.rotated(by, each) for by, each in ((0, FP64), (0, policy), (shift, policy)))
        for block in part.blocks():
            visible = part.sees(part.rows[block])
            before, after = (_weights(part, rotated, block, visible, policy) for rotated in (still, moved))
            drift = (after - before).abs()
            count[part.heads] += visible[:, 0].sum()
            weight[part.heads] += _weights(part, exact, block, visible, FP64)[..., 0].sum(dim=1)
            first[part.heads] += drift[..., 0].sum(dim=1)
            total[part.heads] += drift.sum(dim=(1, 2))
    if not count.any():
        raise ValueError(
            "queries must include one that sees the first token, got none; pass queries=None, or another pattern."
        )
    return [
        SinkRecord(
            policy=policy.name,
            shift=shift,
            layer=states.layer,
            head=head,
            attention=float(weight[head] / count[head]),
            mean_abs=float(first[head] / count[head]),
            drift_share=float(first[head] / total[head]) if total[head] else None,
        )
        for head in range(len(count))
    ]


def _weights(part: Part, rotated: tuple[Tensor, Tensor], block: slice, visible: Tensor, policy: Policy) -> Tensor:
    return part.weights(part.scores(rotated, block, policy), visible, policy)
