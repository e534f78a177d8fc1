"""The drift of scores that rounding is expected to cause: of a sample of pairs, by head and by bins of keys."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anchor_attn.drift.policies import Policy, Stage, find_policies
from anchor_attn.drift.rounding import RoundingModel
from anchor_attn.drift.states import States
from anchor_attn.drift.tally import Bins
from anchor_attn.drift.view import View

SAMPLED_PER_BIN = 64


@dataclass(frozen=True)
class Expected:
    """Of the drift of some pairs."""

    mean_abs: float
    rms: float


@dataclass(frozen=True)
class Prediction:
    """The drift of scores that rounding is expected to cause.

    Attributes:
        all: of all pairs.
        heads: of each head.
        keys: of each bin of key places, by its first; bins of which no pair was sampled are missing.
    """

    all: Expected
    heads: tuple[Expected, ...]
    keys: Mapping[int, Expected]

    @property
    def mean_abs(self) -> float:
        """Mean of |drift|."""
        return self.all.mean_abs

    @property
    def rms(self) -> float:
        """Root of the mean square."""
        return self.all.rms

    def of(self, by: str, low: int | None) -> float | None:
        """The mean of |drift| beside a record's; None where none is predicted."""
        if by == "all":
            return self.all.mean_abs
        if by == "head" and low is not None:
            return self.heads[low].mean_abs
        found = self.keys.get(low) if by == "key" and low is not None else None
        return None if found is None else found.mean_abs


def predict_drift(
    states: States, policy: str | Policy, shift: int, view: View | None = None, stage: Stage | None = None
) -> Prediction:
    """What the scores of a policy are expected to drift by.

        predict_drift(random_states(), "exact", 1_000).mean_abs      2.6e-3

    Args:
        states: query and key.
        policy: by name, or any `Policy`.
        shift: of all positions.
        view: which pairs; all of a causal row when None.
        stage: alone, in float64; None for the whole policy.

    Raises:
        ValueError: an unknown policy.
    """
    found = find_policies([policy])[0]
    applied = found if stage is None else found.alone(stage)
    return predict_all(states, [applied], [shift], view or View.of(states))[applied, shift]


def predict_all(
    states: States, policies: Sequence[Policy], shifts: Sequence[int], view: View
) -> dict[tuple[Policy, int], Prediction]:
    """The predictions of several policies and shifts; what they have in common is computed once.

    Args:
        states: query and key.
        policies: as they are applied.
        shifts: of all positions.
        view: which pairs.
    """
    bins = Bins.below(states.seq_len)
    batch, heads = states.query.shape[:2]
    samples = [view.sample(row, bins, SAMPLED_PER_BIN) for row in range(batch)]
    # Each pair as often as it stands for, its bin and its head.
    weights = torch.cat([sample.weights.repeat(heads) for sample in samples])
    places = torch.cat([sample.bins.repeat(heads) for sample in samples])
    owners = torch.cat([torch.arange(heads).repeat_interleave(len(sample.bins)) for sample in samples])
    found = {}
    for shift in shifts:
        models = [
            RoundingModel.of(states, row, head, view.position_ids[row], shift, sample)
            for row, sample in enumerate(samples)
            for head in range(heads)
        ]
        for policy in policies:
            columns = zip(*(model.drift(policy) for model in models), strict=True)
            size, square = (torch.cat(column) for column in columns)

            def gather(which: Tensor, size: Tensor = size, square: Tensor = square) -> Expected:
                share = weights[which] / weights[which].sum()
                return Expected(float((size[which] * share).sum()), math.sqrt(float((square[which] * share).sum())))

            found[policy, shift] = Prediction(
                all=gather(torch.ones_like(places, dtype=torch.bool)),
                heads=tuple(gather(owners == head) for head in range(heads)),
                keys={low: gather(places == p) for p, (low, _) in enumerate(bins.bounds()) if (places == p).any()},
            )
    return found
