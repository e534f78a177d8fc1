"""Pictures of drift: against shift, length and key, by layer and head, over frequency pairs, and stage by stage."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from anchor_attn.drift.pages.numbers import brief, name_shift
from anchor_attn.drift.policies import FP64, STAGES
from anchor_attn.drift.report import DriftRecord
from anchor_attn.drift.result import DriftResult
from anchor_attn.page import require_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Policies that share a curve over many shifts are told apart by their markers.
STYLES: dict[str, dict[str, Any]] = {
    "bf16_angles": {"color": "tab:red", "marker": "v"},
    "bf16_cos_sin": {"color": "tab:orange", "marker": "o"},
    "fp16_cos_sin": {"color": "tab:brown", "marker": "P"},
    "fp32_rotation": {"color": "tab:blue", "marker": "s"},
    "exact": {"color": "tab:green", "marker": "D", "linewidth": 2.5},
    "tf32": {"color": "tab:olive", "marker": "^"},
    "fp32": {"color": "tab:purple", "marker": "X"},
    "exact_fp32": {"color": "tab:cyan", "marker": "d", "linewidth": 2.5},
    FP64.name: {"color": "0.5", "marker": ".", "linestyle": ":"},
}
OTHERS = ("tab:pink", "black", "gold", "navy")  # of policies that a user adds
PREDICTED: dict[str, Any] = {"linestyle": (0, (4, 3)), "linewidth": 1.1, "color": "black", "marker": ""}
FLOOR_LABEL = "float64, the floor"
SCORES = "mean |Δ score|"


def draw_shifts_figure(result: DriftResult, title: str) -> "Figure":
    """Drift against shift of every policy, its prediction dashed, and the floor.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure, axes = _figure(title)
    for policy in result.policies:
        records = result.select(policy=policy)
        predicted = [(record.shift, record.predicted) for record in records if record.predicted]
        axes.plot([r.shift for r in records], [r.mean_abs for r in records], label=_label(policy), **style_of(policy))
        if predicted and policy != FP64.name:
            axes.plot(*zip(*predicted, strict=True), zorder=3, **PREDICTED)
    axes.plot([], [], label="predicted", **PREDICTED)
    axes.set(xlabel="shift of all positions, tokens", ylabel=SCORES, xscale="log", yscale="log")
    axes.set_xticks(list(result.shifts), [name_shift(shift) for shift in result.shifts])
    axes.minorticks_off()
    return _with_legend(figure, axes)


def draw_lengths_figure(result: DriftResult, title: str) -> "Figure | None":
    """Drift against the length of the row, of scores and of attention; None at one length."""
    if len(result.lengths) < 2:
        return None
    figure, left, right = _two(title)
    shift = result.shown_shift
    for axes, level in ((left, "scores"), (right, "attention")):
        curves = {
            policy: [
                record
                for length in result.lengths
                for record in result.select(length=length, level=level, policy=policy, shift=shift)
            ]
            for policy in result.policies
        }
        _draw_curves(axes, result.lengths, curves)
        axes.set(xlabel="tokens of the row", xscale="log", title=f"{level}, +{name_shift(shift)}")
        axes.set_xticks(list(result.lengths), [f"{length:,}" for length in result.lengths])
        axes.minorticks_off()
    left.set_ylabel("mean |drift|")
    return _with_legend(figure, left)


