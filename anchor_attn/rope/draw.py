"""A picture of extension methods: how far each pair is slowed, and how far it turns in the longer context."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from anchor_attn.page import require_matplotlib
from anchor_attn.rope.inspection import RopeNow, RopeUnder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Methods that share a curve over many pairs are told apart by their dashes.
STYLES: dict[str, dict[str, Any]] = {
    "default": {"color": "black", "linewidth": 2.0},
    "linear": {"color": "tab:red"},
    "ntk": {"color": "tab:blue"},
    "dynamic": {"color": "tab:cyan", "linestyle": "--"},
    "ntk_by_parts": {"color": "tab:olive", "linewidth": 3.5, "alpha": 0.6},
    "yarn": {"color": "tab:orange"},
    "yarn_paper": {"color": "tab:green", "linestyle": "--"},
    "longrope": {"color": "tab:purple", "linewidth": 2.0},
    "llama3": {"color": "tab:brown", "linestyle": "-."},
}
UNTURNED = {"color": "0.5", "alpha": 0.12, "linewidth": 0}


def draw_methods_figure(now: RopeNow, under: Mapping[str, RopeUnder], factor: float, title: str) -> "Figure":
    """θ'/θ of all methods over the pairs, and the angle that a pair reaches at the target length.

    Args:
        now: of the model.
        under: by method, as `compare_methods` gives it.
        factor: how many times the original length.
        title: above both panels.

    Raises:
        ImportError: matplotlib is missing.
    """
    require_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(12, 5.2), dpi=150, layout="constrained")
    slowed, reached = figure.subplots(1, 2)
    original = now.original
    target_len = round(original.length * factor)
    theta = original.inv_freq.double()
    for method, rope in under.items():
        label = _label(method, rope.attention_factor)
        _draw_pairs(slowed, rope.ratio, method, label)
        _draw_pairs(reached, theta * rope.ratio * target_len, method, label)
    present: list[Any] = []
    if now.method != "default":
        ratio = now.inv_freq.double() / theta
        label = _label(f"now: {now.method}", now.attention_factor)
        present = slowed.plot(ratio.tolist(), "x", color="0.2", markersize=4, label=label)
    seen = {"color": "black", "linestyle": ":", "linewidth": 1.8}
    reached.plot((theta * original.length).tolist(), label=f"seen in training, {original.length:,} tokens", **seen)
    reached.axhline(2 * math.pi, color="0.6", linewidth=0.8)
    reached.annotate("one turn", (0, 2 * math.pi), xytext=(0, 3), textcoords="offset points", color="0.4", fontsize=9)
    slowed.axhline(1 / factor, color="0.6", linewidth=0.8)
    slowed.set(title="how far a pair is slowed, θ'/θ", ylabel="θ'/θ", yscale="log")
    ticks = [1 / factor, *(tick for tick in (0.25, 0.5, 1.0) if tick > 1.2 / factor)]
    slowed.set_yticks(ticks, [f"1/{1 / tick:g}" if tick < 1 else "1" for tick in ticks])
    slowed.minorticks_off()
    reached.set(title=f"angle at {target_len:,} tokens", ylabel="radians", yscale="log")
    for axes in (slowed, reached):
        axes.set_xlabel("pair, the fastest first")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.2)
        if now.unturned_pairs:
            pairs = len(theta)
            axes.axvspan(now.unturned_pairs[0] - 0.5, pairs - 0.5, label="less than a turn in training", **UNTURNED)
            axes.set_xlim(-0.5, pairs - 0.5)
    handles, _ = reached.get_legend_handles_labels()
    figure.legend(handles=[*handles, *present], loc="outside lower center", ncols=6, fontsize=9, frameon=False)
    figure.suptitle(title, fontsize=11)
    return figure


def _draw_pairs(axes: "Axes", values: Tensor, method: str, label: str) -> None:
    axes.plot(values.tolist(), label=label, **{"linewidth": 1.5, **STYLES[method]})


def _label(name: str, attention_factor: float) -> str:
    """Methods with the same curve may still differ in how much they scale cos and sin."""
    return name if attention_factor == 1 else f"{name} (cos, sin × {attention_factor:.3f})"
