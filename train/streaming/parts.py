"""What a source is made of, one part a file: where each can be entered, and how it is shared out.

    files       |----- a.jsonl -----|-- b.jsonl --|- c.jsonl.gz -|
    4 shards    |     0     |     1     |     2     |     3      |     a record belongs to where its first byte lies

Every shard owns one stretch of the source, counted in bytes (rows, files): all stretches together are the source, and
there may be more shards than files. Inside its stretch a part is read by blocks, and every block from any place in it.
A part that cannot be entered in the middle – a compressed file, a file of the hub – is read by all shards whose stretch
touches it, and each record is parsed by one of them.

`datasets` shards by file, gives a whole run one example in N where files are few, and resumes behind its shuffle
buffer; it reads the hub here, and local files are read by place.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

SHARES = 2**32


class Block(NamedTuple):
    """A stretch [begin, end) of a part, in the part's own count."""

    part: int
    begin: int
    end: int


class Record(NamedTuple):
    """What one record holds, or why it holds nothing; where it stands in its part and where reading goes on."""

    content: object
    fault: str | None
    place: int
    next_place: int


class Part(Protocol):
    """One file, table or shard of a source."""

    @property
    def name(self) -> str:
        """How the user knows it."""

    @property
    def size(self) -> int:
        """How much of its source it is; shards divide the source by it."""

    def blocks(self, begin: int, end: int) -> list[tuple[int, int]]:
        """What to read for the stretch [begin, end) of `size`; stretches that touch give each record once."""

    def read(self, begin: int, end: int, place: int | None) -> Iterator[Record]:
        """The records of a block, from its front or from a `next_place` on."""

    def name_of(self, place: int) -> str:
        """The name of the record at this place, "data.jsonl:17"."""

    def sample(self) -> bytes:
        """Some of what it holds, by which a resumed run knows it again; cheap at any size."""


def shard_blocks(parts: Sequence[Part], shard: int, num_shards: int) -> list[Block]:
    """The blocks of one shard, in order; those of all shards hold every record once."""
    total = sum(part.size for part in parts)
    first, last = total * shard // num_shards, total * (shard + 1) // num_shards
    blocks, begin = [], 0
    for index, part in enumerate(parts):
        low, high = max(first - begin, 0), min(last - begin, part.size)
        if low < high:
            try:
                blocks += [Block(index, *bounds) for bounds in part.blocks(low, high)]
            except Exception:  # a broken footer: reading says so again, where bad records are counted
                blocks.append(Block(index, low, high))
        begin += part.size
    return blocks


def falls_to(index: int, begin: int, end: int, size: int) -> bool:
    """Whether the record of this number falls to the share [begin, end) of `size`: of every stretch its part.

    Source: Fibonacci hashing, Knuth, The Art of Computer Programming 3, section 6.4.
    """
    return begin <= (index * 2_654_435_769 % SHARES) * size // SHARES < end
