"""Bytes that attention moves between the ranks of a row, by formula.

    W ranks · T tokens that travel, of all rows · H query heads · K key heads · D head size · V value size · b bytes

    all_gather   every rank receives the keys and values of all others    (W-1)/W · T · K · (D+V) · b
    ulysses      an all-to-all for query, key, value and output           (W-1)/W² · T · (H·(D+V) + K'·(D+V)) · b
    document     ulysses, of the shared documents alone                   0 where every document fits a rank

K' is K repeated until the ranks divide it. The backward sends as much again: the gradient of what was received.
"""

from typing import Literal, NamedTuple, get_args

from anchor_attn.masks.layout import PackedLayout, checked_int
from anchor_attn.masks.patterns import Pattern
from anchor_attn.parallel.balance import balance_documents
from anchor_attn.parallel.ulysses import check_heads, repeats_of

CommunicationScheme = Literal["all_gather", "ulysses", "document"]


class CommunicationBytes(NamedTuple):
    """What one rank receives for the attention of one layer, over all rows of a batch.

    Attributes:
        forward: bytes of the forward.
        backward: bytes of the backward; a forward that is computed again for checkpointing adds its own.
    """

    forward: int
    backward: int


def communication_bytes(
    layout: PackedLayout,
    scheme: CommunicationScheme,
    ranks: int,
    *,
    num_heads: int,
    head_dim: int,
    num_kv_heads: int | None = None,
    value_dim: int | None = None,
    bytes_per_value: int = 2,
    pattern: Pattern = "anchor",
    tolerance: float | None = 0.1,
) -> CommunicationBytes:
    """What attention over a batch costs in bytes under a scheme.

        layout = PackedLayout.from_lengths([[4095, 4096]])
        communication_bytes(layout, "all_gather", 2, num_heads=32, head_dim=128).forward     67_108_864
        communication_bytes(layout, "ulysses", 2, num_heads=32, head_dim=128).forward        67_108_864
        communication_bytes(layout, "document", 2, num_heads=32, head_dim=128).forward       0

    The gradients of the weights are summed over ranks besides, under any scheme. An exchange that a backend has not is
    made of others and moves more: gloo has no all-to-all, and torch's DTensor gathers W times as much there.

    Args:
        layout: the whole batch.
        scheme: "all_gather" (context parallel), "ulysses" or "document".
        ranks: that share a row.
        num_heads: query heads.
        head_dim: of query and key.
        num_kv_heads: key heads; as many as query heads when None.
        value_dim: of a value; as `head_dim` when None.
        bytes_per_value: 2 for bfloat16.
        pattern: as `balance_documents`.
        tolerance: as `balance_documents`; it decides which documents are shared.

    Raises:
        ValueError: an unknown scheme, query heads that the ranks do not divide where documents are shared, or as
            `balance_documents`.
    """
    if scheme not in get_args(CommunicationScheme):
        raise ValueError(f"scheme must be one of {get_args(CommunicationScheme)}, got {scheme!r}; pass one of them.")
    if checked_int(ranks, "ranks") < 1:
        raise ValueError(f"ranks must be at least 1, got {ranks}; pass the number of processes.")
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    sizes = head_dim + (head_dim if value_dim is None else value_dim)
    if scheme == "all_gather":
        slice_tokens = -(-layout.seq_len // ranks)
        received = (ranks - 1) * slice_tokens * layout.batch_size * kv_heads * sizes * bytes_per_value
        return CommunicationBytes(received, received)
    slice_tokens = layout.batch_size * -(-shared_tokens(layout, scheme, ranks, pattern, tolerance) // ranks)
    if slice_tokens:
        check_heads(num_heads, ranks)
    heads = (num_heads + kv_heads * repeats_of(kv_heads, ranks)) // ranks
    received = (ranks - 1) * slice_tokens * heads * sizes * bytes_per_value
    return CommunicationBytes(received, received)


def shared_tokens(
    layout: PackedLayout, scheme: Literal["ulysses", "document"], ranks: int, pattern: Pattern, tolerance: float | None
) -> int:
    """Tokens of the shared documents in the row that has most of them: other rows are padded to it."""
    if scheme == "ulysses":
        return max(map(sum, layout.document_lengths))
    return max(
        balance_documents(
            lengths, ranks, pattern=pattern, anchor_tokens=layout.anchor_tokens, tolerance=tolerance
        ).shared_tokens
        for lengths in layout.document_lengths
    )
