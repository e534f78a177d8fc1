"""Which frequency pair drifts: each pair's share of a score is two products, and moves by its own.

score = scale · Σ_i (q'_i · k'_i)  +  what is not rotated
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from anchor_attn.drift.policies import FP64, Policy, read, rotate
from anchor_attn.drift.report import DriftRecord
from anchor_attn.drift.states import States
from anchor_attn.drift.tally import Bins
from anchor_attn.drift.view import TokenPairs, View

SAMPLED_PAIRS = 1024
FEWEST_A_HEAD = 32


def pair_contributions(
    states: States, policy: Policy, row: int, head: int, position_ids: Tensor, sample: TokenPairs
) -> Tensor:
    """What each frequency pair adds to the score of a query and a key, before their sum is rounded, float64 [N, R/2].

    Args:
        states: query and key.
        policy: of all stages but the sum of an accumulation.
        row: of the batch.
        head: of the query.
        position_ids: of the row, int64 [S].
        sample: N queries and the keys that they meet.
    """
    ends = (states.query[row, head], sample.queries), (states.key[row, head // states.repeats], sample.keys)
    query, key = (read(rotate(x[places], position_ids[places], states, policy), policy).double() for x, places in ends)
    (_, qx, qy, _), (_, kx, ky, _) = states.split(query), states.split(key)
    return (qx * kx + qy * ky) * states.score_scale


def measure_spectrum(
    states: States, policies: Sequence[Policy], shifts: Sequence[int], view: View
) -> list[DriftRecord]:
    """Records by frequency pair, of a sample of visible pairs of a query and a key.

    Args:
        states: query and key.
        policies: float64 last.
        shifts: checked.
        view: which pairs.
    """
    batch, heads = states.query.shape[:2]
    each = max(FEWEST_A_HEAD, SAMPLED_PAIRS // (batch * heads))
    samples = [view.sample(row, Bins((0, states.seq_len)), each) for row in range(batch)]

    def contributions(policy: Policy, shift: int) -> Tensor:
        return torch.cat(
            [
                pair_contributions(states, policy, row, head, view.position_ids[row] + shift, sample)
                for row, sample in enumerate(samples)
                for head in range(heads)
            ]
        )

    drifts: dict[tuple[str, int], Tensor] = {}
    for policy in policies:
        still = contributions(policy, 0)
        for shift in shifts:
            drifts[policy.name, shift] = (contributions(policy, shift) - still).abs()
    values = still.abs().mean(0)  # of float64, which is last
    return [
        record
        for (name, shift), drift in drifts.items()
        for record in _records(states, name, shift, drift, drifts[FP64.name, shift], values)
    ]


def _records(
    states: States, policy: str, shift: int, drift: Tensor, floor: Tensor, values: Tensor
) -> list[DriftRecord]:
    means, floors, whole = drift.mean(0).tolist(), floor.mean(0).tolist(), float(drift.mean(0).sum())
    largest, squares = drift.amax(0).tolist(), drift.square().mean(0).tolist()
    return [
        DriftRecord(
            level="scores",
            policy=policy,
            stage=None,
            shift=shift,
            layer=states.layer,
            by="pair",
            low=pair,
            high=pair,
            pairs=len(drift),
            mean_abs=mean,
            max_abs=largest[pair],
            rms=math.sqrt(squares[pair]),
            relative=mean / value if value else None,
            mean_value=value,
            share=mean / whole if whole else None,
            floor=floors[pair],
        )
        for pair, (mean, value) in enumerate(zip(means, values.tolist(), strict=True))
    ]
