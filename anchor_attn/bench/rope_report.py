"""What the evidence for the extension methods says: claims of the papers beside what was found, a table, a picture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anchor_attn.bench.rope import STAGES, Plan, Reading, Stage, half_width
from anchor_attn.rope.methods import METHODS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# In perplexities of the plain model at its own length, on the same tokens. Set before anything was measured.
EXPLODES = 2.0
HOLDS = 1.1


@dataclass(frozen=True)
class Finding:
    """A claim of the papers, and what was found here.

    Attributes:
        claim: as they have it.
        holds: whether it was found so.
        found: the numbers.
    """

    claim: str
    holds: bool
    found: str

    def __str__(self) -> str:
        return f"{'found' if self.holds else 'NOT found'}: {self.claim} – {self.found}"


class Readings:
    """Readings by stage, method and length."""

    def __init__(self, readings: Sequence[Reading]) -> None:
        self._found = {(reading.stage, reading.method, reading.times): reading for reading in readings}
        self.times = sorted({reading.times for reading in readings})
        self.methods = [method for method in METHODS if any(method == reading.method for reading in readings)]

    def at(self, stage: Stage, method: str, times: int) -> Reading:
        """One of them."""
        return self._found[stage, method, times]

    @property
    def trained(self) -> Reading:
        """Plain RoPE at its own length."""
        return self.at("untrained", "default", self.times[0])

    def ratio(self, stage: Stage, method: str, times: int) -> float:
        """A perplexity, as a multiple of the plain model's at its own length."""
        return self.at(stage, method, times).perplexity / self.trained.perplexity


def judge(readings: Readings, plan: Plan) -> list[Finding]:
    """The claims of the papers, each beside what was found.

    A method "holds" where its perplexity is at most 1.1 times that of the plain model at its own length on the same
    tokens, and "explodes" from 2 times on.
    """
    longer, tuned_times = readings.times[1:], plan.tuned_times
    last = longer[-1]

    def listed(stage: Stage, method: str) -> str:
        values = ", ".join(f"{readings.at(stage, method, times).perplexity:.2f}" for times in longer)
        return f"{method} {stage} {values}"

    def holds(stage: Stage, method: str, times: int) -> bool:
        return readings.ratio(stage, method, times) <= HOLDS

    lengths = ", ".join(f"{times}" for times in longer)
    base = f"perplexity {readings.trained.perplexity:.2f} at 1 ×; at {lengths} ×"
    pi_before, pi_after = (readings.at(stage, "linear", tuned_times) for stage in STAGES)
    findings = [
        Finding(
            "plain RoPE explodes beyond its length",
            readings.ratio("untrained", "default", last) >= EXPLODES,
            f"{base}: {listed('untrained', 'default')}",
        ),
        Finding(
            "position interpolation needs the fine-tuning, and holds after it",
            not holds("untrained", "linear", tuned_times) and holds("fine-tuned", "linear", tuned_times),
            f"at {tuned_times} × {pi_before.perplexity:.2f} untrained, {pi_after.perplexity:.2f} fine-tuned",
        ),
        *(
            Finding(
                f"{name} holds untrained",
                all(holds("untrained", method, times) for times in longer),
                f"at {lengths} ×: {listed('untrained', method)}",
            )
            for name, method in (("NTK", "ntk"), ("YaRN", "yarn"))
        ),
        _judge_search(readings, longer),
        Finding(
            "a short fine-tuning does not save plain RoPE",
            not holds("fine-tuned", "default", tuned_times),
            f"at {tuned_times} ×: {readings.at('fine-tuned', 'default', tuned_times).perplexity:.2f}",
        ),
    ]
    return findings


def _judge_search(readings: Readings, longer: Sequence[int]) -> Finding:
    """Searched factors beside the fixed method that is best on the windows themselves, which it is chosen by."""
    parts, holds = [], True
    for times in longer:
        searched = readings.at("untrained", "longrope", times)
        fixed = [readings.at("untrained", method, times) for method in readings.methods if method != "longrope"]
        best = min(fixed, key=lambda reading: reading.nats)
        gaps = [ours - theirs for ours, theirs in zip(searched.window_nats, best.window_nats, strict=True)]
        width = half_width(gaps)
        holds = holds and searched.nats <= best.nats
        interval = "" if width is None else f" ± {width:.3f}"
        parts.append(f"{times} × {searched.nats - best.nats:+.3f}{interval} nats to {best.method}")
    return Finding("searched factors are at least as good as the best fixed ones, untrained", holds, "; ".join(parts))


def table_rows(readings: Readings, stage: Stage) -> list[list[str]]:
    """A line a method: its perplexity at every length, the best of each length marked."""
    rows = []
    best = {
        times: min(readings.at(stage, method, times).perplexity for method in readings.methods)
        for times in readings.times
    }
    for method in readings.methods:
        cells = []
        for times in readings.times:
            value = readings.at(stage, method, times).perplexity
            shown = f"{value:,.2f}" if value < 1e5 else f"{value:.0e}"
            cells.append(f"{shown} *" if times > 1 and value == best[times] else shown)
        rows.append([method, *cells])
    return rows


def describe_stage(stage: Stage, plan: Plan) -> str:
    """What the numbers of a stage are."""
    if stage == "untrained":
        return "untrained, at the factor of each length"
    return f"fine-tuned for {plan.tune_steps} steps at {plan.tuned_times} × the length, at the factor of that length"


def write_markdown(path: Path, readings: Readings, plan: Plan, meta: Mapping[str, Any]) -> None:
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
    lines += ["\n\\* best of its length\n\n## Beside the papers\n"]
    lines += [f"- {finding}" for finding in judge(readings, plan)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def draw_readings_figure(readings: Readings, plan: Plan, title: str) -> "Figure":
    """Perplexity over lengths, a panel a stage, a line a method.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise ImportError("a picture needs matplotlib; pip install 'anchor-attn[plots]'.") from missing
    from anchor_attn.rope.draw import STYLES

    figure = Figure(figsize=(12, 5.4), dpi=150, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, stage in zip(panels, STAGES, strict=True):
        for method in readings.methods:
            values = [readings.at(stage, method, times).perplexity for times in readings.times]
            axes.plot(readings.times, values, label=method, marker="o", **{"markersize": 4, **STYLES[method]})
        axes.axhline(HOLDS * readings.trained.perplexity, color="0.6", linewidth=0.8, linestyle=":")
        place = {"xytext": (4, 3), "textcoords": "offset points", "fontsize": 8, "color": "0.4"}
        axes.annotate("holds below", (readings.times[0], HOLDS * readings.trained.perplexity), **place)
        axes.set_xscale("log", base=2)
        axes.set_xticks(readings.times, [f"{times} ×\n{times * plan.seq_len:,}" for times in readings.times])
        axes.minorticks_off()
        axes.set_yscale("log")
        axes.set_xlabel("length, in multiples of the trained one and in tokens")
        axes.set_title(describe_stage(stage, plan), fontsize=10)
        axes.grid(alpha=0.2)
    panels[0].set_ylabel(f"perplexity of the same {plan.scored_tokens} tokens")
    _label_powers(panels[0])
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=9, fontsize=9, frameon=False)
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
