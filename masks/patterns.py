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
from typing import Literal

import torch
from torch import Tensor

from anchor_attn.masks.layout import ANCHOR_ID, PADDING_ID, PackedLayout, checked_int

Pattern = Literal["full", "intra_doc", "anchor"]
PATTERNS: tuple[Pattern, ...] = ("full", "intra_doc", "anchor")

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def check_pattern_name(pattern: str) -> None:
    """Raise a ValueError unless the pattern is known."""
    if pattern not in PATTERNS:
        raise ValueError(f"pattern must be one of {PATTERNS}, got {pattern!r}; pass one of them.")


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
    check_pattern_name(pattern)
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
    widest = tokens if window is None else min(int(window), tokens)
    return widest * (widest + 1) // 2 + (tokens - widest) * widest


def stretch_bounds(layout: PackedLayout, pattern: Pattern) -> Tensor:
    """Where the stretches of each row begin and end whose queries see each other causally; int64 [B, N + 1], host.

        stretch_bounds(PackedLayout.from_lengths([[3, 2]], seq_len=7), "anchor")   0 4 6 7

    The row's padding is the last stretch, and shorter rows have empty ones behind it. Under "anchor" the first document
    stands directly behind the anchor and makes one stretch with it; later documents see the anchor besides. For
    layouts without interleaved documents, or the pattern "full".
    """
    return layout.plan(("stretch_bounds", pattern), lambda: _stretch_bounds(layout, pattern))


def _stretch_bounds(layout: PackedLayout, pattern: Pattern) -> Tensor:
    rows = []
    for runs, tokens in zip(layout.runs, layout.row_tokens, strict=True):
        lengths = [layout.anchor_tokens, *(run.length for run in runs)]
        if pattern == "full":
            lengths = [tokens]
        elif pattern == "anchor":
            lengths[:2] = [sum(lengths[:2])]
        rows.append([0, *lengths, layout.seq_len - tokens])
    longest = max(map(len, rows))
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows], device="cpu").cumsum(dim=1)


def _interval_mask_mod(
    layout: PackedLayout, pattern: Pattern, sliding_window: int | None, keep_anchor: bool
) -> MaskMod:
    seq_len = layout.seq_len
    start, anchor_start, anchor_end = _interval_tables(layout, pattern, sliding_window, keep_anchor)

    # A closure must hold tensors and nothing optional, or FlexAttention's lowering fails: three functions.
    def stretch(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (kv_idx <= q_idx) & (kv_idx >= start[b * seq_len + q_idx])

    if anchor_end is None:
        return stretch

    def interval(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        query = b * seq_len + q_idx
        causal = kv_idx <= q_idx
        own = kv_idx >= start[query]
        anchor = kv_idx < anchor_end[query]
        return causal & (own | anchor)

    if anchor_start is None:
        return interval

    def two_intervals(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        query = b * seq_len + q_idx
        causal = kv_idx <= q_idx
        own = kv_idx >= start[query]
        anchor = (kv_idx < anchor_end[query]) & (kv_idx >= anchor_start[query])
        return causal & (own | anchor)

    return two_intervals


def _interval_tables(
    layout: PackedLayout, pattern: Pattern, sliding_window: int | None, keep_anchor: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Per query, flat int32 [B · S] on the layout's device: first own key, and the bounds of the anchor that it sees.

    The bounds are None where no pattern needs them. Made where they are used, from one small number a document.
    """
    seq_len, anchor_tokens, device = layout.seq_len, layout.anchor_tokens, layout.device
    bounds = stretch_bounds(layout, pattern).to(device, non_blocking=True)
    begin = start = torch.repeat_interleave(
        bounds[:, :-1].int().flatten(), bounds.diff().flatten(), output_size=layout.batch_size * seq_len
    )
    anchor_start = anchor_end = None
    if sliding_window is not None:
        slots = torch.arange(seq_len, dtype=torch.int32, device=device)
        oldest = (slots - (reach(layout, sliding_window) - 1)).repeat(layout.batch_size)
        start = torch.maximum(begin, oldest)
    if pattern == "anchor":
        # The first stretch begins at slot 0, with the anchor among its own keys; the others begin behind it.
        anchor_end = begin.clamp(max=anchor_tokens)
        if sliding_window is not None and keep_anchor:
            anchor_end = torch.full_like(begin, anchor_tokens)  # a window may cut it off the first stretch too
        elif sliding_window is not None:
            # As if the anchor stood directly before the document: the same distances, shifted to the row's front.
            anchor_start = (oldest - begin + anchor_tokens).clamp(min=0)
            anchor_end = torch.where(anchor_start < anchor_end, anchor_end, 0)
    for row, tokens in enumerate(layout.row_tokens):
        padding = slice(row * seq_len + tokens, (row + 1) * seq_len)
        start[padding] = torch.arange(tokens, seq_len, dtype=torch.int32, device=device)
        if anchor_end is not None:
            anchor_end[padding] = 0
    # Only a window that ends among several anchor tokens cuts the anchor from the left.
    return start, anchor_start if anchor_tokens > 1 else None, anchor_end


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
