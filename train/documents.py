"""Documents: what is read from a file, a folder, the hub or the standard library, and what had to be left out."""

import hashlib
import platform
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from anchor_attn.train.embedded import read_stdlib, read_stdlib_files
from anchor_attn.train.items import TOKENS, Found, Skipped
from anchor_attn.train.sources import read_hub, read_path

if TYPE_CHECKING:
    from datasets import Dataset

EMBEDDED = {"stdlib": read_stdlib, "stdlib-files": read_stdlib_files}
MAX_TOKEN_ID = 2**31 - 1
BATCH_ROWS = 1_000
NAMED_IN_META = 20

_HUB_NAME = re.compile(r"[\w-]+(/[\w-][\w.-]*)?")
_FILE_SUFFIX = re.compile(r"\.[A-Za-z]\w*$")


@dataclass(frozen=True, eq=False, repr=False)
class Documents:
    """Documents in a fixed order, with what was left out on the way to them.

    Attributes:
        dataset: the columns `name` ("data.jsonl:17", "pkg/module.py:function"), `file`, and `text` or `input_ids`.
        source: what was read, as the caller named it.
        corpus_hash: 16 hex digits over names and contents in order.
        skipped: what was left out, each by name and reason.
        python_version: of the standard library that was read, None for other sources.
    """

    dataset: "Dataset"
    source: str
    corpus_hash: str
    skipped: tuple[Skipped, ...] = ()
    python_version: str | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.dataset.iter(batch_size=BATCH_ROWS):
            for values in zip(*batch.values(), strict=True):
                yield dict(zip(batch, values, strict=True))

    def __repr__(self) -> str:
        return (
            f"Documents(source={self.source!r}, documents={len(self)}, skipped={len(self.skipped)}, "
            f"corpus_hash={self.corpus_hash!r})"
        )

    @property
    def skipped_by_reason(self) -> dict[str, int]:
        """How many were left out for each reason, most frequent first."""
        return dict(Counter(skipped.reason for skipped in self.skipped).most_common())

    @property
    def meta(self) -> dict[str, Any]:
        """What a result file says about its corpus, ready for JSON."""
        return {
            "source": self.source,
            "documents": len(self),
            "corpus_hash": self.corpus_hash,
            "skipped": self.skipped_by_reason,
            "first_skipped": [f"{name}: {reason}" for name, reason in self.skipped[:NAMED_IN_META]],
            "python_version": self.python_version,
        }

    def split_by_file(self, held_out_share: float = 0.1) -> tuple["Documents", "Documents"]:
        """Train and held-out documents, no file on both sides.

        A file is held out when the hash of its name, read as a number in [0, 1), lies below `held_out_share`: the
        order of the files does not matter, and a new file moves no other. At least the file of the lowest hash is
        held out, at least that of the highest is kept. Where all documents come from one file (a single JSON Lines
        file, a hub dataset) the same is done by document name. What was skipped stays with the whole.

        Raises:
            ValueError: a share outside (0, 1), or a single document.
        """
        if not 0 < held_out_share < 1:
            raise ValueError(f"held_out_share must lie between 0 and 1, got {held_out_share}; pass 0.1 for a tenth.")
        files, names = self.dataset["file"][:], self.dataset["name"][:]
        keys = files if len(set(files)) > 1 else names
        draws = sorted((_draw(key), key) for key in set(keys))
        if len(draws) < 2:
            raise ValueError(
                f"documents must be at least two to be split, got {len(self)} from {self.source!r}; read more of them."
            )
        held_out = {key for draw, key in draws if draw < held_out_share} | {draws[0][1]}
        held_out -= {draws[-1][1]}
        return self.select(i for i, key in enumerate(keys) if key not in held_out), self.select(
            i for i, key in enumerate(keys) if key in held_out
        )

    def select(self, indices: Iterable[int]) -> "Documents":
        """Some of the documents, by their places; what was skipped stays with the whole."""
        dataset = self.dataset.select(list(indices))
        return Documents(dataset, self.source, _corpus_hash(dataset), (), self.python_version)


