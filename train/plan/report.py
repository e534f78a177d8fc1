"""A plan as tables, as a picture and as a page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anchor_attn.masks import PATTERNS
from anchor_attn.page import Page, require_matplotlib
from anchor_attn.train.plan.calibration import Prediction
from anchor_attn.train.plan.findings import short
from anchor_attn.train.plan.memory import USABLE
from anchor_attn.train.plan.records import StepPlan
from anchor_attn.train.plan.schemes import SCHEMES
from anchor_attn.train.plan.training import TrainingPlan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAPERS_TOKENS = 65_536
BY_LENGTH = ("tokens a row", "pairs kept", "attention", "full s", "intra_doc s", "anchor s", "saved", "memory GB")
BY_SCHEME = (
    "scheme",
    "pattern",
    "ranks",
    "step s",
    "saved",
    "MFU",
    "memory GB",
    "attn. GB",
    "weights GB",
    "uneven",
)
BY_PREDICTION = ("tokens a row", "pattern", "measured s", "predicted s", "error")
COLORS = {"full": "black", "intra_doc": "tab:blue", "anchor": "tab:orange"}
DASHES = {"data": ":", "document": "-", "ulysses": "--", "all_gather": "-."}
MARKERS = {"data": (".", 4), "document": ("s", 5), "ulysses": ("o", 8), "all_gather": ("x", 5)}


def describe_plan(plan: TrainingPlan) -> str:
    """What was planned, in a line."""
    cluster, shape = plan.cluster, plan.shape
    return (
        f"{shape.name}, {_parameters(shape.parameters)} parameters, on {cluster.devices:,} × {cluster.device.name}; "
        f"{cluster.rows:,} rows a step, {_ranks(plan)} ranks a row where rows are shared; documents: "
        f"{plan.documents.name}"
    )


def _ranks(plan: TrainingPlan) -> str:
    """Of the cluster, or those that were chosen: "8", "8 to 32"."""
    if plan.cluster.ranks_a_row is not None:
        return f"{plan.cluster.ranks_a_row:,}"
    chosen = {step.ranks_a_row for step in plan.steps if step.scheme != "data" and not step.left_out}
    return " to ".join(f"{ranks:,}" for ranks in sorted({min(chosen), max(chosen)})) if chosen else "no"


def _parameters(count: int) -> str:
    return f"{count / 1e9:.3g}B" if count >= 1e9 else f"{count / 1e6:.3g}M"


def describe_assumptions(plan: TrainingPlan) -> list[str]:
    """What the seconds rest on."""
    cluster = plan.cluster
    return [
        f"Rates: {cluster.rates.source}, which is {cluster.rates.dense_flops_per_s / 1e12:,.3g} and "
        f"{cluster.rates.attention_flops_per_s / 1e12:,.3g} TFLOP/s.",
        f"Compute in {cluster.dtype}, states in float32 sharded over all devices; a plan fits when "
        f"{100 * USABLE:.0f} % of the device's memory hold it. * marks what does not.",
        "Seconds are of the slowest rank, row by row. Weights travel behind compute, attention's exchange does not.",
        f"Rows were drawn, {', '.join(sorted({str(len(rows)) for rows in plan.rows.values()}))} of each length; a step "
        "with more of them repeats these.",
    ]


def lines_by_length(plan: TrainingPlan) -> list[tuple[str, ...]]:
    """A line a length, as `BY_LENGTH`: every pattern under the scheme that is fastest for it."""
    return [_line_of(plan, seq_len) for seq_len in plan.seq_lens]


def _line_of(plan: TrainingPlan, seq_len: int) -> tuple[str, ...]:
    full, anchor = plan.step(seq_len, "data", "full"), plan.step(seq_len, "data", "anchor")
    fastest, saving = plan.fastest(seq_len, "anchor"), plan.saving(seq_len)
    return (
        short(seq_len),
        f"{100 * anchor.pairs_of_full:.1f} %",
        f"{100 * full.attention_of_forward:.0f} %",
        *(_timed(plan.fastest(seq_len, pattern)) for pattern in PATTERNS),
        "–" if saving is None else _percent(saving),
        "–" if fastest is None else _memory(fastest),
    )


def _timed(step: StepPlan | None) -> str:
    return "–" if step is None or step.step_s is None else f"{_seconds(step.step_s)} {step.scheme}"


def _memory(step: StepPlan) -> str:
    if step.memory_bytes is None:
        return "–"
    return f"{step.memory_bytes / 1e9:,.3g}{'c' if step.checkpointing else ''}{'' if step.fits else ' *'}"


def _percent(share: float) -> str:
    return f"{round(100 * share)} %"  # an int has no minus zero


def _seconds(seconds: float) -> str:
    return f"{seconds:,.0f}" if seconds >= 100 else f"{seconds:.3g}"


def detailed_length(plan: TrainingPlan) -> int:
    """The length whose schemes are listed: the paper's 64K where it was planned, else the longest."""
    return PAPERS_TOKENS if PAPERS_TOKENS in plan.seq_lens else plan.seq_lens[-1]


