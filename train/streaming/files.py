"""Local files as parts of a source: JSON Lines, Parquet and plain text, compressed or not."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from anchor_attn.train.items import TOKENS
from anchor_attn.train.sources import SourceFile, json_row
from anchor_attn.train.streaming.parts import Part, Record, falls_to

BLOCK_BYTES = 256 * 1024  # about 190 web pages: a window of the shuffle reaches over many blocks
MOST_BLOCKS = 65_536  # of a part; those of a large one are larger
BATCH_RECORDS = 256
SAMPLES = 8  # of a file, the first and the last bytes among them
SAMPLE_BYTES = 8192


@dataclass(frozen=True)
class LinesPart:
    """JSON Lines: a line belongs to the block in which its first byte lies; places are bytes."""

    name: str
    size: int
    path: Path

    def blocks(self, begin: int, end: int) -> list[tuple[int, int]]:
        """Stretches of `BLOCK_BYTES`."""
        step = max(BLOCK_BYTES, (end - begin) // MOST_BLOCKS)
        return [(first, min(first + step, end)) for first in range(begin, end, step)]

    def read(self, begin: int, end: int, place: int | None) -> Iterator[Record]:
        """The lines that begin in [begin, end)."""
        with self.path.open("rb") as file:
            if place is not None:
                file.seek(place)
            elif begin:
                file.seek(begin - 1)
                if not file.readline(end - begin + 1).endswith(b"\n"):
                    return  # in the middle of a line that is longer than the block
            at = file.tell()
            while at < end and (line := file.readline()):
                content = json_row(line)
                if content is not None:
                    yield _line_record(content, at, at + len(line))
                at += len(line)

    def name_of(self, place: int) -> str:
        """By its line, counted only for what is named."""
        number, left = 1, place
        with self.path.open("rb") as file:
            while left > 0 and (data := file.read(min(left, 2**20))):
                number += data.count(b"\n")
                left -= len(data)
        return f"{self.name}:{number}"

    def sample(self) -> bytes:
        """As `sample_file`."""
        return sample_file(self.path)


@dataclass(frozen=True)
class CompressedLinesPart:
    """Compressed JSON Lines: read from the front by every shard that has a share in it; places are line numbers."""

    name: str
    size: int
    path: Path

    def blocks(self, begin: int, end: int) -> list[tuple[int, int]]:
        """One: nobody can enter it in the middle."""
        return [(begin, end)]

    def read(self, begin: int, end: int, place: int | None) -> Iterator[Record]:
        """Every line whose number falls to this share."""
        import fsspec  # type: ignore[import-untyped]

        with fsspec.open(str(self.path), "rb", compression="infer") as file:
            for index, line in enumerate(file):
                if index < (place or 0) or not falls_to(index, begin, end, self.size):
                    continue
                content = json_row(line)
                if content is not None:
                    yield _line_record(content, index, index + 1)

    def name_of(self, place: int) -> str:
        """By its line."""
        return f"{self.name}:{place + 1}"

    def sample(self) -> bytes:
        """As `sample_file`; the checksum of a compressed file is at its end."""
        return sample_file(self.path)


@dataclass(frozen=True)
class ParquetPart:
    """Parquet: a block is what a shard has of a row group; places are rows."""

    name: str
    size: int
    path: Path
    text_column: str

    def blocks(self, begin: int, end: int) -> list[tuple[int, int]]:
        """The row groups in the stretch, the first and the last one cut where it ends."""
        groups = self._groups
        rows = groups[-1][1] if groups else 0
        first, last = (-(-edge * rows // self.size) for edge in (begin, end))  # rounded up, alike on both sides
        cut = [(max(first, low), min(last, high)) for low, high in groups]
        return [(low, high) for low, high in cut if low < high]

    @cached_property
    def _groups(self) -> list[tuple[int, int]]:
        from pyarrow import parquet  # type: ignore[import-untyped]

        metadata = parquet.read_metadata(self.path)
        groups, row = [], 0
        for index in range(metadata.num_row_groups):
            groups.append((row, row + metadata.row_group(index).num_rows))
            row = groups[-1][1]
        return groups

    def read(self, begin: int, end: int, place: int | None) -> Iterator[Record]:
        """The rows [begin, end) of one row group."""
        from pyarrow import parquet

        wanted_from = begin if place is None else place
        with parquet.ParquetFile(self.path) as file:
            columns = file.schema_arrow.names
            wanted = [column for column in (self.text_column, TOKENS) if column in columns] or columns
            group, row = next((index, low) for index, (low, high) in enumerate(self._groups) if low <= begin < high)
            for batch in file.iter_batches(BATCH_RECORDS, row_groups=[group], columns=wanted, use_threads=False):
                if row + len(batch) > wanted_from:
                    for number, content in enumerate(batch.to_pylist(), start=row):
                        if wanted_from <= number < end:
                            yield Record(content, None, number, number + 1)
                row += len(batch)
                if row >= end:
                    return

    def name_of(self, place: int) -> str:
        """By its row."""
        return f"{self.name}:{place + 1}"

    def sample(self) -> bytes:
        """As `sample_file`."""
        return sample_file(self.path)


@dataclass(frozen=True)
class TextPart:
    """A plain file: one document."""

    name: str
    path: Path
    size: int = 1

    def blocks(self, begin: int, end: int) -> list[tuple[int, int]]:
        """The file."""
        return [(begin, end)]

    def read(self, begin: int, end: int, place: int | None) -> Iterator[Record]:
        """Its text, line ends as \\n."""
        import fsspec

        if place is not None:
            return
        with fsspec.open(str(self.path), "rb", compression="infer") as file:
            data = file.read().replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            yield Record(None, "not UTF-8", 0, 1)
        else:
            yield Record(text, None, 0, 1)

    def name_of(self, place: int) -> str:
        """The file's."""
        return self.name

    def sample(self) -> bytes:
        """As `sample_file`."""
        return sample_file(self.path)


def sample_file(path: Path) -> bytes:
    """`SAMPLES` stretches of `SAMPLE_BYTES`, evenly spread from the first byte to the last, behind the size.

    A file of up to 64 KiB is read whole; nothing where it cannot be read, for a stream counts that as a bad record.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            if size <= SAMPLES * SAMPLE_BYTES:
                return f"{size} ".encode() + file.read()
            found = [f"{size} ".encode()]
            for index in range(SAMPLES):
                file.seek((size - SAMPLE_BYTES) * index // (SAMPLES - 1))
                found.append(file.read(SAMPLE_BYTES))
            return b"".join(found)
    except OSError:
        return b""


def file_part(file: SourceFile, text_column: str) -> Part:
    """The part that a file is."""
    if file.format == "text":
        return TextPart(file.name, file.path)
    size = max(1, file.path.stat().st_size)
    if file.format == "parquet":
        return ParquetPart(file.name, size, file.path, text_column)
    return (CompressedLinesPart if file.compressed else LinesPart)(file.name, size, file.path)


def _line_record(content: dict[str, Any] | str, place: int, next_place: int) -> Record:
    if isinstance(content, str):
        return Record(None, content, place, next_place)
    return Record(content, None, place, next_place)
