"""The picture of a sweep: drift against base, a panel a policy and a line a method."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anchor_attn.drift.pages.choice_sections import shown_policies
from anchor_attn.drift.pages.numbers import name_shift
from anchor_attn.drift.sweep import SweptRecord
from anchor_attn.page import require_matplotlib

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PREFERRED_SHIFT = 1_000_000
MARKERS = "osDv^PXd"  # methods whose lines lie upon each other are told apart by their markers


def draw_sweep_figure(swept: Sequence[SweptRecord], title: str) -> "Figure":
    """Mean |Δ score| in % of the mean |score| against base, moved by a million tokens, or by the largest shift.

    Raises:
        ImportError: matplotlib is missing.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    shifts = {record.drift.shift for record in swept}
    shift = PREFERRED_SHIFT if PREFERRED_SHIFT in shifts else max(shifts)
    policies, methods = shown_policies(swept), list(dict.fromkeys(record.method for record in swept))
    columns = min(2, len(policies))
    rows = -(-len(policies) // columns)
    figure = Figure(figsize=(5.5 * columns, 0.9 + 3.6 * rows), dpi=150, layout="constrained")
    panels: Any = figure.subplots(rows, columns, squeeze=False)
    for axes, policy in zip(panels.flat, policies, strict=False):
        for place, method in enumerate(methods):
            own = [
                record.drift
                for record in swept
                if (record.method, record.drift.policy, record.drift.shift) == (method, policy, shift)
            ]
            bases = [record.base for record in swept if record.method == method]
            percents = [100 * (drift.relative or float("nan")) for drift in own]
            style: dict[str, Any] = {
                "marker": MARKERS[place % len(MARKERS)],
                "markersize": 10 - place,
                "linewidth": 1.3,
            }
            axes.plot(list(dict.fromkeys(bases)), percents, label=method, alpha=0.85, **style)
        axes.set(title=policy, xscale="log", yscale="log", xlabel="base")
        axes.set_ylabel("mean |Δ score|, % of a score")
        axes.yaxis.set_major_formatter("{x:.3g}")
        axes.yaxis.set_minor_formatter("{x:.3g}")
        axes.tick_params(axis="y", which="both", labelsize=8)
        axes.grid(alpha=0.25, which="both")
    for axes in panels.flat[len(policies) :]:
        axes.set_visible(False)
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    figure.suptitle(f"{title}, all positions moved by {name_shift(shift)}; each panel has its own axis", fontsize=11)
    return figure


def write_sweep_picture(path: Path, swept: Sequence[SweptRecord], title: str) -> None:
    """Write it as PNG.

    Raises:
        ImportError: matplotlib is missing.
    """
    draw_sweep_figure(swept, title).savefig(path)