def lines_by_scheme(plan: TrainingPlan, seq_len: int) -> list[tuple[str, ...]]:
    """A line a scheme and pattern, as `BY_SCHEME`."""
    steps = [plan.step(seq_len, scheme, pattern) for scheme in SCHEMES for pattern in PATTERNS]
    return [_scheme_line(step) for step in steps if step.step_s is not None]


def _scheme_line(step: StepPlan) -> tuple[str, ...]:
    return (
        step.scheme,
        step.pattern,
        f"{step.ranks_a_row:,}",
        _seconds(step.step_s or 0.0),
        "–" if step.saving_of_full is None else _percent(step.saving_of_full),
        "–" if step.mfu is None else f"{100 * step.mfu:.0f} %",
        _memory(step),
        f"{(step.attention_received_bytes or 0) / 1e9:,.3g}",
        f"{(step.weights_received_bytes or 0) / 1e9:,.3g}",
        f"{max(0.0, 100 * (step.imbalance or 0)):.1f} %",
    )


def reasons(plan: TrainingPlan, seq_len: int) -> list[str]:
    """Why schemes were left out at a length, once each, and where documents are not shared that should be."""
    absent: dict[str, list[str]] = {}
    for step in plan.steps:
        if step.seq_len == seq_len and step.left_out:
            absent.setdefault(step.left_out, []).append(f"{step.pattern} under {step.scheme}")
    whole = [step for step in plan.steps if step.seq_len == seq_len and step.kept_whole]
    unbalanced = ", ".join(
        f"{step.pattern} {100 * (step.imbalance or 0):.0f} % on {step.ranks_a_row:,} ranks" for step in whole
    )
    return [
        *(f"Left out: {', '.join(names)}: {reason}" for reason, names in absent.items()),
        *([f"Under document no document is shared, as the ranks of a row do not divide the {plan.shape.num_heads} "
           f"heads: compute is unbalanced by {unbalanced}."] if whole else []),
    ]  # fmt: skip


def lines_of_predictions(predictions: Sequence[Prediction]) -> list[tuple[str, ...]]:
    """A line a measured step, as `BY_PREDICTION`."""
    return [
        (
            short(found.seq_len),
            found.pattern,
            _seconds(found.measured_s),
            _seconds(found.predicted_s),
            "calibrated" if found.is_calibration else f"{100 * found.error:+.0f} %",
        )
        for found in predictions
    ]


