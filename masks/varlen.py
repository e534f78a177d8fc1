"""A packed batch for varlen kernels: boundaries of queries and of keys, and no copied query.

    row     a 1 1 1 2 2 3          queries   [a 1 1 1] [2 2]     [3]
                                   keys      [a 1 1 1] [a 2 2] [a 3]

The anchors and the first document stand side by side and are one ordinary causal segment: giving it an extra anchor
key would count the anchor twice. Every later document gets the anchor's keys in front. Causal is aligned bottom-right,
as in flash-attn since 2.1, so that query i of n sees the first `seqlen_k - n + i + 1` keys of its segment.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from anchor_attn.masks.layout import PackedLayout
from anchor_attn.masks.patterns import Pattern, check_pattern


class VarlenSegments(NamedTuple):
    """What a varlen kernel takes, and the gathers that make its inputs.

        out = kernel(q.flatten(0, 1)[s.q_indices], k.flatten(0, 1)[s.k_indices], …)      q, k: [B, S, H, D]

    Queries without a place in `q_indices` are padding. A kernel's `window_size=(W-1, 0)` is `sliding_window=W` with
    `keep_anchor=False`.

    Attributes:
        cu_seqlens_q: int32 [N + 1], where the segments of the gathered queries begin, and where the last one ends.
        cu_seqlens_k: int32 [N + 1], the same for the gathered keys.
        max_seqlen_q: queries of the longest segment, on the host.
        max_seqlen_k: keys of the longest segment, on the host.
        q_indices: int64 [Tq], into the flattened batch [B·S]; each token at most once, documents in one piece.
        k_indices: int64 [Tk], into the flattened batch; the anchors once for every document.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    q_indices: Tensor
    k_indices: Tensor


def to_varlen(layout: PackedLayout, pattern: Pattern = "anchor") -> VarlenSegments:
    """Cut a batch into the causal segments that a pattern attends within; made on the host, without a sync.

        lengths [[3, 2]], anchor     cu_seqlens_q 0 4 6     cu_seqlens_k 0 4 7     k_indices 0 1 2 3 0 4 5

    An interleaved document is one segment: its queries are gathered piece by piece, which keeps causal order.

    Args:
        layout: B rows of S tokens.
        pattern: "full" (a segment a row), "intra_doc" (the anchors are a segment of their own) or "anchor".

    Raises:
        ValueError: an unknown pattern, or the anchor pattern without an anchor.
    """
    check_pattern(layout, pattern)
    segments = segment_ranges(layout, pattern)
    queries, keys = [[ranges for ranges, _ in segments], [ranges for _, ranges in segments]]
    q_lens, k_lens = ([sum(map(len, ranges)) for ranges in side] for side in (queries, keys))
    tensors = (_boundaries(q_lens), _boundaries(k_lens), flat_indices(queries), flat_indices(keys))
    cu_q, cu_k, q_indices, k_indices = (tensor.to(layout.device, non_blocking=True) for tensor in tensors)
    return VarlenSegments(cu_q, cu_k, max(q_lens, default=0), max(k_lens, default=0), q_indices, k_indices)


def flat_indices(ranges: Sequence[Sequence[range]]) -> Tensor:
    """Ranges one after the other as int64 indices, on the host; a range is never looped over in Python."""
    flat = [part for parts in ranges for part in parts]
    lengths = torch.tensor([len(part) for part in flat], dtype=torch.int64, device="cpu")
    shifts = torch.tensor([part.start for part in flat], dtype=torch.int64, device="cpu") - (
        lengths.cumsum(0) - lengths
    )
    return torch.arange(int(lengths.sum()), device="cpu") + torch.repeat_interleave(shifts, lengths)


def document_ranges(layout: PackedLayout, row: int) -> list[list[range]]:
    """The slots of each document of a row, piece by piece: `[[range(1, 4)], [range(4, 6)]]` for lengths [3, 2]."""
    documents: dict[int, list[range]] = {}
    slot = layout.anchor_tokens
    for run in layout.runs[row]:
        documents.setdefault(run.document_id, []).append(range(slot, slot + run.length))
        slot += run.length
    return [documents[document_id] for document_id in sorted(documents)]


def segment_ranges(layout: PackedLayout, pattern: Pattern) -> list[tuple[list[range], list[range]]]:
    """The queries and the keys of each segment, as ranges of the flattened batch; several where it is interleaved."""
    return [segment for row in range(layout.batch_size) for segment in _segments(layout, row, pattern)]


def _segments(layout: PackedLayout, row: int, pattern: Pattern) -> Iterator[tuple[list[range], list[range]]]:
    front = row * layout.seq_len
    anchor = [range(front, front + layout.anchor_tokens)]
    documents = [
        [range(front + piece.start, front + piece.stop) for piece in pieces] for pieces in document_ranges(layout, row)
    ]
    if pattern == "full":
        whole = [range(front, front + layout.row_tokens[row])]
        pairs = [(whole, whole)]
    elif pattern == "intra_doc":
        pairs = [(pieces, pieces) for pieces in (anchor, *documents)]
    else:
        head = anchor + (documents[0] if documents else [])
        pairs = [(head, head), *((pieces, anchor + pieces) for pieces in documents[1:])]
    return ((queries, keys) for queries, keys in pairs if any(queries))


def _boundaries(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], device="cpu").cumsum(0).int()
