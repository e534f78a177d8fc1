"""Parts of a report of drift: a table and what it says, the same in the terminal, on the page and in drift.json."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from anchor_attn.drift.pages.findings import describe_findings
from anchor_attn.drift.pages.numbers import brief, name_shift, percent
from anchor_attn.drift.pipelines import Level
from anchor_attn.drift.policies import FP64, STAGES, Stage
from anchor_attn.drift.result import DriftResult

PREDICTED = "  predicted"
FLOOR = f"{FP64.name} (floor)"
SOFTMAX: Stage = "softmax"
# In tables and pictures: the softmax stands behind the scores, and of attention a sentence says what it does.
SHOWN_STAGES = tuple(stage for stage in STAGES if stage != SOFTMAX)
MOST_HEADS = 6


@dataclass(frozen=True)
class Section:
    """A part.

    Attributes:
        heading: above it.
        header: of its table.
        rows: of its table; none for no table.
        note: below the table, how to read it.
        sentences: what it says.
        key: of its records in drift.json; None where `records` and their breakdowns hold them.
        records: flat.
    """

    heading: str
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    note: str | None = None
    sentences: Sequence[str] = ()
    key: str | None = None
    records: Sequence[Mapping[str, Any]] = field(default=(), repr=False)


def list_sections(result: DriftResult, policy: str) -> list[Section]:
    """What a measurement of states has, for any: against shift, against length, stage by stage, by head.

    Args:
        result: of the measurement.
        policy: of the heads.
    """
    stages = (_stages(result, "scores"), _stages(result, "attention"))
    parts = (_shifts(result), _lengths(result), *stages, _heads(result, policy))
    findings = Section("What may be said", sentences=describe_findings(result))
    return [part for part in (*parts, findings) if part is not None]


def _shifts(result: DriftResult) -> Section:
    rows = []
    for policy in result.policies:
        records = result.select(policy=policy)
        rows.append([FLOOR if policy == FP64.name else policy, *(brief(record.mean_abs) for record in records)])
        if policy != FP64.name and any(record.predicted is not None for record in records):
            rows.append([PREDICTED, *(brief(record.predicted) for record in records)])
    size = result.at(FP64.name, result.shifts[0]).mean_value
    return Section(
        "Mean |Δ score| when all positions move",
        ("policy", *(f"+{name_shift(shift)}" for shift in result.shifts)),
        rows,
        f"{result.lengths[-1]:,} tokens; mean |score| {brief(size)}",
    )


def _lengths(result: DriftResult) -> Section | None:
    if len(result.lengths) < 2:
        return None
    shift = result.shown_shift
    rows = [
        [FLOOR if policy == FP64.name else policy, *(
            brief(record.mean_abs)
            for length in result.lengths
            for record in result.select(length=length, policy=policy, shift=shift)
        )]
        for policy in result.policies
    ]  # fmt: skip
    header = ("policy", *(f"{length:,}" for length in result.lengths))
    return Section(f"Mean |Δ score| by tokens of the row, +{name_shift(shift)}", header, rows)


def _stages(result: DriftResult, level: Level) -> Section | None:
    shift, rows = result.shown_shift, []
    for policy in result.policies:
        alone = {
            stage: record.mean_abs
            for stage in SHOWN_STAGES
            for record in result.select(level=level, policy=policy, shift=shift, stage=stage)
        }
        if alone:
            whole = result.at(policy, shift, level=level).mean_abs
            rows.append([policy, brief(whole), *(brief(alone.get(stage)) for stage in SHOWN_STAGES)])
    if not rows:
        return None
    header, note = ("policy", "whole", *SHOWN_STAGES), "–: the policy does not round there"
    if level == "scores":
        return Section(f"Where it comes from: each stage alone, +{name_shift(shift)}", header, rows, note)
    heading = f"Where it comes from, attention weights: each stage alone, +{name_shift(shift)}"
    return Section(heading, header, rows, note, _softmax_alone(result))


def _softmax_alone(result: DriftResult) -> list[str]:
    """What the softmax does to the drift of attention."""
    shift = result.shown_shift
    alone = result.select(level="attention", shift=shift, stage=SOFTMAX)
    if not alone:
        return []
    worst = max(alone, key=lambda record: record.mean_abs)
    return [
        f"softmax alone: {brief(worst.mean_abs)} (floor {brief(worst.floor)}); a shift reaches it only by scores.",
        "It is above the floor where a score stands between two numbers of its format.",
        "Where a policy rounds the weights, that acts on the whole policy.",
    ]


def _heads(result: DriftResult, policy: str) -> Section | None:
    shift = result.shown_shift
    attention = sorted(result.heads(policy, shift, "attention"), key=lambda record: -record.mean_abs)
    if len(attention) < 2:
        return None
    scores = {(record.layer, record.low): record for record in result.heads(policy, shift)}
    rows = []
    for record in attention[:MOST_HEADS]:
        of_scores = scores[record.layer, record.low]
        place = str(record.low) if record.layer is None else f"{record.layer}.{record.low}"
        rows.append(
            [
                place,
                brief(of_scores.mean_abs),
                percent(of_scores.relative),
                brief(record.mean_abs),
                percent(record.relative),
            ]
        )
    first = "head" if attention[0].layer is None else "layer.head"
    left_out = f"; {len(attention) - MOST_HEADS} more in drift.json" if len(attention) > MOST_HEADS else ""
    return Section(
        f"Heads whose attention drifts most, {policy}, +{name_shift(shift)}",
        (first, "Δ score", "of a score", "Δ weight", "of a weight"),
        rows,
        f"means over pairs{left_out}",
    )
