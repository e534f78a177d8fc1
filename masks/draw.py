"""Pictures of a mask: text for a terminal and a docstring, PNG for a page."""

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from anchor_attn.masks.layout import ANCHOR_ID, PADDING_ID, PackedLayout, checked_int
from anchor_attn.masks.patterns import MaskMod, Pattern, check_pattern, packed_mask_mod

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TEXT_CELLS = 64
PICTURE_CELLS = 1024
ATTENDED, ANCHOR, UNSEEN = "#2f6db3", "#e8833a", "#e9edf2"


def draw_mask(
    layout: PackedLayout,
    pattern: Pattern = "anchor",
    path: str | PathLike[str] | None = None,
    *,
    row: int = 0,
    sliding_window: int | None = None,
    keep_anchor: bool = True,
) -> str:
    """One row of a mask as text, and as a PNG when a path is given.

        ids  0 1 1 2 2
        0    x . . . .
        1    x x . . .
        1    x x x . .
        2    x . . x .
        2    x . . x x

    Queries go down, keys go right. A row longer than 64 tokens is drawn in cells of several tokens: `x` where all
    their causal pairs are attended, `/` where some are, `.` where none is.

    Args:
        layout: the packed batch.
        pattern: "full", "intra_doc" or "anchor".
        path: where the PNG goes; needs matplotlib.
        row: which row of the batch.
        sliding_window: as in `dense_mask`.
        keep_anchor: as in `dense_mask`.

    Returns:
        The picture as text, without a newline at its end.

    Raises:
        ValueError: a row that the batch does not have, or as `dense_mask`.
        TypeError: a row that is no integer, or not a layout.
        ImportError: a path is given and matplotlib is missing.
    """
    check_pattern(layout, pattern, sliding_window)
    rows = layout.batch_size
    if not -rows <= checked_int(row, "row") < rows:
        raise ValueError(f"row must lie between {-rows} and {rows - 1}, got {row}; pass 0 for the first.")
    one_row = PackedLayout.from_document_ids(layout.document_ids[row][None].cpu())
    mask_mod = packed_mask_mod(one_row, pattern, sliding_window, keep_anchor)
    ids = one_row.document_ids[0]
    if path is not None:
        _write_png(mask_mod, ids, pattern, Path(path))
    return _text(mask_mod, ids)


def _text(mask_mod: MaskMod, ids: Tensor) -> str:
    tokens = -(-len(ids) // TEXT_CELLS)
    share = _share_by_cell(mask_mod, len(ids), tokens)
    labels = [str(int(document_id)) for document_id in ids[::tokens]]
    width = max(map(len, labels))
    lines = [" ".join(["ids ", *(label.rjust(width) for label in labels)])]
    for label, cells in zip(labels, share.tolist(), strict=True):
        marks = ("." if cell == 0 else "x" if cell == 1 else "/" for cell in cells)
        lines.append(" ".join([label.ljust(4), *(mark.rjust(width) for mark in marks)]))
    if tokens > 1:
        lines.append(f"one cell is {tokens} × {tokens} tokens, its id that of its first token")
    return "\n".join(lines)


def _share_by_cell(mask_mod: MaskMod, size: int, tokens: int) -> Tensor:
    """The attended share of each cell's causal pairs, 0 … 1; square cells of `tokens`, the last may be smaller.

    A strip of queries at a time: a long row never needs its whole S × S mask.
    """
    slots, zero = torch.arange(size), torch.tensor(0)
    lengths = torch.tensor([len(strip) for strip in slots.split(tokens)])
    side = len(lengths)
    attended = torch.zeros(side, side)
    for cell, queries in enumerate(slots.split(tokens)):
        seen = mask_mod(zero, zero, queries[:, None], slots).sum(dim=0)
        attended[cell] = F.pad(seen, (0, side * tokens - size)).view(side, tokens).sum(dim=1)
    causal = torch.outer(lengths, lengths).tril(-1) + torch.diag(lengths * (lengths + 1) // 2)
    return attended / causal.clamp(min=1)


def _write_png(mask_mod: MaskMod, ids: Tensor, pattern: str, path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise ImportError("draw_mask needs matplotlib for a PNG; pip install 'anchor-attn[plots]'.") from missing
    figure = Figure(figsize=(5.4, 5.4), layout="constrained")
    draw_mask_axes(figure.subplots(), mask_mod, ids, pattern)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def draw_mask_axes(axes: "Axes", mask_mod: MaskMod, ids: Tensor, title: str) -> None:
    """Draw one row's mask into matplotlib axes: what is attended, what of it is the anchor, a bracket a document."""
    from matplotlib.colors import LinearSegmentedColormap, ListedColormap
    from matplotlib.patches import Patch

    size = int((ids != PADDING_ID).sum()) or len(ids)
    anchors = int((ids == ANCHOR_ID).sum())
    ids = ids[:size]
    tokens = -(-size // PICTURE_CELLS)
    share = _share_by_cell(mask_mod, size, tokens)
    drawn = len(share) * tokens  # the last cell may reach past the row; the limits below cut it off
    future = torch.ones_like(share, dtype=torch.bool).triu(1)
    blues = LinearSegmentedColormap.from_list("attended", [UNSEEN, ATTENDED])
    past = share.masked_fill(future, torch.nan).numpy()
    axes.imshow(past, extent=(0, drawn, drawn, 0), cmap=blues, vmin=0, vmax=1)
    legend = [Patch(color=ATTENDED, label="attended"), Patch(color=UNSEEN, label="past, not attended")]
    if anchors:
        # Wider than to scale: one column of 400 is hardly a pixel. Only the queries that do see the anchor are marked.
        zero = torch.tensor(0)
        seen = mask_mod(zero, zero, torch.arange(size)[:, None], torch.arange(anchors))
        column = torch.where(seen, 1.0, torch.nan).numpy()
        extent = (0, max(anchors, size / 80), size, 0)
        axes.imshow(column, extent=extent, cmap=ListedColormap([ANCHOR]), interpolation="nearest")
        legend.insert(1, Patch(color=ANCHOR, label="attended anchor"))
    axes.legend(handles=legend, loc="upper right", frameon=False)

    found, counts = torch.unique_consecutive(ids, return_counts=True)
    last = 0
    for document_id, length in zip(found.tolist(), counts.tolist(), strict=True):
        first, last = last, last + length
        if document_id < 1 or length < size / 100:
            continue  # no document, or a bracket of a few pixels that says nothing
        beside = axes.get_yaxis_transform()  # x in widths of the axes, y in tokens
        edges = [first + size / 400, last - size / 400]
        axes.plot(
            [1.01, 1.025, 1.025, 1.01], [edges[0], *edges, edges[1]], "0.4", lw=1, transform=beside, clip_on=False
        )
        if length > size / 30:
            axes.text(1.04, (first + last) / 2, str(document_id), va="center", color="0.3", transform=beside)
    axes.text(1.04, 1.015, "document", ha="right", color="0.3", transform=axes.transAxes)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(title=title, xlabel="key token", ylabel="query token", xlim=(0, size), ylim=(size, 0))
