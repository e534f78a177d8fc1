"""A rank's part of a packed batch: its own documents behind its own anchor, and a slice of those that ranks share.

    B rows · A anchor tokens · W ranks · n tokens a row of shared documents, a multiple of W

    whole row      a 1 1 1 2 2 2 2 3 3 3     lengths [3, 4, 3], two ranks: document 2 is shared
    rank 0         a 1 1 1 | 2 2             attends within [a 1 1 1], and in half of the heads within [a 2 2 2 2]
    rank 1         a 3 3 3 | 2 2             attends within [a 3 3 3], and in the other half within the same

The anchor attends to itself only, so that its state is the same on every rank, layer by layer: a copy costs a token and
spares all communication. Under the scheme "ulysses" every document is shared.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from anchor_attn.masks.layout import ANCHOR_ID, PADDING_ID, PackedLayout, PositionPolicy, Run, checked_int
from anchor_attn.masks.patterns import Pattern, check_pattern
from anchor_attn.masks.varlen import flat_indices
from anchor_attn.parallel.balance import SHARED, balance_documents

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Scheme = Literal["document", "ulysses"]
SCHEMES = ("document", "ulysses")
NO_SLOT = -1


@dataclass(frozen=True, eq=False)
class ShardedLayout:
    """Which tokens of a packed batch a rank holds; `shard_layout` makes it, `anchor_attention` and `wrap` take it.

    It is no `PackedLayout`: a function that knows nothing of ranks refuses it, and cannot mistake it for a whole row.

    Attributes:
        whole: the layout of the whole batch.
        own: of this rank's documents behind its anchor; None where it holds neither.
        shared: of the shared documents behind the anchor, the same on all ranks, of A + n tokens; None without any.
        slots: int64 [B, S of this rank], each token's slot in its whole row; -1 for padding.
        scheme: "document" or "ulysses".
        rank: this one.
        ranks: how many there are.
        mesh: the ranks, one-dimensional; needed where documents are shared.
    """

    whole: PackedLayout
    own: PackedLayout | None
    shared: PackedLayout | None
    slots: Tensor
    scheme: Scheme
    rank: int
    ranks: int
    mesh: "DeviceMesh | None" = None

    @property
    def batch_size(self) -> int:
        """Rows [B]."""
        return self.slots.shape[0]

    @property
    def seq_len(self) -> int:
        """Tokens that this rank holds of each row, its anchor and padding included."""
        return self.slots.shape[1]

    @property
    def own_tokens(self) -> int:
        """Tokens in front of the slice of the shared documents."""
        return self.own.seq_len if self.own is not None else 0

    @property
    def anchor_tokens(self) -> int:
        """Anchor tokens at the front of every rank's rows."""
        return self.whole.anchor_tokens

    @property
    def device(self) -> torch.device:
        """Where `slots` lies."""
        return self.slots.device

    @property
    def document_lengths(self) -> tuple[tuple[int, ...], ...]:
        """Of the whole rows, as `PackedLayout.document_lengths`."""
        return self.whole.document_lengths

    @property
    def document_ids(self) -> Tensor:
        """The ids that this rank's tokens have in the whole rows, int32 [B, S of this rank]."""
        return self.take(self.whole.document_ids, PADDING_ID)

    def position_ids(self, policy: PositionPolicy = "continuous") -> Tensor:
        """The positions that this rank's tokens have in the whole rows; else as `PackedLayout.position_ids`."""
        return self.take(self.whole.position_ids(policy), 0)

    def take(self, values: Tensor, padding: int) -> Tensor:
        """This rank's part of a tensor with a value a token [B, S], in the order of its slots."""
        own = values.expand(self.batch_size, -1).gather(1, self.slots.clamp(min=0))
        return own.masked_fill(self.slots == NO_SLOT, padding)

    def bind(self, mesh: "DeviceMesh") -> "ShardedLayout":
        """The same layout, with the ranks to exchange shared documents with.

        Raises:
            ValueError: a mesh of several dimensions, or one in which this rank is another.
        """
        check_mesh(mesh)
        if (mesh.size(), mesh.get_local_rank()) != (self.ranks, self.rank):
            raise ValueError(
                f"mesh must have the ranks that the batch was split for, rank {self.rank} of {self.ranks}, got rank "
                f"{mesh.get_local_rank()} of {mesh.size()}; split it for this process."
            )
        return replace(self, mesh=mesh)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "ShardedLayout":
        """The same layout with its tensors on `device`; Trainer and Accelerate call this on a batch."""
        slots = self.slots.to(device, non_blocking=non_blocking)
        if slots is self.slots:
            return self
        whole = self.whole.to(device, non_blocking)
        own, shared = (part and part.to(device, non_blocking) for part in (self.own, self.shared))
        return replace(self, whole=whole, own=own, shared=shared, slots=slots)

    def pin_memory(self) -> "ShardedLayout":
        """The same layout in page-locked memory, as a `DataLoader(pin_memory=True)` asks for."""
        own, shared = (part and part.pin_memory() for part in (self.own, self.shared))
        return replace(self, whole=self.whole.pin_memory(), own=own, shared=shared, slots=self.slots.pin_memory())

    def __repr__(self) -> str:
        shared = 0 if self.shared is None else sum(map(sum, self.shared.document_lengths))
        return (
            f"ShardedLayout(rank={self.rank}, ranks={self.ranks}, scheme={self.scheme!r}, batch_size="
            f"{self.batch_size}, seq_len={self.seq_len}, shared_tokens={shared}, device='{self.device}')"
        )


