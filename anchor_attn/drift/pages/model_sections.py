"""Parts of a report of drift that only a whole model or a packed row has: sinks, moved positions, patterns."""

from collections.abc import Sequence

from anchor_attn.drift.models.shifted import ShiftedRecord, ShiftedReport
from anchor_attn.drift.models.sinks import SinkRecord
from anchor_attn.drift.pages.numbers import brief, brief_ratio, name_shift, percent
from anchor_attn.drift.pages.sections import MOST_HEADS, Section
from anchor_attn.drift.patterns.report import PatternReport

WHOLE_MODEL = "The whole model, the same tokens at moved positions"
PLAIN = ("attention", "continuous", "row")  # of what is said of patterns in words; the rest is in the table


def sinks_section(records: Sequence[SinkRecord]) -> Section:
    """The heads that rest on the first token most."""
    most = sorted(records, key=lambda record: -record.attention)[:MOST_HEADS]
    rows = [
        [
            f"{record.layer}.{record.head}",
            percent(record.attention),
            percent(record.drift_share),
            brief(record.mean_abs),
        ]
        for record in most
    ]
    return Section(
        f"Sinks: the first token, {records[0].policy}, +{name_shift(records[0].shift)}",
        ("layer.head", "of attention", "of its drift", "Δ weight"),
        rows,
        f"of {len(records)} heads those that rest on it most",
        key="sinks",
        records=[record.record() for record in records],
    )


def left_out_section(reason: str) -> Section:
    """In the place of the whole model, why it was not measured."""
    return Section(WHOLE_MODEL, sentences=[reason])


def shifted_section(report: ShiftedReport, left_out: str = "") -> Section:
    """The whole model at shifted positions, in every dtype, and what is left once nothing is rounded.

    Args:
        report: of the model.
        left_out: dtypes that were not measured, and why.
    """
    logits = [record for record in report.records if record.layer is None]
    last = {_run(record): record for record in report.records if record.layer is not None}
    rows = [
        [
            f"{record.dtype}, {record.rope_precision}",
            f"+{name_shift(record.shift)}",
            brief(last[_run(record)].hidden_rel_rms),
            brief(record.logits_mean_abs),
            brief(record.kl_nats),
            percent(record.top1_changed),
        ]
        for record in logits
    ]
    sentences = []
    has_floor = any(record.dtype == "float64" for record in logits)
    for shift in dict.fromkeys(record.shift for record in logits if has_floor):
        dtype = logits[0].dtype
        share = report.architectural_share(shift, dtype)
        if share is not None:
            sentences.append(
                f"At +{name_shift(shift)}, {percent(share)} of what {dtype}, model moves the logits by is left in "
                f"float64, {report.exact_precision()}: "
                + ("rounding." if share < 0.01 else "that share is the model's own, not rounding.")
            )
    return Section(
        WHOLE_MODEL,
        ("dtype, rope", "shift", "hidden", "logits", "KL, nats", "top-1"),
        rows,
        "hidden: rms of the last states' change over their own; logits: mean |Δ|; top-1: likeliest tokens that change",
        [*sentences, *([f"{left_out[0].upper()}{left_out[1:]}."] if left_out else [])],
        "shifted",
        [record.record() for record in report.records],
    )


def patterns_section(report: PatternReport, policy: str) -> Section:
    """Does the anchor reduce it?"""
    shift = max(report.settings["shifts"])
    compared = [
        one for one in report.compare(policy=policy, shift=shift, pattern="anchor") if one.reference != "anchor"
    ]
    rows = [
        [
            f"{one.level}, {one.position_policy}, {one.moved}",
            one.reference,
            brief(one.reference_mean),
            brief(one.mean),
            brief_ratio(one.ratio),
            one.verdict,
        ]
        for one in compared
    ]
    return Section(
        f"Does the anchor reduce it? {policy}, moved by {name_shift(shift)}",
        ("drift of, positions, moved", "against", "there", "anchor", "ratio", "anchor … it"),
        rows,
        "scores weighted by attention; all of the row is moved, or the documents behind an anchor that stays; a "
        f"verdict is at 95 % over all {compared[0].comparisons} comparisons of the report together (Bonferroni)",
        [str(one) for one in compared if (one.level, one.position_policy, one.moved) == PLAIN],
        key="patterns",
        records=[
            *({"kind": "pattern", **record.record()} for record in report.records),
            *({"kind": "comparison", **one.record()} for one in report.comparisons),
        ],
    )


def _run(record: ShiftedRecord) -> tuple[str, str, int]:
    return record.dtype, record.rope_precision, record.shift
