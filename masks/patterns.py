"""Who may attend to whom: full, intra-document and anchor attention as FlexAttention mask_mods.

    ids  0 1 1 2 2      full          intra_doc     anchor
    0                   x . . . .     x . . . .     x . . . .
    1                   x x . . .     . x . . .     x x . . .
    1                   x x x . .     . x x . .     x x x . .
    2                   x x x x .     . . . x .     x . . x .
    2                   x x x x x     . . . x x     x . . x x

Anchor attention: "When Precision Meets Position: BFloat16 Breaks Down RoPE in Long-Context Training",
https://arxiv.org/abs/2411.13476
"""

from collections.abc import Callable
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from anchor_attn.masks.layout import ANCHOR_ID, PADDING_ID, PackedLayout, checked_int

Pattern = Literal["full", "intra_doc", "anchor"]
PATTERNS: tuple[Pattern, ...] = ("full", "intra_doc", "anchor")

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def check_pattern(layout: PackedLayout, pattern: str, sliding_window: int | None = None) -> None:
    """Raise unless `pattern` and `sliding_window` can be asked of `layout`.

    Raises:
        ValueError: an unknown pattern, the anchor pattern without an anchor, or a window below 1.
        TypeError: not a layout, or a window that is no integer.
    """
    if not isinstance(layout, PackedLayout):
        raise TypeError(
            f"layout must be a PackedLayout, got {type(layout).__name__}; "
            "make one with PackedLayout.from_lengths or PackedLayout.from_document_ids."
        )
    if pattern not in PATTERNS:
        raise ValueError(f"pattern must be one of {PATTERNS}, got {pattern!r}; pass one of them.")
    if pattern == "anchor" and layout.anchor_tokens == 0:
        raise ValueError(
            "pattern='anchor' must have an anchor to show, got a layout with anchor_tokens=0; "
            "pass pattern='intra_doc', or pack with anchor_tokens=1."
        )
    if sliding_window is not None and checked_int(sliding_window, "sliding_window") < 1:
        raise ValueError(f"sliding_window must be at least 1, got {sliding_window}; pass None for no window.")


def packed_mask_mod(
    layout: PackedLayout, pattern: Pattern = "anchor", sliding_window: int | None = None, keep_anchor: bool = True
) -> MaskMod:
    """The mask_mod of a pattern over a layout, for FlexAttention and `create_block_mask`.

    Where every document is in one piece, a query's keys are an interval behind a prefix, read from flat per-query
    tables without a load per key; interleaved documents compare ids.

    Args:
        layout: B rows of S tokens.
        pattern: "full", "intra_doc" or "anchor".
        sliding_window: the current token and this many less one before it, of the same document ("full": of the row).
        keep_anchor: the anchor stays visible outside the window; otherwise it is an ordinary token directly before
            each document.

    Returns:
        A function of (b, h, q_idx, kv_idx), to be called with indices below B and S.

    Raises:
        ValueError: an unknown pattern, the anchor pattern without an anchor, or a window below 1.
    """
    check_pattern(layout, pattern, sliding_window)
    if layout.is_interleaved and pattern != "full":
        return _id_mask_mod(layout, pattern, sliding_window, keep_anchor)
    return _interval_mask_mod(layout, pattern, sliding_window, keep_anchor)


def attended_pairs(
    layout: PackedLayout, pattern: Pattern = "anchor", sliding_window: int | None = None, keep_anchor: bool = True
) -> tuple[int, ...]:
    """Per row, how many query–key pairs a pattern attends, padding left out.

        attended_pairs(PackedLayout.from_lengths([[2, 2]]), "anchor")   (11,)

    Raises:
        ValueError: as `packed_mask_mod`.
    """
    check_pattern(layout, pattern, sliding_window)
    anchor_tokens = layout.anchor_tokens
    if pattern == "full":
        return tuple(_causal_pairs(tokens, sliding_window) for tokens in layout.row_tokens)
    free_anchor = pattern == "anchor" and keep_anchor
    before = anchor_tokens if pattern == "anchor" and not keep_anchor else 0
    return tuple(
        _causal_pairs(anchor_tokens, None if free_anchor else sliding_window)
        + sum(
            _causal_pairs(before + length, sliding_window)
            - _causal_pairs(before, sliding_window)
            + (anchor_tokens * length if free_anchor else 0)
            for length in lengths
        )
        for lengths in layout.document_lengths
    )


