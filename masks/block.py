"""BlockMasks for FlexAttention."""

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from anchor_attn.masks.layout import PackedLayout, checked_int
from anchor_attn.masks.patterns import Pattern, check_pattern, packed_mask_mod


def create_packed_block_mask(
    layout: PackedLayout,
    pattern: Pattern = "anchor",
    block_size: int | tuple[int, int] = 128,
    sliding_window: int | None = None,
    keep_anchor: bool = True,
    anchor_column: bool = True,
    device: torch.device | str | None = None,
) -> BlockMask:
    """A FlexAttention BlockMask of a pattern over a layout.

    Built by torch's `create_block_mask`, which evaluates S × S: 32K tokens take seconds and gigabytes on a CPU.

    Args:
        layout: B rows of S tokens.
        pattern: "full", "intra_doc" or "anchor".
        block_size: tokens a block, for queries and keys or as a pair.
        sliding_window: as in `dense_mask`.
        keep_anchor: as in `dense_mask`.
        anchor_column: whether documents see the anchor through the table. Without it the table is that of
            "intra_doc", for an engine that adds the anchor afterwards.
        device: where the tables go; the layout's own device when None.

    Raises:
        ValueError: an unknown pattern, the anchor pattern without an anchor, or a window or a block size below 1.
    """
    check_pattern(layout, pattern, sliding_window)
    sizes = block_size if isinstance(block_size, tuple) else (block_size, block_size)
    if len(sizes) != 2:
        raise ValueError(f"block_size must be one size or a pair, got {block_size}; pass (128, 128), say.")
    for size in sizes:
        if checked_int(size, "block_size") < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}; pass 128, FlexAttention's own.")
    if pattern == "anchor" and not anchor_column:
        pattern = "intra_doc"
    layout = layout if device is None else layout.to(device)
    mask_mod = packed_mask_mod(layout, pattern, sliding_window, keep_anchor)
    return create_block_mask(
        mask_mod, layout.batch_size, None, layout.seq_len, layout.seq_len, str(layout.device), block_size
    )