def draw_keys_figure(result: DriftResult, title: str) -> "Figure":
    """Drift of the scores and of the attention of each key, by its place; the first token is marked."""
    figure, left, right = _two(title)
    shift = result.shown_shift
    for axes, level in ((left, "scores"), (right, "attention")):
        curves = {policy: result.select("key", level=level, policy=policy, shift=shift) for policy in result.policies}
        bins = curves[FP64.name]
        _draw_curves(axes, range(len(bins)), curves)
        ticks = range(0, len(bins), max(1, len(bins) // 6))
        axes.set_xticks(list(ticks), [_name_bin(bins[place]) for place in ticks])
        axes.axvspan(-0.4, 0.4, color="gold", alpha=0.35, linewidth=0, label="first token")
        axes.set(xlabel="place of the key", title=f"{level}, +{name_shift(shift)}")
    left.set_ylabel("mean |drift|")
    return _with_legend(figure, left)


def draw_heads_figure(result: DriftResult, policy: str, title: str) -> "Figure | None":
    """A heat map of layer × head, of scores and of attention; None of a single head."""
    shift = result.shown_shift
    if len(result.heads(policy, shift)) < 2:
        return None
    figure, left, right = _two(title)
    for axes, level in ((left, "scores"), (right, "attention")):
        records = result.heads(policy, shift, level)
        layers, heads = list(result.layers), 1 + max(record.low or 0 for record in records)
        cells = [[float("nan")] * heads for _ in layers]  # layers may differ in how many heads they have
        for record in records:
            cells[layers.index(record.layer)][record.low or 0] = record.mean_abs
        image = axes.imshow(cells, aspect="auto", cmap="viridis", interpolation="nearest")
        figure.colorbar(image, ax=axes, format="%.1e")
        axes.set(xlabel="head", ylabel="layer", title=f"{level}, {policy}, +{name_shift(shift)}")
        axes.set_xticks(list(range(0, heads, -(-heads // 16))))
        rows = range(0, len(layers), -(-len(layers) // 16))
        axes.set_yticks(list(rows), ["–" if layers[row] is None else str(layers[row]) for row in rows])
    return figure


def draw_pairs_figure(result: DriftResult, title: str) -> "Figure | None":
    """The spectrum: how much each frequency pair's part of a score drifts; None where pairs were not measured."""
    shift = result.shifts[-1]
    if not result.select("pair", shift=shift):
        return None
    figure, axes = _figure(title)
    curves = {policy: result.select("pair", policy=policy, shift=shift) for policy in result.policies}
    _draw_curves(axes, range(len(curves[FP64.name])), curves, markersize=3, linewidth=1.2)
    axes.set(xlabel="frequency pair, the fastest first", ylabel=f"{SCORES} of the pair, +{name_shift(shift)}")
    return _with_legend(figure, axes)


def draw_stages_figure(result: DriftResult, title: str) -> "Figure | None":
    """Bars of each stage alone in float64, a group a policy; None where stages were not measured."""
    shift = result.shown_shift
    if not any(result.select(shift=shift, stage=stage) for stage in STAGES):
        return None
    figure, axes = _figure(title)
    policies = [policy for policy in result.policies if policy != FP64.name]
    stages = [stage for stage in STAGES if stage != "softmax"]  # behind the scores
    width = 0.8 / len(stages)
    for place, stage in enumerate(stages):
        found = {record.policy: record.mean_abs for record in result.select(shift=shift, stage=stage)}
        at = [i + (place - len(stages) / 2 + 0.5) * width for i, policy in enumerate(policies) if policy in found]
        axes.bar(at, [found[policy] for policy in policies if policy in found], width, label=stage)
    for i, policy in enumerate(policies):
        whole = result.at(policy, shift).mean_abs
        axes.hlines(whole, i - 0.42, i + 0.42, color="black", linewidth=1.5, label="_" if i else "whole policy")
    axes.set_xticks(range(len(policies)), policies, rotation=20, ha="right", fontsize=9)
    axes.set(ylabel=f"{SCORES}, +{name_shift(shift)}", yscale="log")
    return _with_legend(figure, axes)


# --- parts -----------------------------------------------------------------------------------------------------------


def _figure(title: str) -> "tuple[Figure, Axes]":
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.4), dpi=150, layout="constrained")
    figure.suptitle(textwrap.fill(title, 85), fontsize=11)
    return figure, figure.subplots()


def _two(title: str) -> "tuple[Figure, Axes, Axes]":
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), dpi=150, layout="constrained")
    figure.suptitle(textwrap.fill(title, 120), fontsize=11)
    left, right = figure.subplots(1, 2)
    return figure, left, right


def _draw_curves(
    axes: "Axes", places: Sequence[int], curves: Mapping[str, Sequence[DriftRecord]], **style: Any
) -> None:
    """A curve a policy. The floor, ten decades below, is said and not drawn: it would press the others flat."""
    for policy, records in curves.items():
        if policy != FP64.name:
            axes.plot(places, [record.mean_abs for record in records], label=policy, **{**style_of(policy), **style})
    floor = max(record.mean_abs for record in curves[FP64.name])
    where: dict[str, Any] = {"xycoords": "axes fraction", "fontsize": 9, "color": "0.4"}
    axes.annotate(f"{FLOOR_LABEL}: {brief(floor)} or less", (0.02, 0.02), **where)
    axes.set_yscale("log")
    axes.margins(y=0.15)


def _with_legend(figure: "Figure", axes: "Axes") -> "Figure":
    for each in figure.axes:
        each.grid(alpha=0.25)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=9, frameon=False)
    return figure


def style_of(policy: str) -> dict[str, Any]:
    """Colour and marker of a policy, the same in every picture."""
    if policy in STYLES:
        return {"linewidth": 1.5, "markersize": 5, **STYLES[policy]}
    place = sum(map(ord, policy)) % len(OTHERS)
    return {"linewidth": 1.5, "markersize": 5, "color": OTHERS[place], "marker": "*"}


def _label(policy: str) -> str:
    return FLOOR_LABEL if policy == FP64.name else policy


def _name_bin(record: DriftRecord) -> str:
    """0, 1, 2–3, 4–7 …"""
    return f"{record.low:,}" if record.low == record.high else f"{record.low:,}–"
