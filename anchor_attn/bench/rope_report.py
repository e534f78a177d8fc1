"""The evidence for the extension methods as a table, as Markdown and as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anchor_attn.bench.rope import Plan
from anchor_attn.bench.rope_findings import HOLDS, judge
from anchor_attn.bench.rope_readings import STAGES, MethodReadings, Stage
from anchor_attn.page import require_matplotlib

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOWEST = "lowest of its length, ties included"


def table_rows(readings: MethodReadings, stage: Stage) -> list[list[str]]:
    """A line a method: its perplexity at every length; in longer ones, all that show the lowest are marked."""
    shown = {
        (method, times): _shown(readings.at(stage, method, times).perplexity)
        for method in readings.methods
        for times in readings.times
    }
    lowest = {
        times: _shown(min(readings.at(stage, method, times).perplexity for method in readings.methods))
        for times in readings.times[1:]
    }
    return [
        [
            method,
            *(
                f"{shown[method, times]} *" if shown[method, times] == lowest.get(times) else shown[method, times]
                for times in readings.times
            ),
        ]
        for method in readings.methods
    ]


def _shown(perplexity: float) -> str:
    return f"{perplexity:,.2f}" if perplexity < 1e5 else f"{perplexity:.0e}"


def describe_stage(stage: Stage, plan: Plan) -> str:
    """What the numbers of a stage are."""
    if stage == "untrained":
        return "untrained, at the factor of each length"
    return f"fine-tuned for {plan.tune_steps} steps at {plan.tuned_times} × the length, at the factor of that length"


def write_markdown(path: Path, readings: MethodReadings, plan: Plan, meta: Mapping[str, Any]) -> None:
    """Write a table a stage, and the claims."""
    lines = [
        f"Perplexity of the last {plan.scored_tokens} tokens of {len(readings.trained.window_nats)} held-out windows, "
        "the same tokens at every length. "
        f"Trained for {plan.steps} steps of {plan.batch_tokens:,} tokens in rows of {plan.seq_len}; seed "
        f"{meta['seed']}, {meta['device_name']}, torch {meta['versions']['torch']}.",
    ]
    header = ["method", *(f"{times} × = {times * plan.seq_len:,}" for times in readings.times)]
    for stage in STAGES:
        lines += [f"\n## {describe_stage(stage, plan).capitalize()}\n", _line(header)]
        lines += ["|---|" + "---:|" * len(readings.times)]
        lines += [_line(row) for row in table_rows(readings, stage)]
    lines += [f"\n\\* {LOWEST}\n\n## Beside the papers\n"]
    lines += [f"- {finding}" for finding in judge(readings, plan)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def draw_readings_figure(readings: MethodReadings, plan: Plan, title: str) -> "Figure":
    """Perplexity over lengths, a panel a stage, a line a method.

    Raises:
        ImportError: matplotlib is missing.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    from anchor_attn.rope.draw import STYLES

    figure = Figure(figsize=(12, 5.4), dpi=150, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, stage in zip(panels, STAGES, strict=True):
        for method in readings.methods:
            values = [readings.at(stage, method, times).perplexity for times in readings.times]
            axes.plot(readings.times, values, label=method, marker="o", **{"markersize": 4, **STYLES[method]})
        bound = {"color": "0.4", "linewidth": 1.0, "linestyle": ":"}
        axes.axhline(HOLDS * readings.trained.perplexity, label=f"holds below: {HOLDS:g} × default at 1 ×", **bound)
        axes.set_xscale("log", base=2)
        axes.set_xticks(readings.times, [f"{times} ×\n{times * plan.seq_len:,}" for times in readings.times])
        axes.minorticks_off()
        axes.set_yscale("log")
        axes.set_xlabel(f"tokens of a window, and how many times the {plan.seq_len:,} of training")
        axes.set_title(describe_stage(stage, plan), fontsize=10)
        axes.grid(alpha=0.2)
    panels[0].set_ylabel(f"perplexity of the same {plan.scored_tokens} tokens")
    _label_powers(panels[0])
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=9, frameon=False)
    figure.suptitle(title, fontsize=11)
    return figure


def _label_powers(axes: Any) -> None:
    """Perplexities as numbers, not as powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
