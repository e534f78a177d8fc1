"""Pictures of a mask: text for a terminal and a docstring, PNG for a page."""

from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from anchor_attn.masks.dense import dense_mask
from anchor_attn.masks.layout import ANCHOR_ID, PADDING_ID, PackedLayout
from anchor_attn.masks.patterns import Pattern

TEXT_CELLS = 64
PICTURE_CELLS = 1024


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
        ImportError: a path is given and matplotlib is missing.
    """
    if not -layout.batch_size <= row < layout.batch_size:
        raise ValueError(f"row must be below the batch size {layout.batch_size}, got {row}; pass 0 for the first.")
    one_row = PackedLayout.from_document_ids(layout.document_ids[row][None])
    mask = dense_mask(one_row, pattern, sliding_window, keep_anchor)[0].cpu()
    ids = one_row.document_ids[0].cpu()
    if path is not None:
        _write_png(mask, ids, pattern, Path(path))
    return _text(mask, ids)


def _text(mask: Tensor, ids: Tensor) -> str:
    tokens = -(-len(ids) // TEXT_CELLS)
    share = _share_by_cell(mask, tokens)
    labels = [str(int(document_id)) for document_id in ids[::tokens]]
    width = max(map(len, labels))
    lines = [" ".join(["ids ", *(label.rjust(width) for label in labels)])]
    for label, cells in zip(labels, share.tolist(), strict=True):
        marks = ("." if cell == 0 else "x" if cell == 1 else "/" for cell in cells)
        lines.append(" ".join([label.ljust(4), *(mark.rjust(width) for mark in marks)]))
    if tokens > 1:
        lines.append(f"one cell is {tokens} × {tokens} tokens, its id that of its first token")
    return "\n".join(lines)


def _share_by_cell(mask: Tensor, tokens: int) -> Tensor:
    """The attended share of each cell's causal pairs, 0 … 1; square cells of `tokens`."""
    side = -(-len(mask) // tokens)
    padded = torch.zeros(2, side * tokens, side * tokens)
    padded[0, : len(mask), : len(mask)] = mask
    padded[1, : len(mask), : len(mask)] = torch.ones_like(mask).tril()
    attended, causal = padded.view(2, side, tokens, side, tokens).sum(dim=(2, 4))
    return attended / causal.clamp(min=1)


def _write_png(mask: Tensor, ids: Tensor, pattern: str, path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise ImportError("draw_mask needs matplotlib for a PNG; pip install 'anchor-attn[plots]'.") from missing
    figure = Figure(figsize=(5, 5.4), layout="constrained")
    draw_mask_axes(figure.subplots(), mask, ids, pattern)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def draw_mask_axes(axes: "Axes", mask: Tensor, ids: Tensor, title: str) -> None:  # noqa: F821
    """Draw a mask [S, S] into matplotlib axes: anchor column marked, document bounds as lines."""
    tokens = -(-len(ids) // PICTURE_CELLS)
    size = len(ids)
    axes.imshow(_share_by_cell(mask, tokens), extent=(0, size, size, 0), cmap="Blues", vmin=0, vmax=1.3)
    bounds = [0, *((ids[1:] != ids[:-1]).nonzero().flatten() + 1).tolist(), size]
    if size <= 512:
        for first, last in zip(bounds[:-1], bounds[1:], strict=True):
            axes.axhline(last, color="0.85", linewidth=0.4)
            axes.axvline(last, color="0.85", linewidth=0.4)
    anchors = int((ids == ANCHOR_ID).sum())
    real = int((ids != PADDING_ID).sum())
    if anchors:
        axes.axvspan(0, max(anchors, size / 150), color="C1", alpha=0.8, label="anchor")
        axes.legend(loc="upper right", frameon=False)
    axes.set(title=title, xlabel="key token", ylabel="query token", xlim=(0, real or size), ylim=(real or size, 0))