def read_documents(
    source: str | PathLike[str] = "stdlib",
    *,
    text_column: str = "text",
    split: str = "train",
    subset: str | None = None,
    limit: int | None = None,
) -> Documents:
    """Read documents, and count and name every one that cannot be used.

        "stdlib"          top-level functions and classes of the standard library, 200 to 2,000 bytes each
        "stdlib-files"    its whole files
        .jsonl .json      JSON Lines, an object a line; blank lines separate
        .parquet          a row a document
        any other file    plain UTF-8 text, one document; line ends become \\n
        a folder          its files, recursively, in the order of their paths; hidden ones are left alone. Where any is
                          JSON Lines or Parquet, the others are skipped
        owner/name        a dataset of the hub, streamed

    Files may be compressed (.gz). A row holds its text in `text_column`, or, in the column `input_ids`, token ids
    from elsewhere. The text is taken where rows have both; where some rows have only the one and some only the other,
    the rows with token ids are skipped. The documents are held in memory.

    Args:
        source: one of the above. A name without a suffix that is no path is looked up on the hub.
        text_column: the column of the text in JSON Lines, Parquet and hub rows.
        split: the split of a hub dataset.
        subset: the configuration of a hub dataset.
        limit: read this many documents and stop; all when None.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: nothing to read in the source, a file of rows that cannot be read to its end, no row with either
            column, a hub that does not answer, or a limit below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}; pass None to read everything.")
    embedded = EMBEDDED.get(source) if isinstance(source, str) else None
    if embedded is not None:
        found = embedded()
    elif str(source) and Path(source).exists():
        found = read_path(Path(source), text_column)
    elif isinstance(source, str) and is_hub_name(source):
        found = read_hub(source, subset, split, text_column)
    else:
        raise FileNotFoundError(
            f"source must be {', '.join(map(repr, EMBEDDED))}, a file, a folder or the name of a hub dataset, "
            f"got {str(source)!r}, which does not exist; check the path."
        )
    python_version = platform.python_version() if embedded is not None else None
    return _collect(found, str(source), text_column, limit, python_version)


def is_hub_name(name: str) -> bool:
    """Whether this may be the name of a hub dataset: "name" or "owner/name", without the suffix of a file."""
    return bool(_HUB_NAME.fullmatch(name)) and not _FILE_SUFFIX.search(name)


def text_fault(text: object) -> str | None:
    """Why this is no text of a document, None if it is one."""
    if text is None:
        return "no text"
    if not isinstance(text, str):
        return f"text is a {type(text).__name__}, not a string"
    if not text.strip():
        return "empty text"
    try:
        text.encode()
    except UnicodeEncodeError:  # "\ud800" is legal JSON and no character
        return "text holds half a surrogate pair"
    return None


def tokens_fault(tokens: object) -> str | None:
    """Why these are no token ids of a document, None if they are."""
    if tokens is None:
        return "no input_ids"
    if not isinstance(tokens, list):
        return f"input_ids is a {type(tokens).__name__}, not a list"
    if not tokens:
        return "empty input_ids"
    if not all(type(token) is int for token in tokens):  # True is no token
        return "input_ids holds other things than integers"
    if min(tokens) < 0:
        return "negative token id"
    return "token id above int32" if max(tokens) > MAX_TOKEN_ID else None


def _collect(
    found: Iterable[Found | Skipped], source: str, text_column: str, limit: int | None, python_version: str | None
) -> Documents:
    texts: list[Found] = []
    tokens: list[Found] = []
    skipped: list[Skipped] = []
    columns: dict[str, None] = {}  # ordered
    for item in found:
        if isinstance(item, Skipped):
            skipped.append(item)
            continue
        row = item.content if isinstance(item.content, Mapping) else {text_column: item.content}
        columns.update(dict.fromkeys(row))
        column, fault_of, kept = (
            (text_column, text_fault, texts) if text_column in row else (TOKENS, tokens_fault, tokens)
        )
        fault = fault_of(row.get(column))
        if fault is None:
            kept.append(item._replace(content=row[column]))
            if len(kept) == limit and (kept is texts or not texts):
                break
        else:
            skipped.append(Skipped(item.name, fault))
    if columns and not {text_column, TOKENS} & columns.keys():
        raise ValueError(
            f"text_column must name a column of {source!r}, got {text_column!r} for the columns "
            f"{sorted(columns)}; pass text_column=… with the one that holds the text."
        )
    if texts:
        skipped += [Skipped(item.name, f"no {text_column}, only input_ids") for item in tokens]
    kept = texts or tokens
    if not kept:
        raise ValueError(
            f"source must hold at least one document, got none in {source!r}{_first(skipped)}; "
            "name another source, or mend this one."
        )
    dataset = _dataset(kept, "text" if texts else TOKENS)
    return Documents(dataset, source, _corpus_hash(dataset), tuple(skipped), python_version)


def _first(skipped: list[Skipped]) -> str:
    if not skipped:
        return ""
    more = ", …" if len(skipped) > 3 else ""
    return f" ({len(skipped)} skipped: {', '.join(f'{name}: {reason}' for name, reason in skipped[:3])}{more})"


def _dataset(found: list[Found], column: str) -> "Dataset":
    from datasets import Dataset, Features, LargeList, Value

    # The large types count bytes and tokens in int64: the others end at 2 GiB a column.
    content = Value("large_string") if column == "text" else LargeList(Value("int32"))
    names, files, contents = map(list, zip(*found, strict=True))
    features = Features({"name": Value("string"), "file": Value("string"), column: content})
    return Dataset.from_dict({"name": names, "file": files, column: contents}, features=features)


def _corpus_hash(dataset: "Dataset") -> str:
    digest = hashlib.sha256()
    column = dataset.column_names[-1]
    for batch in dataset.iter(batch_size=BATCH_ROWS):
        for name, content in zip(batch["name"], batch[column], strict=True):
            data = content.encode() if isinstance(content, str) else np.asarray(content, dtype="<i4").tobytes()
            digest.update(f"{column} {len(name)} {len(data)} {name}".encode() + data)
    return digest.hexdigest()[:16]


def _draw(key: str) -> float:
    """A number in [0, 1) that depends on nothing but the key."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
