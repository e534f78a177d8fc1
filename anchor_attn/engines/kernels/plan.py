"""A layout as a varlen kernel's segments.

    row     a 1 1 1 2 2 3          queries   [a 1 1 1] [2 2]     [3]
                                   keys      [a 1 1 1] [a 2 2] [a 3]

Everything a step needs is on the device before it, or known on the host: nothing syncs.
"""

from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor

from anchor_attn.engines.kernels.gather import AnchoredKeys, GatherKeys, GatherQueries, Places, spread
from anchor_attn.masks import PackedLayout
from anchor_attn.masks.patterns import Pattern
from anchor_attn.masks.varlen import VarlenSegments, segment_ranges, to_varlen


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
        anchored: how keys come from tokens; None where they are packed as queries are.
    """

    segments: VarlenSegments
    q_lens: tuple[int, ...]
    k_lens: tuple[int, ...]
    batch_size: int
    seq_len: int
    in_place: bool
    anchored: AnchoredKeys | None

    def pack_queries(self, states: Tensor) -> Tensor:
        """[B, H, S, D] as [Tq, H, D]; a view where the tokens lie in place."""
        flat = states.transpose(1, 2).flatten(0, 1)
        return flat if self.in_place else GatherQueries.apply(flat, self.segments.q_indices)

    def pack_keys(self, states: Tensor) -> Tensor:
        """[B, K, S, D] as [Tk, K, D], the anchor's rows once for every segment behind it."""
        if self.anchored is None:
            return self.pack_queries(states)
        return GatherKeys.apply(states.transpose(1, 2).flatten(0, 1), self.anchored)

    def unpack_queries(self, packed: Tensor) -> Tensor:
        """[Tq, H, …] as [B, H, S, …], zeros at padding."""
        tokens = self.batch_size * self.seq_len
        rows = packed if self.in_place else spread(packed, self.segments.q_indices, tokens)
        return rows.unflatten(0, (self.batch_size, self.seq_len)).transpose(1, 2)


def create_kernel_plan(layout: PackedLayout, pattern: Pattern) -> KernelPlan:
    """Cut a batch for kernels, once a layout and pattern.

        lengths [[3, 2]], anchor     q_lens 4 2     k_lens 4 3

    Raises:
        ValueError: an unknown pattern, or the anchor pattern without an anchor.
    """
    return layout.plan(("kernel", pattern), lambda: _create_kernel_plan(layout, pattern))


def _create_kernel_plan(layout: PackedLayout, pattern: Pattern) -> KernelPlan:
    ranges = segment_ranges(layout, pattern)
    q_lens, k_lens = (tuple(sum(map(len, segment[side])) for segment in ranges) for side in (0, 1))
    segments = to_varlen(layout, pattern)
    in_place = sum(q_lens) == layout.batch_size * layout.seq_len and (pattern == "full" or not layout.is_interleaved)
    anchored = None
    if q_lens != k_lens:
        own, copies = [], []
        for start, q_len, k_len in zip(accumulate(k_lens, initial=0), q_lens, k_lens, strict=False):
            copies.append(range(start, start + k_len - q_len))
            own.append(range(start + k_len - q_len, start + k_len))
        anchored = AnchoredKeys(
            keys=Places(tuple(part for _, keys in ranges for part in keys), segments.k_indices),
            own=Places.of(own, layout.device),
            copies=Places.of(copies, layout.device),
            copies_per_row=tuple(
                layout.anchor_tokens * max(0, len(lengths) - 1) for lengths in layout.document_lengths
            ),
            anchor_tokens=layout.anchor_tokens,
            seq_len=layout.seq_len,
            q_indices=None if in_place else segments.q_indices,
        )
    return KernelPlan(segments, q_lens, k_lens, layout.batch_size, layout.seq_len, in_place, anchored)


def padding_alone(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What a batch of nothing but padding gives: zeros [B, H, S, V] that a backward can still begin from."""
    nothing = query[..., :0].sum() + key[..., :0].sum() + value[..., :0].sum()
    return value.new_zeros(*query.shape[:3], value.shape[-1]) + nothing
