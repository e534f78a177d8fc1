"""What may be said of a measurement, in sentences whose every number is of its records."""

from collections.abc import Sequence

from anchor_attn.drift.pages.numbers import brief, name_shift
from anchor_attn.drift.policies import FP64, STAGES
from anchor_attn.drift.report import DriftRecord
from anchor_attn.drift.result import DriftResult

# What two policies that share a rounding differ by at most; above it one is larger.
ALIKE = 1.25
FIRST_TOKEN = 0
HUGGING_FACE, BEST = "bf16_cos_sin", "exact"
MEANINGS = {
    HUGGING_FACE: "what a bfloat16 model of Hugging Face does",
    "fp32_rotation": "rotated in float32, stored in bfloat16",
}


def describe_findings(result: DriftResult) -> list[str]:
    """What drifts, where it comes from, what `exact` changes, who carries it, and how good the numbers are."""
    said = [
        _where_from(result, result.shown_policy),
        _growing(result),
        _exact(result),
        _first_token(result),
        _instrument(result),
    ]
    return [sentence for sentence in said if sentence is not None]


# --- one sentence each -----------------------------------------------------------------------------------------------


def _where_from(result: DriftResult, policy: str) -> str | None:
    """How large it is against the scores, and which stage alone makes most of it."""
    shift = result.shown_shift
    whole = result.at(policy, shift)
    stages = [stage for stage in STAGES if result.select(policy=policy, shift=shift, stage=stage)]
    known = f" ({MEANINGS[policy]})" if policy in MEANINGS else ""
    share = "" if whole.relative is None else f", {100 * whole.relative:.2g} % of a score"
    text = f"{policy}{known} moves a score by {brief(whole.mean_abs)} on average at +{name_shift(shift)}{share}"
    if not stages:
        return f"{text}."
    alone = {stage: result.at(policy, shift, stage=stage).mean_abs for stage in stages}
    worst = max(alone, key=lambda stage: alone[stage])
    return f"{text}; of its stages alone, {worst} moves it most: {brief(alone[worst])}."


def _growing(result: DriftResult) -> str | None:
    """Which policies are worse at the largest shift than at the smallest, and by how much."""
    first, last = result.shifts[0], result.shifts[-1]
    grown, flat = dict[str, float](), list[str]()
    for policy in result.policies:
        before, after = (result.at(policy, shift).mean_abs for shift in (first, last))
        if policy == FP64.name or not before:
            continue
        if after > ALIKE * before:
            grown[policy] = after / before
        elif after * ALIKE > before:
            flat.append(policy)
    if first == last or not grown:
        return None
    named = ", ".join(f"{policy} {ratio:,.{0 if ratio >= 100 else 1}f} ×" for policy, ratio in grown.items())
    same = f"; the same at any shift: {', '.join(flat)}" if flat else ""
    return f"From +{name_shift(first)} to +{name_shift(last)} it grows: {named}{same}."


def _exact(result: DriftResult) -> str | None:
    """What angles in float64 and a rotation in float32 leave, and what that is."""
    if not {HUGGING_FACE, BEST} <= set(result.policies):
        return None
    changes = []
    for shift in (result.shifts[0], result.shifts[-1]):
        before, after = (result.at(policy, shift).mean_abs for policy in (HUGGING_FACE, BEST))
        changes.append(f"{brief(before)} → {brief(after)} at +{name_shift(shift)}")
    last = result.shifts[-1]
    left, stored = result.at(BEST, last).mean_abs, result.select(policy=BEST, shift=last, stage="storage")
    rest = ""
    if stored and stored[0].mean_abs * ALIKE > left:
        rest = f"; what it leaves is query and key stored in bfloat16, alone {brief(stored[0].mean_abs)}"
    return f"Angles in float64, rotated in float32 ({BEST}): {', '.join(dict.fromkeys(changes))}{rest}."


def _first_token(result: DriftResult) -> str | None:
    """Whether the first token carries more of the drift of attention than of attention."""
    policy, shift = result.shown_policy, result.shown_shift
    first = _bin_of(result.select("key", level="attention", policy=policy, shift=shift), FIRST_TOKEN)
    if first is None or first.share is None:
        return None
    whole = result.at(policy, shift, level="attention")
    weight = first.mean_value * first.pairs / (whole.mean_value * whole.pairs)
    return (
        f"The first token gets {100 * weight:.2g} % of the attention and {100 * first.share:.2g} % of its drift "
        f"({policy}, +{name_shift(shift)})."
    )


def _instrument(result: DriftResult) -> str:
    """How far above the floor everything is, and how far the prediction is off."""
    records = [record for record in result.select() if record.policy != FP64.name]
    floor = max(record.mean_abs for record in result.select() if record.policy == FP64.name)
    text = f"The float64 floor is {brief(floor)} or less at every shift"
    if not records:
        return f"{text}."
    factors = {
        max(record.predicted / record.mean_abs, record.mean_abs / record.predicted): record
        for record in records
        if record.predicted and record.mean_abs
    }
    if not factors:
        return f"{text}."
    off = max(factors)
    return (
        f"{text}; the predicted error is within a factor of {off:.2f} of the measured one everywhere (furthest: "
        f"{factors[off].policy} at +{name_shift(factors[off].shift)})."
    )


def _bin_of(records: Sequence[DriftRecord], low: int) -> DriftRecord | None:
    return next((record for record in records if record.low == low), None)
