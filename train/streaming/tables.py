"""Datasets as parts of a source: documents in memory, and what the hub streams."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from anchor_attn.train.streaming.parts import Record, falls_to

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

BATCH_RECORDS = 256
SAMPLES = 64


@dataclass(frozen=True)
class TablePart:
    """Documents in memory or a dataset on disk, by row."""

    name: str
    dataset: "Dataset"

    @property
    def size(self) -> int:
        """Its rows."""
        return len(self.dataset)

    def blocks(self, begin: int, end: int) -> list[tuple[int, int]]:
        """Stretches of `BATCH_RECORDS` rows."""
        return [(first, min(first + BATCH_RECORDS, end)) for first in range(begin, end, BATCH_RECORDS)]

    def read(self, begin: int, end: int, place: int | None) -> Iterator[Record]:
        """The rows [begin, end)."""
        begin = begin if place is None else place
        for number, row in enumerate(_rows(self.dataset[begin:end]), start=begin):
            yield Record(row, None, number, number + 1)

    def name_of(self, place: int) -> str:
        """What its column `name` says, or its row."""
        return str(self.dataset[place].get("name", f"{self.name}:{place + 1}"))

    def sample(self) -> bytes:
        """`SAMPLES` rows, evenly spread from the first to the last; all of them where there are no more."""
        count = min(SAMPLES, self.size)
        places = [(self.size - 1) * index // max(count - 1, 1) for index in range(count)]
        return repr(self.dataset[places]).encode("utf-8", "backslashreplace") if places else b""


@dataclass(frozen=True)
class HubPart:
    """One shard of a dataset that `datasets` streams; places are its examples."""

    name: str
    dataset: "IterableDataset"
    shard: int
    size: int = 2**16

    def blocks(self, begin: int, end: int) -> list[tuple[int, int]]:
        """One: nobody can enter it in the middle."""
        return [(begin, end)]

    def read(self, begin: int, end: int, place: int | None) -> Iterator[Record]:
        """Every example whose number falls to this share."""
        rows = self.dataset.shard(self.dataset.num_shards, self.shard).skip(place or 0)
        index = place or 0
        # Not iter(rows): inside a DataLoader's worker that gives the worker its part of the shards once more.
        for batch in rows.iter(BATCH_RECORDS):
            for row in _rows(batch):
                if falls_to(index, begin, end, self.size):
                    yield Record(row, None, index, index + 1)
                index += 1

    def name_of(self, place: int) -> str:
        """By its shard and example."""
        return f"{self.name}, shard {self.shard}:{place + 1}"

    def sample(self) -> bytes:
        """Nothing: the hub would be asked for it."""
        return b""


def _rows(batch: Mapping[str, list[Any]]) -> Iterator[dict[str, Any]]:
    for values in zip(*batch.values(), strict=True):
        yield dict(zip(batch, values, strict=True))
