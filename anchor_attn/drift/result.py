"""A measurement as files have it: pooled over layers, at one length or several, in flat records.

reports of lengths  ──  pool_layers  ──  DriftResult  ──  drift.json, drift.csv  ·  tables  ·  pictures
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from anchor_attn.drift.policies import FP64, Policy
from anchor_attn.drift.report import DriftRecord, DriftReport
from anchor_attn.drift.states import States

# What drift.json calls the records of a breakdown; those of "all" pairs are its `records`.
BREAKDOWNS = {"distance": "distances", "key": "keys", "pair": "pairs"}
SHOWN_POLICY = "bf16_cos_sin"
OVERALL = ("policy", "shift", "seq_len", "mean_abs", "max_abs", "rms", "relative", "floor", "predicted", "pairs")


@dataclass(frozen=True)
class DriftResult:
    """All that was measured of one subject.

    Attributes:
        reports: by length in tokens, smallest first; the longest is broken down.
        pooled: by length, the same over all layers.
    """

    reports: Mapping[int, DriftReport] = field(repr=False)
    pooled: Mapping[int, Sequence[DriftRecord]] = field(repr=False)

    @classmethod
    def of(cls, reports: Mapping[int, DriftReport]) -> "DriftResult":
        """Of one report a length; one at least."""
        ordered = {length: reports[length] for length in sorted(reports)}
        return cls(ordered, {length: pool_layers(report.records) for length, report in ordered.items()})

    @property
    def lengths(self) -> tuple[int, ...]:
        """In tokens."""
        return tuple(self.reports)

    @property
    def policies(self) -> tuple[str, ...]:
        """By name, float64 last."""
        return tuple(dict.fromkeys(record.policy for record in self.pooled[self.lengths[-1]]))

    @property
    def shifts(self) -> tuple[int, ...]:
        """Smallest first."""
        return tuple(dict.fromkeys(record.shift for record in self.pooled[self.lengths[-1]]))

    @property
    def layers(self) -> tuple[int | None, ...]:
        """Of the model; None of no model."""
        return tuple(dict.fromkeys(record.layer for record in self.reports[self.lengths[-1]].records))

    @property
    def shown_policy(self) -> str:
        """That what is shown of one policy is shown of: what bfloat16 models do, where it was measured."""
        return SHOWN_POLICY if SHOWN_POLICY in self.policies else self.policies[0]

    @property
    def shown_shift(self) -> int:
        """Of whose stages a table is shown: the one in the middle, where bfloat16 and large positions are both seen."""
        return self.shifts[len(self.shifts) // 2]

    def select(self, by: str = "all", length: int | None = None, **fields: Any) -> list[DriftRecord]:
        """Records over all layers.

        Args:
            by: as `DriftRecord`.
            length: the longest when None.
            fields: more of its attributes; level "scores" and stage None where they are not given.
        """
        report = DriftReport(tuple(self.pooled[self.lengths[-1] if length is None else length]))
        return report.select(by, **fields)

    def at(self, policy: str, shift: int, **fields: Any) -> DriftRecord:
        """The one record over all layers of a policy and a shift, at the longest length."""
        return DriftReport(tuple(self.pooled[self.lengths[-1]])).at(policy, shift, **fields)

    def heads(self, policy: str, shift: int, level: str = "scores") -> list[DriftRecord]:
        """Of every layer and head, at the longest length."""
        return self.reports[self.lengths[-1]].select("head", level, policy=policy, shift=shift)

    def lists(self) -> dict[str, list[dict[str, Any]]]:
        """The lists of drift.json: `records` hold each policy, shift and length once, the others break them down."""
        longest = self.lengths[-1]
        report = self.reports[longest]
        whole = [
            {"seq_len": length, **record.record()} for length in self.lengths for record in self.select(length=length)
        ]
        return {
            "records": [{name: record[name] for name in OVERALL} for record in whole],
            "stages": [
                _without(record, "layer", "by", "low", "high") for record in self.pooled[longest] if record.stage
            ],
            "attention": [_without(r, "layer", "by", "low", "high", "stage") for r in self.select(level="attention")],
            **{
                name: [
                    _without(record, "layer", "stage", "by")
                    for record in self.pooled[longest]
                    if record.by == by and record.stage is None
                ]
                for by, name in BREAKDOWNS.items()
            },
            "heads": [
                {"head": record.low, **_without(record, "stage", "by", "low", "high")}
                for level in ("scores", "attention")
                for record in report.select("head", level)
            ],
            "layers": [
                _without(record, "stage", "by", "low", "high")
                for level in ("scores", "attention")
                for record in report.select("all", level)
                if record.layer is not None
            ],
        }

    def flat(self) -> list[dict[str, Any]]:
        """A line a record of every length, layer and breakdown, as drift.csv has them."""
        return [
            {"seq_len": length, **record.record()}
            for length, report in self.reports.items()
            for record in report.records
        ]


def measure_lengths(
    states: Sequence[States], lengths: Sequence[int], measure: Callable[[Sequence[States], bool], DriftReport]
) -> DriftResult:
    """The first tokens of the same states, as many as each length says: a causal model makes no others of less text.

    Args:
        states: a layer each, as long as the longest length.
        lengths: in tokens.
        measure: of states, and whether they are the longest, of which stages are measured too.
    """
    ordered = sorted(set(lengths))
    return DriftResult.of(
        {length: measure([layer.first(length) for layer in states], length == ordered[-1]) for length in ordered}
    )


def pool_layers(records: Iterable[DriftRecord]) -> list[DriftRecord]:
    """The same records over all layers: means over all pairs, the largest of all; heads, which differ, are left out."""
    groups: dict[tuple[Any, ...], list[DriftRecord]] = {}
    for record in records:
        if record.by != "head":
            kind = (record.level, record.policy, record.stage, record.shift)
            groups.setdefault((*kind, record.by, record.low, record.high), []).append(record)
    # Pairs of frequencies are of a sample, whose parts of the drift do not add up to a share of the whole.
    whole = {key[:4]: sum(r.mean_abs * r.pairs for r in group) for key, group in groups.items() if key[4] == "all"}
    return [_pooled(group, whole[key[:4]]) for key, group in groups.items()]


def exceeding(result: DriftResult, limit: float, asked: Iterable[str | Policy] | None = None) -> list[DriftRecord]:
    """Of the policies asked for, or all but float64, the records whose mean is not at most a limit; nan is not."""
    names = (
        [name for name in result.policies if name != FP64.name]
        if asked is None
        else [policy if isinstance(policy, str) else policy.name for policy in asked]
    )
    return [
        record
        for length in result.lengths
        for record in result.select(length=length)
        if record.policy in names and not record.mean_abs <= limit
    ]


def _pooled(group: Sequence[DriftRecord], whole: float) -> DriftRecord:
    if len(group) == 1:
        return replace(group[0], layer=None)
    pairs = sum(record.pairs for record in group)

    def mean(of: Callable[[DriftRecord], float]) -> float:
        return math.fsum(of(record) * record.pairs for record in group) / pairs

    mean_abs, mean_value = mean(lambda record: record.mean_abs), mean(lambda record: record.mean_value)
    is_predicted = all(record.predicted is not None for record in group)
    return replace(
        group[0],
        layer=None,
        pairs=pairs,
        mean_abs=mean_abs,
        max_abs=max((record.max_abs for record in group), key=lambda value: (math.isnan(value), value)),
        rms=math.sqrt(mean(lambda record: record.rms**2)),
        relative=mean_abs / mean_value if mean_value else None,
        mean_value=mean_value,
        share=None if group[0].share is None or not whole else mean_abs * pairs / whole,
        floor=mean(lambda record: record.floor),
        predicted=mean(lambda record: record.predicted or 0.0) if is_predicted else None,
    )


def _without(record: DriftRecord | Mapping[str, Any], *names: str) -> dict[str, Any]:
    content = record.record() if isinstance(record, DriftRecord) else dict(record)
    return {name: value for name, value in content.items() if name not in names}
