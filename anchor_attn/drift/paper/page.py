"""What the paper's protocol gave: tables, pictures and paper.html."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anchor_attn.drift.pages.draw import FLOOR_LABEL, style_of
from anchor_attn.drift.pages.numbers import brief, percent
from anchor_attn.drift.pages.page import add_provenance, add_sections
from anchor_attn.drift.pages.sections import Section
from anchor_attn.drift.paper.claims import judge_paper
from anchor_attn.drift.paper.report import PaperReport
from anchor_attn.drift.policies import FP64
from anchor_attn.page import Page, require_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DEFINITION = (
    "D is Eq 4 of arXiv 2411.13476: for every key the mean over its queries of the difference of attention between "
    "positions moved by Δ1 and by Δ2, summed over keys; signed as printed, and of absolute differences. D_logit is "
    "Eq 5, the difference of the first key's scores."
)


def paper_sections(report: PaperReport) -> list[Section]:
    """Against Δ1, against the length, and what becomes of the paper's claims."""
    settings = report.settings
    length, delta2, delta1 = settings["length"], settings["delta2"], settings["lengths_delta1"]
    policies = [policy for policy in settings["policies"] if policy != FP64.name]
    by_delta = [[f"{one:,}", *_cells(report, policies, length=length, delta1=one)] for one in settings["deltas1"]]
    by_length = [
        [f"{tokens:,}", *_cells(report, policies, length=tokens, delta1=delta1)] for tokens in settings["lengths"]
    ]
    columns = [f"{policy}\n{measure}" for policy in policies for measure in ("D", "D abs", "D_logit")]
    claims = judge_paper(report)
    return [
        Section(
            f"D against Δ1: {length:,} tokens, Δ2 = {delta2}", ("Δ1", *columns, "floor\nD abs"), by_delta,
            f"sequences: {settings['sequences']}, layers: {settings['layers']}; means over both; D_logit absolute",
        ),
        Section(f"D against the length: Δ1 = {delta1}", ("tokens", *columns, "floor\nD abs"), by_length),
        _first_tokens(report, policies),
        Section(
            "The paper's claims",
            sentences=[str(claim) for claim in claims],
            key="claims",
            records=[claim.record() for claim in claims],
        ),
    ]  # fmt: skip


def write_paper_page(out: Path, report: PaperReport, subject: str, meta: Mapping[str, Any]) -> list[Path]:
    """Write `paper.html` and `paper.png`.

    Args:
        out: folder.
        report: of the protocol.
        subject: what was measured, in words.
        meta: versions, machine, settings.

    Returns:
        The files written.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure = draw_paper_figure(report, subject)
    page = Page("Drift by the paper's protocol")
    page.paragraph(f"Measured: {subject}.")
    page.paragraph(DEFINITION)
    page.figure(figure, "D against Δ1 and against the length, and the difference of each key; dotted is float64.")
    add_sections(page, paper_sections(report))
    add_provenance(page, meta)
    page.write(out / "paper.html")
    figure.savefig(out / "paper.png")
    return [out / "paper.html", out / "paper.png"]


def draw_paper_figure(report: PaperReport, title: str) -> "Figure":
    """Three panels: D abs against Δ1, against the length, and by key, the first token marked.

    Raises:
        ImportError: matplotlib is missing.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    settings = report.settings
    figure = Figure(figsize=(14, 4.8), dpi=150, layout="constrained")
    deltas, lengths, keys = figure.subplots(1, 3)
    for policy in settings["policies"]:
        how: dict[str, Any] = {**style_of(policy), "label": FLOOR_LABEL if policy == FP64.name else policy}
        by_delta = report.select(policy=policy, length=settings["length"])
        moved = [record for record in by_delta if record.delta1 != settings["delta2"]]
        deltas.plot([record.delta1 for record in moved], [record.d_abs for record in moved], **how)
        by_length = report.select(policy=policy, delta1=settings["lengths_delta1"])
        lengths.plot([record.length for record in by_length], [record.d_abs for record in by_length], **how)
        for profile in report.profiles:
            if profile.policy == policy:
                places = range(1, len(profile.attention_abs) + 1)
                keys.plot(places, profile.attention_abs, **{**how, "marker": "", "linewidth": 1.0})
    deltas.set(xlabel="Δ1", title=f"{settings['length']:,} tokens, Δ2 = {settings['delta2']}", ylabel="D abs")
    deltas.set_xscale("symlog", linthresh=20)
    lengths.set(xlabel="tokens", xscale="log", title=f"Δ1 = {settings['lengths_delta1']}", ylabel="D abs")
    keys.axvspan(0.9, 1.1, color="gold", alpha=0.5, linewidth=0)
    keys.set(xlabel="key, counted from 1: the first token", xscale="log", title="by key", ylabel="mean |Δ attention|")
    for axes in (deltas, lengths, keys):
        _finish(axes)
    handles, labels = deltas.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=9, frameon=False)
    figure.suptitle(title, fontsize=11)
    return figure


def _finish(axes: "Axes") -> None:
    axes.set_yscale("log")
    axes.grid(alpha=0.25)


def _first_tokens(report: PaperReport, policies: Sequence[str]) -> Section:
    delta1, rows = report.settings["lengths_delta1"], []
    for tokens in report.settings["lengths"]:
        own = {record.policy: record for record in report.select(length=tokens, delta1=delta1)}
        shares = [percent(own[policy].first_token_share) for policy in policies]
        rows.append([f"{tokens:,}", *shares, percent(own[policies[0]].first_token_attention)])
    header = ("tokens", *(f"{policy}\nof D abs" for policy in policies), "of\nattention")
    return Section("The first token's share", header, rows)


def _cells(report: PaperReport, policies: Sequence[str], **case: int) -> list[str]:
    own = {record.policy: record for record in report.select(**case)}
    cells = [
        brief(value)
        for policy in policies
        for value in (own[policy].d_signed, own[policy].d_abs, own[policy].d_logit_abs)
    ]
    return [*cells, brief(own[FP64.name].d_abs)]
