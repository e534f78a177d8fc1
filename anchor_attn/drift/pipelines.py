"""Policies and stages alone, run over a part of a layer: what they have in common is computed once.

    rotated q and k    of a policy's first four stages, once a shift
    scores             once an accumulation
    weights            once a softmax

Unshifted scores and weights are held meanwhile.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from anchor_attn.drift.parts import Part
from anchor_attn.drift.policies import FP64, Policy, Rounding, Stage, multiply_read, read
from anchor_attn.drift.states import States
from anchor_attn.drift.tally import Bins, Pairs, Tallies

Level = Literal["scores", "attention"]
LEVELS: tuple[Level, ...] = ("scores", "attention")


@dataclass(frozen=True)
class Pipeline:
    """A policy, or one stage of it in float64."""

    policy: Policy
    stage: Stage | None = None

    @property
    def applied(self) -> Policy:
        """What is computed with, without a name: two policies that round a stage alike share it."""
        return replace(self.policy if self.stage is None else self.policy.alone(self.stage), name="")

    @property
    def levels(self) -> tuple[Level, ...]:
        """Where it can act: the softmax stands behind the scores."""
        return ("attention",) if self.stage == "softmax" else LEVELS


UNNAMED_FP64 = Pipeline(FP64).applied


@dataclass(frozen=True)
class Tallied:
    """The sums of a measurement.

    Attributes:
        bins: of distances and keys.
        shifts: of all positions, in tokens.
        drifts: of each pipeline, shift and level.
        sizes: of scores and weights in float64, unshifted, by level.
    """

    bins: Bins
    shifts: tuple[int, ...]
    drifts: dict[tuple[Policy, int, Level], Tallies]
    sizes: dict[Level, Tallies]

    @classmethod
    def of(cls, states: States, pipelines: Sequence[Pipeline], shifts: Sequence[int]) -> "Tallied":
        """Empty ones; stages alone without distances and keys."""
        bins, heads = Bins.below(states.seq_len), states.query.shape[1]
        detailed = {pipeline.applied for pipeline in pipelines if pipeline.stage is None}
        asked = dict.fromkeys((pipeline.applied, level) for pipeline in pipelines for level in pipeline.levels)
        drifts = {
            (applied, shift, level): Tallies(heads, bins, bins, applied in detailed)
            for applied, level in asked
            for shift in shifts
        }
        return cls(bins, tuple(shifts), drifts, {level: Tallies(heads, bins, bins, True) for level in LEVELS})

    @property
    def asked(self) -> dict[Policy, None]:
        """What is computed with, in order."""
        return dict.fromkeys(policy for policy, _, _ in self.drifts)


def measure_part(part: Part, tallied: Tallied) -> None:
    """Add the drift of all pipelines.

    Args:
        part: whose scores can be held.
        tallied: to add to.
    """
    blocks = list(part.blocks())
    pairs = [Pairs(part.sees(part.rows[block]), part.rows[block], tallied.bins, tallied.bins) for block in blocks]
    for turning, by_accumulation in _grouped(list(tallied.asked)).items():
        still: dict[tuple[Policy, int], dict[Level, Tensor]] = {}
        for shift in (0, *tallied.shifts):
            rotated = part.rotated(shift, turning)
            for policies in by_accumulation.values():
                query, key = (read(x, policies[0]) for x in rotated)
                for block, seen in zip(blocks, pairs, strict=True):
                    scores = multiply_read(query[:, block], key, part.states.score_scale, policies[0])
                    for policy in policies:
                        weights = part.weights(scores, seen.visible, policy)
                        found: dict[Level, Tensor] = {"scores": scores, "attention": weights}
                        if shift == 0:
                            still[policy, block.start] = found
                        _tally(found, still[policy, block.start], seen, part.heads, tallied, policy, shift)


def _grouped(asked: Sequence[Policy]) -> dict[Policy, dict[Rounding, list[Policy]]]:
    """By what they share: the rotation, and of one rotation the accumulation."""
    groups: dict[Policy, dict[Rounding, list[Policy]]] = {}
    for policy in asked:
        turning = replace(policy, accumulation="float64", softmax="float64")
        groups.setdefault(turning, {}).setdefault(policy.accumulation, []).append(policy)
    return groups


def _tally(
    found: dict[Level, Tensor],
    still: dict[Level, Tensor],
    seen: Pairs,
    heads: slice,
    tallied: Tallied,
    policy: Policy,
    shift: int,
) -> None:
    for level in LEVELS:
        if (policy, shift, level) in tallied.drifts:
            magnitudes = (found[level] - still[level]).abs_().masked_fill_(seen.hidden, 0.0)
            seen.tally(magnitudes, heads, tallied.drifts[policy, shift, level])
        elif not shift and policy == UNNAMED_FP64:
            seen.tally(still[level].abs().masked_fill_(seen.hidden, 0.0), heads, tallied.sizes[level])
