"""Where documents lie: files, folders and the hub, read through `datasets`, one item a document or a fault."""

import json
import re
from collections.abc import Iterator
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from anchor_attn.train.items import TOKENS, Found, Skipped, one_line

if TYPE_CHECKING:
    from datasets import IterableDataset

_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4")


class SourceFile(NamedTuple):
    """A file to read, and what is in it: "json" (JSON Lines), "parquet" or "text"."""

    name: str
    path: Path
    format: str

    @property
    def compressed(self) -> bool:
        """Whether it has to be read from its front."""
        return self.path.suffix.lower() in _COMPRESSED


def read_path(path: Path, text_column: str) -> Iterator[Found | Skipped]:
    """What a file or a folder holds, in the order of its paths.

    Raises:
        ValueError: a file of rows that cannot be read to its end.
    """
    for file in list_files(path):
        if isinstance(file, Skipped):
            yield file
        else:
            yield from _read_file(file.path, file.name, text_column)


def list_files(path: Path) -> Iterator[SourceFile | Skipped]:
    """A file, or the visible files of a folder in the order of their paths; where any holds rows, no plain text."""
    if not path.is_dir():
        yield SourceFile(path.name, path, _file_format(path))
        return
    files = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if not file.is_dir()}
    visible = [name for name in sorted(files) if not re.search(r"(^|/)\.", name)]
    has_rows = any(_file_format(files[name]) != "text" for name in visible)
    for name in visible:
        file_format = _file_format(files[name])
        if not files[name].is_file():
            yield Skipped(name, "not a regular file")
        elif has_rows and file_format == "text":
            yield Skipped(name, "text file in a folder of rows")
        else:
            yield SourceFile(name, files[name], file_format)


def _file_format(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in _COMPRESSED]
    return {".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet"}.get(
        suffixes[-1] if suffixes else "", "text"
    )


def _read_file(path: Path, name: str, text_column: str) -> Iterator[Found | Skipped]:
    file_format = _file_format(path)
    if file_format == "text":
        try:
            text = next(_stream_bytes(path, "document"))
        except Exception as error:  # one document; whatever the file system or a decompressor has to say about it
            yield Skipped(name, f"file that cannot be read, {type(error).__name__}")
        else:
            yield _decoded(name, name, text)
        return
    rows = _json_rows(path, name) if file_format == "json" else _parquet_rows(path, name, text_column)
    found = False
    try:
        for row in rows:
            found = True
            yield row
        if not found:
            yield Skipped(name, "empty file")
    except Exception as error:  # how many documents are behind this point is unknown, so that it must not pass
        raise ValueError(
            f"source must be readable to its end, got {name!r} ({one_line(error)}); "
            f"write the {'JSON Lines' if file_format == 'json' else 'Parquet'} file again."
        ) from error


def _stream_bytes(path: Path, sample_by: str) -> Iterator[bytes]:
    """The lines of a file, or all of it, as bytes with \\n for every line end."""
    from datasets import Dataset

    # Not load_dataset: once a file it asks a server to count the load, and waits up to 3 s where none answers.
    # latin-1 maps every byte to a character and back: one undecodable line does not end the file.
    rows = Dataset.from_text(_pattern(path), streaming=True, encoding="latin-1", sample_by=sample_by)
    return (row["text"].encode("latin-1") for row in rows)


def _pattern(path: Path) -> str:
    return escape(str(path.absolute()))  # datasets takes wildcards: unescaped brackets match nothing and give no row


def _decoded(name: str, file: str, data: bytes) -> Found | Skipped:
    try:
        return Found(name, file, data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return Skipped(name, "not UTF-8")


def _json_rows(path: Path, file: str) -> Iterator[Found | Skipped]:
    for number, line in enumerate(_stream_bytes(path, "line"), start=1):
        name, row = f"{file}:{number}", json_row(line)
        if row is not None:
            yield Skipped(name, row) if isinstance(row, str) else Found(name, file, row)


def json_row(line: bytes) -> dict[str, Any] | str | None:
    """What a line of JSON Lines holds: a row, why it is none, or None where it is blank."""
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError:
        return "not UTF-8"
    if not text or text.isspace():
        return None
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return "not JSON"
    return row if isinstance(row, dict) else "not a JSON object"


def _parquet_rows(path: Path, file: str, text_column: str) -> Iterator[Found | Skipped]:
    from datasets import Dataset
    from pyarrow import parquet  # type: ignore[import-untyped]

    # The schema first: datasets would log a broken file before it raises.
    columns = parquet.read_schema(path).names
    wanted = [column for column in (text_column, TOKENS) if column in columns] or columns  # images need not be decoded
    rows = Dataset.from_parquet(_pattern(path), streaming=True, columns=wanted)
    yield from (Found(f"{file}:{number}", file, row) for number, row in enumerate(rows, start=1))


def read_hub(name: str, subset: str | None, split: str, text_column: str) -> Iterator[Found | Skipped]:
    """The rows of a dataset of the hub, streamed.

    Raises:
        ValueError: the hub does not give it.
    """
    rows = load_hub(name, subset, split, text_column)
    try:
        yield from (Found(f"{name}:{number}", name, row) for number, row in enumerate(rows, start=1))
    except Exception as error:  # datasets, huggingface_hub, pyarrow and the network each have their own
        raise _hub_error(name, subset, split, error) from error


def load_hub(name: str, subset: str | None, split: str, text_column: str, called: str = "source") -> "IterableDataset":
    """A dataset of the hub, to be streamed, with the columns that are read; `called` is what an error names.

    Raises:
        ValueError: the hub does not give it.
    """
    from datasets import load_dataset

    try:
        rows = load_dataset(name, subset, split=split, streaming=True)
        wanted = [column for column in (text_column, TOKENS) if column in (rows.column_names or ())]
        return rows.select_columns(wanted) if wanted else rows
    except Exception as error:
        raise _hub_error(name, subset, split, error, called) from error


def _hub_error(name: str, subset: str | None, split: str, error: Exception, called: str = "source") -> ValueError:
    return ValueError(
        f"{called} must be a path or a dataset that the hub can give, got {name!r} ({one_line(error)}); "
        f"check the name, split={split!r}, subset={subset!r} and the network."
    )
