"""A layout as a varlen kernel's segments, and attention by one gather of keys.

    row     a 1 1 1 2 2 3          queries   [a 1 1 1] [2 2]     [3]
                                   keys      [a 1 1 1] [a 2 2] [a 3]

Everything a step needs is on the device before it, or known on the host: nothing syncs.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from anchor_attn.engines.kernels.gather import Copies, gather_tokens
from anchor_attn.masks import PackedLayout
from anchor_attn.masks.patterns import Pattern
from anchor_attn.masks.varlen import VarlenSegments, flat_indices, to_varlen

if TYPE_CHECKING:
    from anchor_attn.engines.kernels.base import Kernel, Scoring


@dataclass(frozen=True)
class KernelPlan:
    """The segments of a pattern, with what the host knows of them.

    Attributes:
        segments: boundaries and gathers, on the device.
        q_lens: the queries of each segment.
        k_lens: the keys of each segment.
        batch_size: rows [B].
        seq_len: tokens a row [S].
        in_place: whether the gather of queries is the identity: no padding, no interleaved document.
        copies: where the anchors' keys stand once more; None where every key stands once.
    """

    segments: VarlenSegments
    q_lens: tuple[int, ...]
    k_lens: tuple[int, ...]
    batch_size: int
    seq_len: int
    in_place: bool
    copies: Copies | None

    def pack_queries(self, states: Tensor) -> Tensor:
        """[B, H, S, D] as [Tq, H, D]; a view where the tokens lie in place."""
        flat = states.transpose(1, 2).flatten(0, 1)
        return flat if self.in_place else gather_tokens(flat, self.segments.q_indices)

    def pack_keys(self, states: Tensor) -> Tensor:
        """[B, K, S, D] as [Tk, K, D], the anchor's rows once for every segment behind it."""
        if self.copies is None:
            return self.pack_queries(states)
        return gather_tokens(states.transpose(1, 2).flatten(0, 1), self.segments.k_indices, self.copies)

    def unpack_queries(self, packed: Tensor) -> Tensor:
        """[Tq, H, …] as [B, H, S, …], zeros at padding."""
        rows = packed
        if not self.in_place:
            empty = packed.new_zeros(self.batch_size * self.seq_len, *packed.shape[1:])
            rows = empty.index_copy(0, self.segments.q_indices, packed)
        return rows.unflatten(0, (self.batch_size, self.seq_len)).transpose(1, 2)


def create_kernel_plan(layout: PackedLayout, pattern: Pattern) -> KernelPlan:
    """Cut a batch for kernels, once a layout and pattern.

        lengths [[3, 2]], anchor     q_lens 4 2     k_lens 4 3

    Raises:
        ValueError: an unknown pattern, or the anchor pattern without an anchor.
    """
    return layout.plan(("kernel", pattern), lambda: _create_kernel_plan(layout, pattern))


def _create_kernel_plan(layout: PackedLayout, pattern: Pattern) -> KernelPlan:
    q_lens, k_lens = _segment_lengths(layout, pattern)
    return KernelPlan(
        segments=to_varlen(layout, pattern),
        q_lens=q_lens,
        k_lens=k_lens,
        batch_size=layout.batch_size,
        seq_len=layout.seq_len,
        copies=_create_copies(layout, q_lens, k_lens),
        in_place=sum(q_lens) == layout.batch_size * layout.seq_len and (pattern == "full" or not layout.is_interleaved),
    )


def _segment_lengths(layout: PackedLayout, pattern: Pattern) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Queries and keys of each segment; cu_seqlens says the same, but reading it would sync."""
    anchor_tokens = layout.anchor_tokens
    pairs = []
    for lengths, tokens in zip(layout.document_lengths, layout.row_tokens, strict=True):
        if pattern == "full":
            row = [(tokens, tokens)]
        elif pattern == "intra_doc":
            row = [(length, length) for length in (anchor_tokens, *lengths)]
        else:
            head = anchor_tokens + sum(lengths[:1])
            row = [(head, head), *((length, anchor_tokens + length) for length in lengths[1:])]
        pairs += [(q_len, k_len) for q_len, k_len in row if q_len]
    return tuple(q_len for q_len, _ in pairs), tuple(k_len for _, k_len in pairs)


def _create_copies(layout: PackedLayout, q_lens: tuple[int, ...], k_lens: tuple[int, ...]) -> Copies | None:
    """The anchors' copies in front of the segments that have more keys than queries."""
    if q_lens == k_lens:
        return None
    own, places, start = [], [], 0
    for q_len, k_len in zip(q_lens, k_lens, strict=True):
        places.append(range(start, start + k_len - q_len))
        own.append(range(start + k_len - q_len, start + k_len))
        start += k_len
    own_places, copied_places = (
        flat_indices([ranges]).to(layout.device, non_blocking=True) for ranges in (own, places)
    )
    return Copies(
        own=own_places,
        places=copied_places,
        per_row=tuple(layout.anchor_tokens * max(0, len(lengths) - 1) for lengths in layout.document_lengths),
        anchor_tokens=layout.anchor_tokens,
        seq_len=layout.seq_len,
    )


def attend_gathered(
    query: Tensor, key: Tensor, value: Tensor, plan: KernelPlan, kernel: "Kernel", scoring: "Scoring"
) -> Tensor:
    """Attention with the anchor joined to each later document's keys; no query is copied.

    A window counts the anchor as an ordinary token directly before the document (`keep_anchor=False`).

    Args:
        query: [B, H, S, D].
        key: [B, K, S, D].
        value: [B, K, S, V].
        plan: of the pattern that is asked for.
        kernel: what computes it.
        scoring: what is made of the scores.

    Returns:
        [B, H, S, V], zeros at padding; the gather sums the anchor's gradients.
    """
    if not plan.q_lens:
        return value.new_zeros(*query.shape[:3], value.shape[-1])
    q, k, v = plan.pack_queries(query), plan.pack_keys(key), plan.pack_keys(value)
    return plan.unpack_queries(kernel.forward(q, k, v, plan, scoring))
