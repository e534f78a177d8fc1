"""What a comparison says: a table for the terminal, pictures, and one HTML page."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from anchor_attn.page import Page, require_matplotlib
from anchor_attn.train.run import WARM_UP_STEPS, Arm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from anchor_attn.train.compare import Result

HEADER = ("arm", "pairs", "step s", "of full", "loss", "held-out", "packed", "tokens/s", "peak MB")
LOSSES = ("loss", "held_out_loss", "held_out_loss_packed")
SMOOTHING_STEPS = 10


def table_rows(result: "Result") -> list[list[str]]:
    """A row an arm under `HEADER`: medians of times, means of losses over the seeds, with ± one standard deviation."""
    rows = []
    base = _time_base(result)
    for arm in result.arms:
        records = result.of_arm(arm)
        step_s = float(np.median([record["step_s"] for record in records]))
        rows.append(
            [
                arm,
                f"{100 * np.mean([record['pairs_of_full'] for record in records]):.0f} %",
                f"{step_s:.2f}",
                f"{100 * step_s / base:.0f} %" if base else "–",
                *(_mean_and_spread([record[key] for record in records]) for key in LOSSES),
                f"{np.median([record['tokens_per_s'] for record in records]):,.0f}",
                f"{max(record['peak_bytes'] for record in records) / 2**20:,.0f}",
            ]
        )
    return rows


def findings(result: "Result") -> list[str]:
    """What may be said, one sentence each; "no difference seen" where an interval includes zero."""
    unigram = result.meta["unigram_loss"]
    losses = [record["held_out_loss"] for record in result.records]
    diverged = [f"{record['arm']} of seed {record['seed']}" for record, loss in zip(result.records, losses, strict=True)
                if not math.isfinite(loss)]  # fmt: skip
    if diverged:
        sentences = [f"Diverged, its loss is no number: {', '.join(diverged)}."]
    else:
        learned = "all arms learned" if max(losses) < unigram else "not every arm learned more than token frequencies"
        sentences = [
            f"Held-out loss {min(losses):.3f} … {max(losses):.3f} nats a token; token frequencies alone give "
            f"{unigram:.3f}: {learned}."
        ]
    differences = result.differences()
    sentences += [f"Held-out: {difference}." for difference in differences]
    if len(differences) > 1 and differences[0].low is not None:
        sentences.append(f"{len(differences)} pairs, each at 95 % by itself: one in twenty errs by chance.")
    for arm in result.arms:
        if Arm.parse(arm).pattern == "intra_doc" and not Arm.parse(arm).bos_per_document:
            as_trained = float(np.mean([record["held_out_loss_as_trained"] for record in result.of_arm(arm)]))
            sentences.append(
                f"{arm} meets the anchor in the held-out loss for the first time; the same documents under its own "
                f"mask, which does not show it, give {as_trained:.3f}."
            )
    if len(result.meta["seeds"]) == 1:
        sentences.append("One seed: differences in loss may be chance. Pass --seeds 3 or more for an interval.")
    return sentences


def write_report(result: "Result", out: Path) -> list[Path]:
    """Write `report.html` and the PNGs in it.

    Returns:
        The files written, the page first.

    Raises:
        ImportError: matplotlib is missing.
    """
    require_matplotlib("the report")
    figures = {
        "masks": (_draw_masks(result), "The first training row under each pattern: who attends to whom."),
        "loss": (_draw_losses(result), f"Training loss, mean of {SMOOTHING_STEPS} steps, against tokens and seconds."),
        "step_time": (_draw_step_times(result), "Seconds a step, and what the attended pairs alone would suggest."),
        "held_out": (_draw_by_position(result), "Held-out loss by place in the document, each document alone."),
    }
    meta = result.meta
    page = Page("Full, intra-document and anchor attention")
    page.paragraph(
        f"{', '.join(result.arms)} on {meta['corpus']['source']}: {meta['settings']['steps']} steps of "
        f"{meta['settings']['batch_size']} × {meta['settings']['seq_len']:,} tokens, seeds "
        f"{', '.join(map(str, meta['seeds']))}, model {meta['settings']['model']} "
        f"({result.records[0]['parameters']:,} parameters), {meta['dtype']} on {meta['device_name']}, "
        f"{meta['threads']} threads. Same tokens, same order, same initial weights in every arm of a seed."
    )
    page.table(HEADER, table_rows(result))
    page.paragraph(
        f"Losses in nats per labelled token. Held-out: {meta['held_out']['documents']} documents, each alone behind "
        f"the anchor, the same rows for every arm. Packed: the arm's own mask; not to be compared across arms. "
        f"Times are medians; the first {WARM_UP_STEPS} steps are left out."
    )
    page.heading("What may be said")
    page.bullets(findings(result))
    for name, (figure, caption) in figures.items():
        page.heading(name.replace("_", " ").capitalize())
        page.figure(figure, caption)
    _write_provenance(page, meta)
    written = [out / "report.html"]
    page.write(written[0])
    for name, (figure, _) in figures.items():
        written.append(out / f"{name}.png")
        figure.savefig(written[-1], dpi=150)
    return written


def _write_provenance(page: Page, meta: dict[str, Any]) -> None:
    corpus, packing = meta["corpus"], meta["packing"]
    lengths = packing["document_lengths"]
    page.heading("Where the numbers come from")
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in corpus["skipped"].items()) or "nothing"
    page.bullets(
        [
            f"Corpus {corpus['source']} ({corpus['corpus_hash']}): {corpus['documents']:,} documents; "
            f"left out: {skipped}.",
            f"Packing ({packing['cut']}): {packing['rows']:,} rows of {packing['seq_len']:,} tokens from "
            f"{packing['packed_tokens']:,} document tokens; {packing['continued']:,} rows open with the rest of a "
            f"document, {packing['dropped_tokens']:,} tokens dropped, {packing['padded_tokens']:,} slots padded, "
            f"{packing['unread_tokens']:,} tokens not needed.",
            f"Tokens a document: {lengths['min']:,} to {lengths['max']:,}, median {lengths['median']:,.0f}, "
            f"mean {lengths['mean']:,.0f}.",
            f"Held out by file: {meta['held_out']['documents']:,} of {meta['held_out']['of_documents']:,} documents "
            f"measured, {meta['held_out']['cut_documents']:,} cut to the row.",
        ]
    )
    versions = ", ".join(f"{package} {number}" for package, number in meta["versions"].items())
    page.code(f"{versions}\ncommit {meta['git_commit'] or 'unknown (ordinary install)'}")
    page.code(json.dumps(meta["settings"], indent=1))


def _time_base(result: "Result") -> float | None:
    full = [record["step_s"] for record in result.records if record["arm"] == "full"]
    return float(np.median(full)) if full else None


def _mean_and_spread(values: Sequence[float]) -> str:
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


def _figure(panels: int, width: float, height: float) -> tuple["Figure", list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(np.atleast_1d(figure.subplots(1, panels)))


def _draw_masks(result: "Result") -> "Figure":
    from anchor_attn.masks.draw import draw_masks_figure

    return draw_masks_figure(result.example, list(dict.fromkeys(Arm.parse(arm).pattern for arm in result.arms)))


def _draw_losses(result: "Result") -> "Figure":
    figure, panels = _figure(2, 11, 4)
    for place, arm in enumerate(result.arms):
        for record in result.of_arm(arm):
            curve = {key: np.array([step[key] for step in record["curve"]]) for key in ("loss", "tokens", "seconds")}
            width = min(SMOOTHING_STEPS, len(curve["loss"]))
            smooth = np.convolve(curve["loss"], np.ones(width) / width, mode="valid")
            label = arm if record is result.of_arm(arm)[0] else None
            for axes, key in zip(panels, ("tokens", "seconds"), strict=True):
                axes.plot(
                    curve[key][width - 1 :],
                    smooth,
                    color=f"C{place}",
                    label=label,
                    marker="o" if len(smooth) == 1 else None,
                    alpha=0.85,
                    linewidth=1.4,
                )
    for axes, key in zip(panels, ("document tokens", "seconds"), strict=True):
        axes.axhline(result.meta["unigram_loss"], color="0.6", linestyle=":", label="token frequencies")
        axes.set(xlabel=key, ylabel="nats per labelled token")
        axes.xaxis.set_major_formatter("{x:,g}")
        axes.legend(frameon=False)
    return figure


def _draw_step_times(result: "Result") -> "Figure":
    figure, panels = _figure(2, 11, 3)
    for axes, key, label, digits in (
        (panels[0], "step_s", "seconds a step (median)", 2),
        (panels[1], "attended_pairs", "attended pairs a row", 0),
    ):
        values = [float(np.median([record[key] for record in result.of_arm(arm)])) for arm in result.arms]
        bars = axes.barh(result.arms, values, color=[f"C{place}" for place in range(len(values))])
        axes.bar_label(bars, fmt=f"{{:,.{digits}f}}", padding=4)
        axes.set(xlabel=label, xlim=(0, 1.25 * max(values)))
        axes.xaxis.set_major_formatter("{x:,g}")
        axes.invert_yaxis()
    return figure


def _draw_by_position(result: "Result") -> "Figure":
    figure, (axes,) = _figure(1, 11, 4)
    for place, arm in enumerate(result.arms):
        by_position: dict[int, list[float]] = {}
        for record in result.of_arm(arm):
            for bucket in record["held_out_loss_by_position"]:
                by_position.setdefault(bucket["first_position"], []).append(bucket["loss"])
        means = [float(np.mean(losses)) for losses in by_position.values()]
        axes.plot([str(first) for first in by_position], means, "o-", color=f"C{place}", label=arm)
    axes.set(xlabel="place in the document, from", ylabel="nats per labelled token")
    axes.legend(frameon=False)
    return figure
