"""What a benchmark of attention found, as lines of a table, as Markdown and as a picture."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anchor_attn.bench.timing import Timing
from anchor_attn.page import require_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEADER = ("rival", "forward s", "backward s", "both s", "min–max", "speed-up", "of ideal", "tokens/s", "peak MB")
STYLES = {"full": ("black", "-"), "intra_doc": ("tab:blue", "--"), "anchor": ("tab:orange", "-")}
MARKERS = "osD^vPX*<>"


@dataclass(frozen=True)
class Line:
    """One rival on one row.

    Attributes:
        name: of the rival.
        seq_len: tokens of the row.
        distribution: of its document lengths.
        phases: its timings by phase.
    """

    name: str
    seq_len: int
    distribution: str
    phases: Mapping[str, Timing]

    @property
    def whole(self) -> Timing:
        """Forward and backward together; for a rival without a backward, its forward."""
        return self.phases.get("both", next(iter(self.phases.values())))

    def cells(self) -> list[str]:
        """As `HEADER` has them; why it was left out, where it was."""
        whole = self.whole
        if whole.seconds is None:
            return [self.name, f"left out: {whole.left_out}"] + [""] * (len(HEADER) - 2)
        phases = [self.phases.get(phase) for phase in ("forward", "backward", "both")]
        mark = "" if "both" in self.phases else " (forward)"
        return [
            self.name,
            *("–" if timing is None else _seconds(timing.seconds) for timing in phases),
            f"{_seconds(whole.fastest_s)}–{_seconds(whole.slowest_s)}",
            "–" if whole.speedup is None else f"{whole.speedup:.2f} ×{mark}",
            "–" if whole.share_of_ideal is None else f"{100 * whole.share_of_ideal:.0f} %",
            f"{whole.tokens_per_s:,.0f}",
            "–" if whole.peak_bytes is None else f"{whole.peak_bytes / 1e6:,.0f}",
        ]


def list_lines(timings: Iterable[Timing]) -> list[Line]:
    """The records of all phases, a line a rival and row, in the order in which they come."""
    found: dict[tuple[str, int, str], dict[str, Timing]] = {}
    for timing in timings:
        found.setdefault((timing.name, timing.seq_len, timing.distribution), {})[timing.phase] = timing
    return [Line(*key, phases) for key, phases in found.items()]


def describe_rates(timings: Iterable[Timing]) -> list[str]:
    """A sentence for the fastest of our routes on each row: its rate on attended pairs against full's.

    anchor varlen/flash_attn_3/gather at 65,536 tokens (uniform): 6.8 × full SDPA, 85 % of its rate on attended pairs
    """
    best: dict[tuple[int, str], Timing] = {}
    for timing in timings:
        if timing.pattern == "anchor" and timing.phase == "both" and timing.speedup is not None:
            row = timing.seq_len, timing.distribution
            best[row] = max(best.get(row, timing), timing, key=lambda found: found.speedup or 0.0)
    return [
        f"{timing.name} at {seq_len:,} tokens ({distribution}): {timing.speedup or 0.0:.1f} × full SDPA, "
        f"{100 * (timing.share_of_ideal or 0.0):.0f} % of its rate on attended pairs"
        for (seq_len, distribution), timing in best.items()
    ]


def write_markdown(path: Path, timings: Sequence[Timing], meta: Mapping[str, Any]) -> None:
    """Write a table a row: length and distribution above it, a line a rival."""
    lines = list_lines(timings)
    text = [
        f"Attention on {meta['device_name']}, {meta['threads']} threads, torch {meta['versions']['torch']}, "
        f"{meta['dtype']}, {meta['heads']} heads of {meta['head_dim']}. Medians of alternating rounds; speed-up is "
        "over full SDPA on the same row, forward and backward together; ideal is what attended pairs alone allow.\n"
    ]
    for seq_len, distribution in dict.fromkeys((line.seq_len, line.distribution) for line in lines):
        own = [line for line in lines if (line.seq_len, line.distribution) == (seq_len, distribution)]
        text.append(f"\n## {seq_len:,} tokens, {distribution}, {own[0].whole.documents} documents\n")
        text += [_markdown_row(HEADER), "|---|" + "---:|" * (len(HEADER) - 1)]
        text += [_markdown_row(line.cells()) for line in own]
    path.write_text("\n".join(text) + "\n", encoding="utf-8")


def draw_figure(timings: Sequence[Timing], title: str) -> "Figure":
    """Tokens a second and share of ideal, over lengths where there are several, as bars where there is one.

    Raises:
        ImportError: matplotlib is missing.
    """
    require_matplotlib()
    lines = [line for line in list_lines(timings) if line.whole.seconds is not None]
    if len({line.seq_len for line in lines}) > 1:
        return _draw_lengths(lines, title)
    return _draw_bars(lines, title)


def _draw_lengths(lines: Sequence[Line], title: str) -> "Figure":
    from matplotlib.figure import Figure

    distributions = list(dict.fromkeys(line.distribution for line in lines))
    figure = Figure(figsize=(3.6 * len(distributions) + 0.6, 8.2), layout="constrained")
    axes = figure.subplots(2, len(distributions), squeeze=False, sharex=True, sharey="row")
    names = list(dict.fromkeys(line.name for line in lines))
    for column, distribution in enumerate(distributions):
        speed, share = axes[:, column]
        speed.set_title(distribution, fontsize=11)
        for place, name in enumerate(names):
            own = [line for line in lines if (line.name, line.distribution) == (name, distribution)]
            _plot(speed, own, name, place, [line.whole.tokens_per_s for line in own])
            _plot(share, own, name, place, [line.whole.share_of_ideal for line in own])
        speed.set_yscale("log")
        share.set_xlabel("tokens a row")
        lengths = sorted({line.seq_len for line in lines})
        share.set_xscale("log", base=2)
        share.set_xticks(lengths, [_short(length) for length in lengths])
        share.minorticks_off()
        share.set_ylim(bottom=0)
    axes[0, 0].set_ylabel("tokens a second, forward and backward")
    axes[1, 0].set_ylabel("speed-up over full, share of what pairs allow")
    for axis in axes.flat:
        axis.grid(alpha=0.25)
    figure.suptitle(title, fontsize=11)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(names)), fontsize=9, frameon=False)
    return figure


def _plot(axis: "Axes", lines: Sequence[Line], name: str, place: int, values: Sequence[float | None]) -> None:
    points = [(line.seq_len, value) for line, value in zip(lines, values, strict=True) if value is not None]
    color, dashes = STYLES[lines[0].whole.pattern] if lines else ("grey", ":")
    label = name if not lines or "both" in lines[0].phases else f"{name} (forward)"
    xs, ys = zip(*points, strict=True) if points else ((), ())
    axis.plot(xs, ys, color=color, linestyle=dashes, marker=MARKERS[place % len(MARKERS)], markersize=5, label=label)


def _draw_bars(lines: Sequence[Line], title: str) -> "Figure":
    """A rival a line: speed-up over full on the left, share of ideal on the right, min–max of rounds as whiskers."""
    from matplotlib.figure import Figure

    rows = list(dict.fromkeys(line.distribution for line in lines))
    figure = Figure(figsize=(10, 0.9 + len(rows) * (0.6 + 0.42 * len(lines) / len(rows))), layout="constrained")
    axes = figure.subplots(len(rows), 2, squeeze=False, sharey="row")
    for (left, right), distribution in zip(axes, rows, strict=True):
        own = [line for line in lines if line.distribution == distribution][::-1]
        colors = [STYLES[line.whole.pattern][0] for line in own]
        labels = [line.name if "both" in line.phases else f"{line.name} (forward)" for line in own]
        seconds = [line.whole.seconds or 0.0 for line in own]
        spread = [
            [s - (line.whole.fastest_s or s) for s, line in zip(seconds, own, strict=True)],
            [(line.whole.slowest_s or s) - s for s, line in zip(seconds, own, strict=True)],
        ]
        left.barh(labels, seconds, xerr=spread, color=colors, height=0.6, alpha=0.85)
        left.set_xlabel("seconds, forward and backward")
        left.set_title(distribution, fontsize=10, loc="left")
        shares = [100 * (line.whole.share_of_ideal or 0.0) for line in own]
        right.bar_label(right.barh(labels, shares, color=colors, height=0.6, alpha=0.85), fmt=" %.0f %%", fontsize=9)
        right.set_xlabel("of the speed-up that pairs allow, %")
        right.set_xlim(0, max(125.0, 1.25 * max(shares)))
    figure.suptitle(title, fontsize=11)
    return figure


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{seconds:.3f}" if seconds >= 0.1 else f"{seconds:.4f}"


def _short(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else f"{tokens:,}"
