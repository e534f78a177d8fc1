"""Parts of a report of drift on what can be chosen: a setting of `wrap`, a base and an extension method."""

from collections.abc import Sequence

from anchor_attn.drift.models.fix import BEFORE, FixRecord
from anchor_attn.drift.pages.findings import ALIKE
from anchor_attn.drift.pages.numbers import brief, name_shift, percent
from anchor_attn.drift.pages.sections import Section
from anchor_attn.drift.policies import FP64
from anchor_attn.drift.result import DriftResult
from anchor_attn.drift.sweep import SweptRecord
from anchor_attn.rope.precision import ROPE_PRECISIONS

NOT_SWEPT = (
    "Not in it: longrope, whose factors are a model's own (--model measures them), and dynamic, which at one length is "
    "another base."
)
SWEPT_POLICIES = ("bf16_cos_sin", "fp32_rotation", "exact", "fp32")  # of all policies; the files have the others


def describe_fix(records: Sequence[FixRecord], result: DriftResult) -> list[str]:
    """Which setting to take, before and after, and what no setting changes."""
    of = {(record.rope_precision, record.shift): record for record in records}
    shifts = result.shifts
    better = [
        precision
        for precision in ROPE_PRECISIONS
        if any(of[BEFORE, shift].mean_abs > ALIKE * of[precision, shift].mean_abs for shift in shifts)
    ]
    if not better:
        return [
            f"No rope_precision takes {100 - 100 / ALIKE:.0f} % off it at any of these shifts: leave wrap(model) as it "
            f"is. {_what_stays(result, BEFORE)}"
        ]
    least = min(of[precision, shifts[-1]].mean_abs for precision in better)
    # Of those that are alike at the largest shift the last: it is alike at larger ones too.
    best = [precision for precision in better if of[precision, shifts[-1]].mean_abs <= ALIKE * least][-1]
    changes = [
        f"{brief(of[BEFORE, shift].mean_abs)} → {brief(of[best, shift].mean_abs)} at +{name_shift(shift)}"
        for shift in dict.fromkeys((shifts[0], shifts[-1]))
    ]
    said = [f'wrap(model, rope_precision="{best}") takes the drift of scores from {", ".join(changes)}.']
    logits = [of[precision, shifts[-1]].logits_mean_abs for precision in (BEFORE, best)]
    if logits[0] is not None and logits[1] is not None:
        changed = (
            "less" if logits[0] > ALIKE * logits[1] else "more" if logits[1] > ALIKE * logits[0] else "no clear change"
        )
        said.append(
            f"The model's own logits then move by {brief(logits[1])} instead of {brief(logits[0])} at "
            f"+{name_shift(shifts[-1])}: {changed}. The rest of the model rounds as before."
        )
    return [*said, _what_stays(result, best)]


def fix_section(records: Sequence[FixRecord], result: DriftResult) -> Section:
    """Settings × shifts, before and after."""
    of = {(record.rope_precision, record.shift): record for record in records}
    rows = []
    for precision in ROPE_PRECISIONS:
        own = [of[precision, shift] for shift in result.shifts]
        rows.append([f'"{precision}"', *(brief(record.mean_abs) for record in own)])
        if own[0].logits_mean_abs is not None:
            rows.append(["  logits", *(brief(record.logits_mean_abs) for record in own)])
    return Section(
        "The fix: mean |Δ score| under each rope_precision of wrap",
        ("rope_precision", *(f"+{name_shift(shift)}" for shift in result.shifts)),
        rows,
        '"model" is before',
        describe_fix(records, result),
        "fix",
        [record.record() for record in records],
    )


def _what_stays(result: DriftResult, precision: str) -> str:
    """The stage that makes most of what is left under a setting."""
    shift = result.shifts[-1]
    left = result.at(precision, shift).mean_abs
    stages = {r.stage: r.mean_abs for r in result.pooled[result.lengths[-1]]
              if (r.policy, r.shift, r.by, r.level) == (precision, shift, "all", "scores") and r.stage}  # fmt: skip
    worst = max(stages, key=lambda stage: stages[stage])
    whose = "query and key as they are stored, which no setting changes" if worst == "storage" else worst
    return f"What stays, {brief(left)} at +{name_shift(shift)}, is mostly of {whose}: alone {brief(stages[worst])}."


def sweep_sections(swept: Sequence[SweptRecord]) -> list[Section]:
    """A table a policy: bases and methods × shifts, in per cent of the mean |score|, which YaRN makes larger."""
    shifts = sorted({record.drift.shift for record in swept})
    found = {(record.drift.policy, record.method, record.base, record.drift.shift): record.drift for record in swept}
    sections = []
    for policy in shown_policies(swept):
        rows = [
            [method, f"{base:,.0f}", *(percent(found[policy, method, base, shift].relative, "") for shift in shifts)]
            for method, base in dict.fromkeys((record.method, record.base) for record in swept)
        ]
        heading = f"{policy}: mean |Δ score| in % of the mean |score|"
        sections.append(Section(heading, ["method", "base", *map(name_shift, shifts)], rows))
    return [*sections, Section("What is not swept", sentences=[NOT_SWEPT])]


def shown_policies(swept: Sequence[SweptRecord]) -> list[str]:
    """Those of a sweep that tables and picture show: the four that matter, or where none was swept all but float64."""
    policies = [policy for policy in dict.fromkeys(record.drift.policy for record in swept) if policy != FP64.name]
    return [policy for policy in policies if policy in SWEPT_POLICIES] or policies or [FP64.name]