def reach(layout: PackedLayout, sliding_window: int | None) -> int:
    """A window in tokens that no distance in the layout exceeds: none at all, or one of 2^40, would overflow int32."""
    widest = layout.seq_len + layout.anchor_tokens
    return widest if sliding_window is None else min(int(sliding_window), widest)


def _causal_pairs(tokens: int, window: int | None) -> int:
    """Pairs of a causal triangle of `tokens`, cut to the window."""
    reach = tokens if window is None else min(int(window), tokens)
    return reach * (reach + 1) // 2 + (tokens - reach) * reach


def _interval_mask_mod(
    layout: PackedLayout, pattern: Pattern, sliding_window: int | None, keep_anchor: bool
) -> MaskMod:
    seq_len = layout.seq_len
    tables = _interval_tables(layout, pattern, sliding_window, keep_anchor)
    start, anchor_start, anchor_end = (table.flatten().to(layout.device, non_blocking=True) for table in tables)

    def interval(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        query = b * seq_len + q_idx
        causal = kv_idx <= q_idx
        own = kv_idx >= start[query]
        anchor = kv_idx < anchor_end[query]
        return causal & (own | anchor)

    def two_intervals(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        query = b * seq_len + q_idx
        causal = kv_idx <= q_idx
        own = kv_idx >= start[query]
        anchor = (kv_idx < anchor_end[query]) & (kv_idx >= anchor_start[query])
        return causal & (own | anchor)

    # Only a window that ends among several anchor tokens cuts the anchor from the left.
    cuts_anchor = sliding_window is not None and not keep_anchor and layout.anchor_tokens > 1
    return two_intervals if cuts_anchor and pattern == "anchor" else interval


def _interval_tables(
    layout: PackedLayout, pattern: Pattern, sliding_window: int | None, keep_anchor: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Per query [B, S] int32, on the host: first own key, and the bounds of the anchor tokens it sees."""
    seq_len, anchor_tokens = layout.seq_len, layout.anchor_tokens
    starts, own_tokens, later = [], [], []
    for row, tokens in zip(layout.runs, layout.row_tokens, strict=True):
        lengths = [anchor_tokens, *(run.length for run in row)]
        if pattern == "full":
            lengths = [tokens]
        elif pattern == "anchor":
            lengths[:2] = [sum(lengths[:2])]  # the anchor and the first document are one causal stretch
        starts += [0, *accumulate(lengths)]
        own_tokens += [*lengths, seq_len - tokens]
        later += [pattern == "anchor" and place > 0 for place in range(len(lengths))] + [False]
    counts = torch.tensor(own_tokens)
    start, sees_anchor = (
        torch.repeat_interleave(torch.tensor(values), counts).view(-1, seq_len) for values in (starts, later)
    )
    slots = torch.arange(seq_len)
    padding = slots >= torch.tensor(layout.row_tokens)[:, None]
    anchor_start = torch.zeros_like(start)
    anchor_end = torch.where(sees_anchor, anchor_tokens, 0)
    if sliding_window is not None:
        oldest = slots - reach(layout, sliding_window) + 1
        if pattern == "anchor" and keep_anchor:
            anchor_end = torch.where(padding, 0, anchor_tokens).expand_as(start)
        elif pattern == "anchor":
            # As if the anchor stood directly before the document: the same distances, shifted to the row's front.
            anchor_start = (oldest - start + anchor_tokens).clamp(min=0)
            anchor_end = torch.where(anchor_start < anchor_end, anchor_end, 0)
        start = torch.maximum(start, oldest)
    start = torch.where(padding, slots, start)
    return start.int(), anchor_start.int(), anchor_end.int()


def _id_mask_mod(layout: PackedLayout, pattern: Pattern, sliding_window: int | None, keep_anchor: bool) -> MaskMod:
    seq_len = layout.seq_len
    ids = layout.document_ids.flatten()
    ranks = layout.document_ranks().int().flatten()
    window = reach(layout, sliding_window)

    def visible(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        query, key = b * seq_len + q_idx, b * seq_len + kv_idx
        causal = kv_idx <= q_idx
        same = ids[query] == ids[key]
        near = ranks[query] - ranks[key] < window
        anchor = ids[key] == ANCHOR_ID
        lone = (ids[query] != PADDING_ID) | (q_idx == kv_idx)  # a padding token sees itself and nothing else
        if pattern == "intra_doc":
            seen = same & near
        elif keep_anchor:
            seen = (same & near) | anchor
        else:
            seen = (same | anchor) & near
        return causal & seen & lone

    return visible
