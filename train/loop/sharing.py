"""Processes that share rows: which rows a process reads, and which part of them it trains on.

    6 processes, 2 a row     process    0 1   2 3   4 5
                             reader     0 0   1 1   2 2      of 3: what a stream calls its rank
                             rank       0 1   0 1   0 1      of 2: both read the same rows, each takes its part

With "data" parallelism every process reads rows of its own: a rank of 1.
"""

from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from anchor_attn.masks.patterns import Pattern
from anchor_attn.parallel import parallelize
from anchor_attn.train.collator import PackedCollator, SplitCollator

DATA = "data"

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class RowSharing:
    """Where a process stands among those that share its rows.

    Attributes:
        scheme: "data", or as `parallelize`.
        ranks: processes a row.
        process: this one.
        processes: all.
    """

    scheme: Any
    ranks: int
    process: int
    processes: int

    @classmethod
    def of(cls, scheme: str, ranks_a_row: int | None, process: int, processes: int) -> "RowSharing":
        """Of a run.

        Args:
            scheme: as `Settings.parallel`.
            ranks_a_row: as `Settings.ranks_a_row`.
            process: this one.
            processes: all.

        Raises:
            ValueError: too few processes to share a row, or some that no row would have.
        """
        if scheme == DATA:
            return cls(scheme, 1, process, processes)
        if processes == 1:
            raise ValueError(
                f"parallel must be 'data' for one process, got {scheme!r}; start with torchrun --nproc-per-node 4 -m "
                "anchor_attn.cli train …"
            )
        ranks = processes if ranks_a_row is None else ranks_a_row
        if processes % ranks:
            raise ValueError(f"ranks_a_row must divide the {processes} processes, got {ranks}; change one of them.")
        return cls(scheme, ranks, process, processes)

    @property
    def rank(self) -> int:
        """This process among those of its rows."""
        return self.process % self.ranks

    @property
    def reader(self) -> int:
        """Whose rows it reads."""
        return self.process // self.ranks

    @property
    def readers(self) -> int:
        """How many different rows are read at once, a batch of them each."""
        return self.processes // self.ranks

    def spread(self, model: M, device: str) -> M:
        """A wrapped model, over the processes of a row.

        Raises:
            ValueError: as `parallelize`.
        """
        if self.ranks == 1:
            return model
        from torch.distributed.device_mesh import init_device_mesh

        mesh = init_device_mesh(device, (self.readers, self.ranks), mesh_dim_names=("reader", "sequence"))
        return parallelize(model, mesh["sequence"], self.scheme)

    def part_of(self, collator: PackedCollator, pattern: Pattern) -> PackedCollator | SplitCollator:
        """The collator of this process."""
        return collator if self.ranks == 1 else SplitCollator(collator, self.rank, self.ranks, self.scheme, pattern)

    def __str__(self) -> str:
        return "" if self.ranks == 1 else f", {self.ranks} a row by {self.scheme}"
