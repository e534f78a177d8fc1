"""A rank's part of a collated batch: tokens, positions, labels shifted beforehand, and the count that a loss needs.

    whole row        a  x1 x2  y1 y2 y3 y4        rank 0 of 2, scheme "ulysses"     rank 1
    input_ids                                     a  x1 x2 y1                       a  y2 y3 y4
    shift_labels     .  x2 .   y2 y3 y4 .         .  x2 .  y2                       .  y3 y4 .

What x2 predicts stands one token further, maybe on another rank: labels are shifted over the whole row, before it is
split. transformers takes such labels as `shift_labels`; its `labels` only say then that a loss is wanted.

The loss of the batch is a sum over labelled tokens divided by their count. A rank divides its own sum by count / ranks,
so that the mean over ranks of the losses is the batch's, and the mean of the gradients, which is what DDP and FSDP2
compute, its gradient. The gradients of the anchor's copies are summed by that as well.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from anchor_attn.attention import as_layout
from anchor_attn.masks.dialects.copied import IGNORED_LABEL
from anchor_attn.masks.layout import PackedLayout
from anchor_attn.masks.patterns import Pattern
from anchor_attn.parallel.layout import Scheme, ShardedLayout, shard_layout

COLLATED = ("input_ids", "labels", "position_ids", "document_ids")


def split_batch(
    batch: Mapping[str, Any],
    rank: int,
    ranks: int,
    scheme: Scheme = "document",
    pattern: Pattern = "anchor",
    tolerance: float | None = 0.1,
    pad_to_multiple: int = 1,
) -> dict[str, Any]:
    """The part of a batch that one of several ranks trains on; every rank splits the same batch.

        batch = PackedCollator()(rows)                                # the same on all ranks
        local = split_batch(batch, mesh.get_local_rank(), mesh.size())
        model(**local).loss.backward()                                # a model of parallelize, under DDP or FSDP2

    Args:
        batch: `input_ids` int64 [B, S], `document_ids` and, as wanted, `labels`, not shifted, and `position_ids` (of
            the whole row; continuous ones without), as `PackedCollator` gives them.
        rank: as `shard_layout`.
        ranks: as `shard_layout`.
        scheme: as `shard_layout`.
        pattern: as `shard_layout`.
        tolerance: as `shard_layout`.
        pad_to_multiple: as `shard_layout`.

    Returns:
        `input_ids` and `position_ids` of this rank's tokens, and `document_ids`, a `ShardedLayout`. With labels, also
        `labels` and `shift_labels`, and `num_items_in_batch`, the batch's labelled tokens / ranks; what the anchor
        predicts is counted on rank 0.

    Raises:
        ValueError: a tensor that it cannot split, or as `shard_layout`.
        TypeError: no layout and no ids.
    """
    if others := sorted(name for name, value in batch.items() if name not in COLLATED and isinstance(value, Tensor)):
        raise ValueError(
            f"batch must hold {', '.join(COLLATED)}, got {', '.join(others)} besides, which no rank knows its part of; "
            "leave them out."
        )
    whole = as_layout(batch["document_ids"])
    if not isinstance(whole, PackedLayout):
        raise ValueError(f"batch must be whole, got {whole}, which is a rank's part; split it once.")
    input_ids = batch["input_ids"]
    if list(input_ids.shape) != [whole.batch_size, whole.seq_len]:
        raise ValueError(
            f"document_ids must have the shape of input_ids {list(input_ids.shape)}, got "
            f"{[whole.batch_size, whole.seq_len]}; pass the ids of this batch."
        )
    layout = shard_layout(whole.to(input_ids.device), rank, ranks, scheme, pattern, tolerance, pad_to_multiple)
    given = batch.get("position_ids")
    positions = layout.position_ids() if given is None else layout.take(given, 0)
    local = {name: value for name, value in batch.items() if name not in COLLATED}
    local |= {"input_ids": layout.take(input_ids, 0), "position_ids": positions, "document_ids": layout}
    return local if batch.get("labels") is None else local | _split_labels(batch["labels"], layout)


def _split_labels(labels: Tensor, layout: ShardedLayout) -> dict[str, Tensor]:
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)
    parts = {"labels": layout.take(labels, IGNORED_LABEL), "shift_labels": layout.take(shifted, IGNORED_LABEL)}
    if layout.rank > 0:  # every rank has the anchor, one predicts from it
        for part in parts.values():
            part[:, : layout.anchor_tokens] = IGNORED_LABEL
    return {**parts, "num_items_in_batch": (shifted != IGNORED_LABEL).sum() / layout.ranks}
