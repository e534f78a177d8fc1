"""The dense mask, straight from the definition: the oracle that every faster form is compared with."""

import torch
from torch import Tensor

from anchor_attn.masks.layout import ANCHOR_ID, PADDING_ID, PackedLayout
from anchor_attn.masks.patterns import Pattern, check_pattern, reach


def dense_mask(
    layout: PackedLayout, pattern: Pattern = "anchor", sliding_window: int | None = None, keep_anchor: bool = True
) -> Tensor:
    """Who may attend to whom, as a boolean matrix a row.

        ids  0 1 1 2 2
        0    x . . . .
        1    x x . . .
        1    x x x . .
        2    x . . x .
        2    x . . x x

    Padding sees itself and nothing else, so that no row of the mask is empty.

    Args:
        layout: B rows of S tokens.
        pattern: "full" (kv ≤ q), "intra_doc" (and the same document) or "anchor" (or kv is an anchor token).
        sliding_window: the current token and this many less one before it, of the same document ("full": of the row).
        keep_anchor: the anchor stays visible outside the window; otherwise it is an ordinary token directly before
            each document.

    Returns:
        bool [B, S, S] on the layout's device, True where query (dim 1) may attend to key (dim 2).

    Raises:
        ValueError: an unknown pattern, the anchor pattern without an anchor, or a window below 1.
    """
    check_pattern(layout, pattern, sliding_window)
    slots = torch.arange(layout.seq_len, device=layout.device)
    ids, ranks = layout.document_ids, layout.document_ranks()
    causal = slots[None, :] <= slots[:, None]
    same = ids[:, :, None] == ids[:, None, :]
    anchor_key = (ids == ANCHOR_ID)[:, None, :]
    padding_query = (ids == PADDING_ID)[:, :, None]

    distance = slots[:, None] - slots[None, :] if pattern == "full" else ranks[:, :, None] - ranks[:, None, :]
    near = distance < reach(layout, sliding_window)
    if pattern == "full":
        seen = near.expand_as(same)
    elif pattern == "intra_doc":
        seen = same & near
    elif keep_anchor:
        seen = (same & near) | anchor_key
    else:
        seen = (same | anchor_key) & near
    itself = slots[None, :] == slots[:, None]
    return torch.where(padding_query, itself, causal & seen)