def check_mesh(mesh: "DeviceMesh") -> None:
    """Raise a ValueError for a mesh of several dimensions."""
    if mesh.ndim != 1:
        raise ValueError(
            f"mesh must have one dimension, got {mesh.ndim} ({mesh.mesh_dim_names}); pass the one that ranks of a row "
            "lie along, as in mesh['sequence']."
        )


def shard_layout(
    layout: PackedLayout,
    rank: int,
    ranks: int,
    scheme: Scheme = "document",
    pattern: Pattern = "anchor",
    tolerance: float | None = 0.1,
    pad_to_multiple: int = 1,
) -> ShardedLayout:
    """The part of a packed batch that one of several ranks computes; made on the host, without a sync.

        layout = PackedLayout.from_lengths([[2, 4, 3]])
        shard_layout(layout, 0, 2, "ulysses").slots           0 1 2 3 4 5    [a] and half of the documents
        shard_layout(layout, 1, 2, tolerance=None).slots      0 1 2 7 8 9    [a], the first and the last document

    Args:
        layout: the whole batch, the same on all ranks.
        rank: which part, 0 … ranks - 1.
        ranks: how many share a row.
        scheme: "document" (whole documents, balanced by `balance_documents`) or "ulysses" (every document is shared).
        pattern: that will be asked for; "full" needs "ulysses".
        tolerance: as `balance_documents`.
        pad_to_multiple: pad this rank's rows to a multiple of so many tokens.

    Raises:
        ValueError: an unknown scheme, or a rank, pattern, tolerance or multiple that does not fit.
    """
    check_pattern(layout, pattern)
    check_scheme(scheme)
    if not 0 <= checked_int(rank, "rank") < checked_int(ranks, "ranks"):
        raise ValueError(f"rank must lie in [0, ranks), got {rank} of {ranks}; pass this process's place in the mesh.")
    if checked_int(pad_to_multiple, "pad_to_multiple") < 1:
        raise ValueError(f"pad_to_multiple must be at least 1, got {pad_to_multiple}; pass 1 for no padding.")
    anchor_tokens = layout.anchor_tokens
    own_parts, shared_parts = [], []
    for row, lengths in enumerate(layout.document_lengths):
        owners: Sequence[int] = [SHARED] * len(lengths)
        if scheme == "document":
            owners = balance_documents(
                lengths, ranks, pattern=pattern, anchor_tokens=anchor_tokens, tolerance=tolerance
            ).rank_of
        own_parts.append(_part(layout, row, owners, rank))
        shared_parts.append(_part(layout, row, owners, SHARED))
    slice_tokens = -(-max(part.tokens for part in shared_parts) // ranks)
    own_tokens = anchor_tokens + max(part.tokens for part in own_parts)
    if not own_tokens + slice_tokens:
        own_tokens = 1  # a rank without a token still runs every layer: collectives of others wait for it
    own_tokens += -(own_tokens + slice_tokens) % pad_to_multiple
    anchor = range(anchor_tokens)
    own_slots = torch.stack([_padded([anchor, *part.slots], own_tokens) for part in own_parts])
    shared_slots = torch.stack([_padded(part.slots, ranks * slice_tokens) for part in shared_parts])
    slots = torch.cat([own_slots, shared_slots[:, rank * slice_tokens :][:, :slice_tokens]], dim=1)
    own = _layout_of(own_parts, anchor_tokens, own_tokens) if own_tokens else None
    shared = _layout_of(shared_parts, anchor_tokens, anchor_tokens + ranks * slice_tokens) if slice_tokens else None
    return ShardedLayout(
        whole=layout,
        own=own and own.to(layout.device),
        shared=shared and shared.to(layout.device),
        slots=slots.to(layout.device, non_blocking=True),
        scheme=scheme,
        rank=rank,
        ranks=ranks,
    )


def check_scheme(scheme: str) -> None:
    """Raise a ValueError unless the scheme is known."""
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {SCHEMES}, got {scheme!r}; pass one of them.")


class _Part(NamedTuple):
    """Some documents of a row, numbered anew: their runs, and the slots that they have in the row."""

    runs: tuple[Run, ...]
    slots: list[range]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.slots))


def _part(layout: PackedLayout, row: int, owners: Sequence[int], owner: int) -> _Part:
    runs, slots = list[Run](), list[range]()
    numbers: dict[int, int] = {}
    slot = layout.anchor_tokens
    for document_id, length in layout.runs[row]:
        if owners[document_id - 1] == owner:
            number = numbers.setdefault(document_id, len(numbers) + 1)
            # What lay between two pieces may be another rank's: then they are one.
            before = runs.pop().length if runs and runs[-1].document_id == number else 0
            runs.append(Run(number, before + length))
            slots.append(range(slot, slot + length))
        slot += length
    return _Part(tuple(runs), slots)


def _padded(ranges: Sequence[range], tokens: int) -> Tensor:
    slots = flat_indices([ranges])
    return torch.nn.functional.pad(slots, (0, tokens - len(slots)), value=NO_SLOT)


def _layout_of(parts: Sequence[_Part], anchor_tokens: int, seq_len: int) -> PackedLayout:
    ids, counts = list[int](), list[int]()
    for part in parts:
        ids += [ANCHOR_ID, *(run.document_id for run in part.runs), PADDING_ID]
        counts += [anchor_tokens, *(run.length for run in part.runs), seq_len - anchor_tokens - part.tokens]
    document_ids = torch.repeat_interleave(
        torch.tensor(ids, dtype=torch.int32, device="cpu"), torch.tensor(counts, device="cpu")
    ).view(len(parts), seq_len)
    return PackedLayout(document_ids, anchor_tokens, tuple(part.runs for part in parts))
