"""From sums to records: every figure with its floor, its share and what rounding predicts."""

import math
from collections.abc import Iterator, Mapping, Sequence

from anchor_attn.drift.pipelines import UNNAMED_FP64, Level, Pipeline, Tallied
from anchor_attn.drift.policies import Policy
from anchor_attn.drift.predict import Prediction
from anchor_attn.drift.report import DriftRecord
from anchor_attn.drift.states import States
from anchor_attn.drift.tally import Sums, Tallies


def create_records(
    states: States,
    pipelines: Sequence[Pipeline],
    tallied: Tallied,
    predicted: Mapping[tuple[Policy, int], Prediction],
) -> Iterator[DriftRecord]:
    """The records of a layer.

    Args:
        states: whose layer is meant.
        pipelines: in their order; of a stage alone only the overall figure, at the levels where it can act.
        tallied: full.
        predicted: by pipeline and shift, of scores.

    Raises:
        ValueError: a policy whose numbers became nan or inf.
    """
    for pipeline in pipelines:
        for shift in tallied.shifts:
            for level in pipeline.levels:
                expected = predicted[pipeline.applied, shift] if level == "scores" else None
                yield from _of_level(states, pipeline, shift, level, tallied, expected)


def _of_level(
    states: States, pipeline: Pipeline, shift: int, level: Level, tallied: Tallied, expected: Prediction | None
) -> Iterator[DriftRecord]:
    drifts, floors = (tallied.drifts[policy, shift, level] for policy in (pipeline.applied, UNNAMED_FP64))
    sizes = tallied.sizes[level]
    whole = float(drifts.overall().total[0])
    if not math.isfinite(whole):
        raise ValueError(
            f"states must stay finite under policy {pipeline.policy.name!r}, got {whole} {level} at shift {shift:,}: "
            "they are beyond one of its formats; leave it out of policies."
        )

    def record(by: str, place: int, low: int | None, high: int | None) -> DriftRecord:
        sums, floor, size = (_sums(tallies, by) for tallies in (drifts, floors, sizes))
        count, total = float(sums.count[place]), float(sums.total[place])
        mean, value = total / count, float(size.total[place]) / count
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
            predicted=None if expected is None else expected.of(by, low),
        )

    yield record("all", 0, None, None)
    if pipeline.stage is not None:
        return
    for head in range(states.query.shape[1]):
        yield record("head", head, head, head)
    for by in ("distance", "key"):
        for place, (low, high) in enumerate(tallied.bins.bounds()):
            if drifts.by[by].count[place]:
                yield record(by, place, low, high)


def _sums(tallies: Tallies, by: str) -> Sums:
    return tallies.overall() if by == "all" else tallies.by[by]