def draw_plan(plan: TrainingPlan) -> "Figure":
    """Seconds of a step by length and scheme, the share of attention, and what the anchor's mask saves.

    Raises:
        ImportError: matplotlib is missing.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    seconds, shares = figure.subplots(1, 2)
    _draw_seconds(seconds, plan)
    full = [plan.step(seq_len, "data", "full") for seq_len in plan.seq_lens]
    shares.plot(plan.seq_lens, [100 * step.attention_of_forward for step in full], color="black", marker="o",
                markersize=3, label="attention of full's forward, operations")  # fmt: skip
    saved = [(seq_len, 100 * saving) for seq_len in plan.seq_lens if (saving := plan.saving(seq_len)) is not None]
    if saved:
        shares.plot(*zip(*saved, strict=True), color="tab:orange", marker="o", markersize=3,
                    label="what anchor saves of full's step")  # fmt: skip
    shares.axhline(50, color="grey", linewidth=0.8, linestyle=":")
    shares.set_ylabel("%")
    shares.set_ylim(min(0.0, *(value for _, value in saved), 0.0), 100)
    for axis in (seconds, shares):
        axis.set_xscale("log", base=2)
        axis.set_xlim(min(plan.seq_lens) / 1.4, max(plan.seq_lens) * 1.4)  # room for what stands at the ends
        axis.set_xticks(plan.seq_lens, [short(seq_len) for seq_len in plan.seq_lens])
        axis.minorticks_off()
        axis.set_xlabel("tokens a row")
        axis.grid(alpha=0.25)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8, frameon=False)
    figure.suptitle(describe_plan(plan), fontsize=10)
    return figure


def _draw_seconds(axis: "Axes", plan: TrainingPlan) -> None:
    """A line a scheme and pattern; lines that lie on each other show by markers of their own size and shape."""
    for scheme in SCHEMES:
        for pattern in PATTERNS:
            steps = [plan.step(seq_len, scheme, pattern) for seq_len in plan.seq_lens]
            points = [(step.seq_len, step.step_s) for step in steps if step.step_s is not None and step.fits]
            if points and pattern != "intra_doc":  # its line lies on anchor's
                marker, size = MARKERS[scheme]
                axis.plot(*zip(*points, strict=True), label=f"{pattern}, {scheme}", color=COLORS[pattern],
                          linestyle=DASHES[scheme], linewidth=1, marker=marker, markersize=size,
                          markerfacecolor="none")  # fmt: skip
    axis.set_yscale("log")
    axis.set_ylabel("seconds a step, where it fits the memory")
    for seq_len in plan.seq_lens:
        if not any(step.fits for step in plan.steps if step.seq_len == seq_len and step.pattern != "intra_doc"):
            # In data units across and in the axis's own up and down: there is no line to stand beside.
            axis.text(seq_len, 0.5, "nothing fits the memory", transform=axis.get_xaxis_transform(), rotation=90,
                      ha="center", va="center", fontsize=8, color="grey")  # fmt: skip


def write_page(
    path: Path,
    plan: TrainingPlan,
    findings: Sequence[str],
    predictions: Sequence[Prediction],
    meta: Mapping[str, Any],
    figure: "Figure",
) -> None:
    """Write the plan as one HTML file."""
    page, seq_len = Page("What a training step would cost"), detailed_length(plan)
    page.paragraph(describe_plan(plan))
    page.figure(figure, "Seconds of a step, and what the mask saves, by length of the row")
    page.heading("What follows")
    page.bullets(findings)
    page.heading("By length")
    page.paragraph(
        "Each pattern under the scheme that is fastest for it. Attention: of full's forward. c: with checkpointing."
    )
    page.table(BY_LENGTH, lines_by_length(plan))
    page.heading(f"By scheme, at {short(seq_len)}")
    page.paragraph("Attn. and weights: what a rank receives in a step.")
    page.table(BY_SCHEME, lines_by_scheme(plan, seq_len))
    page.bullets(reasons(plan, seq_len))
    if predictions:
        page.heading("Measured here, and foretold")
        page.table(BY_PREDICTION, lines_of_predictions(predictions))
    page.heading("Assumptions")
    page.bullets(describe_assumptions(plan))
    version = meta["versions"]["anchor-attn"]
    page.paragraph(f"Peaks: {plan.cluster.device.source}. anchor-attn {version}, seed {meta['seed']}.")
    page.write(path)
