"""A source of a stream: what the user says of it, and the parts that it is made of."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from math import isfinite
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anchor_attn.train.documents import EMBEDDED, NAMED_IN_META, Documents, is_hub_name, read_documents
from anchor_attn.train.items import Skipped
from anchor_attn.train.sources import list_files, load_hub
from anchor_attn.train.streaming.files import file_part
from anchor_attn.train.streaming.parts import Part
from anchor_attn.train.streaming.tables import HubPart, TablePart

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class StreamSource:
    """Where documents come from, and how often.

        StreamSource("web.jsonl", weight=3)     StreamSource("books", weight=1, long_tokens=4096, long_factor=5)

    Upsampling by length draws documents of at least `long_tokens` so many times as often as the others of the same
    source: of the others, all but 1 in `long_factor` are left out, other ones in every epoch, so that nothing is
    repeated sooner than it comes again anyway. The shares of the sources stay (Fu et al. 2024, arXiv 2402.10171).

    Attributes:
        path: a file, a folder or a name as `read_documents` takes, or documents in memory: `Documents`, or a Hugging
            Face dataset with the text column or `input_ids`.
        weight: share of the document tokens, against the other sources'.
        text_column: the column of the text in JSON Lines, Parquet and datasets; else they have `input_ids`.
        split: the split of a hub dataset.
        subset: the configuration of a hub dataset.
        tag: stands in front of every document as a part of it; neither it nor the first own token is labelled.
        long_tokens: tokens from which a document is long, the tag not counted; none is when None.
        long_factor: how many times as often a long document is drawn.
        bad_records: so many corrupt or empty records are counted and skipped by each worker, in the first epoch.

    Raises:
        ValueError: a weight or factor that is no share, or a count that is none.
    """

    path: "str | PathLike[str] | Documents | Dataset"
    _: KW_ONLY
    weight: float = 1.0
    text_column: str = "text"
    split: str = "train"
    subset: str | None = None
    tag: str | None = None
    long_tokens: int | None = None
    long_factor: float = 1.0
    bad_records: int = 100

    def __post_init__(self) -> None:
        if not (isfinite(self.weight) and self.weight > 0):
            raise ValueError(f"weight must be above 0, got {self.weight}; leave the source out instead.")
        if not (isfinite(self.long_factor) and self.long_factor >= 1):
            raise ValueError(f"long_factor must be at least 1, got {self.long_factor}; pass 1 for no upsampling.")
        if self.long_factor > 1 and self.long_tokens is None:
            raise ValueError(
                f"long_tokens must say which documents are drawn long_factor={self.long_factor} times as often, got "
                "None; pass 4096, say."
            )
        if self.long_tokens is not None and self.long_tokens < 1:
            raise ValueError(f"long_tokens must be at least 1, got {self.long_tokens}; pass 4096, say.")
        if self.bad_records < 0:
            raise ValueError(f"bad_records must be at least 0, got {self.bad_records}; pass 0 to allow none.")
        if self.tag is not None and not self.tag:
            raise ValueError("tag must hold at least one character, got ''; pass None for no tag.")


@dataclass(frozen=True, eq=False)
class OpenSource:
    """A source that has been found.

    Attributes:
        settings: what the user says of it.
        name: how the user names it.
        parts: its files, or what else it is made of.
        left_out: files of its folder that are not read.
    """

    settings: StreamSource
    name: str
    parts: tuple[Part, ...]
    left_out: tuple[Skipped, ...] = ()

    def meta(self) -> dict[str, Any]:
        """What a resumed run must find again: the settings, and a fingerprint of the parts.

        It is of names, sizes and samples of the content: files of up to 64 KiB and tables of up to 64 rows whole, of
        larger ones stretches that are evenly spread, the first and the last bytes among them. Another corpus, another
        order and another length of anything are seen, and so is a copy that is equal, as equal; a few bytes that are
        changed between two samples of a large file are not, nor what the hub changes behind the same name.
        """
        digest = hashlib.sha256()
        for part in self.parts:
            sample = part.sample()
            digest.update(f"{part.name}\n{part.size} {len(sample)}\n".encode("utf-8", "backslashreplace") + sample)
        settings = {name: value for name, value in vars(self.settings).items() if name != "path"}
        return {
            **settings,
            "files": f"{len(self.parts)} ({digest.hexdigest()[:16]})",
            "left_out": [f"{file.name}: {file.reason}" for file in self.left_out[:NAMED_IN_META]],
        }


def open_sources(sources: Any) -> tuple[OpenSource, ...]:
    """Find one source or several, each a `StreamSource` or what its `path` may be.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: nothing to read in one, or a hub that does not answer.
    """
    single = isinstance(sources, StreamSource | str | PathLike | Documents) or not isinstance(sources, Sequence)
    given: Iterable[Any] = [sources] if single else sources
    opened = tuple(
        _open(source if isinstance(source, StreamSource) else StreamSource(source), f"sources[{number}]")
        for number, source in enumerate(given)
    )
    if not opened:
        raise ValueError("sources must hold at least one source, got none; pass a path.")
    return opened


def _open(settings: StreamSource, called: str) -> OpenSource:
    path = settings.path
    if not isinstance(path, str | PathLike):
        return _open_table(settings, path, called)
    if isinstance(path, str) and path in EMBEDDED:
        return _open_table(settings, read_documents(path), called)
    if str(path) and Path(path).exists():
        files = list(list_files(Path(path)))
        left_out = tuple(file for file in files if isinstance(file, Skipped))
        parts = tuple(file_part(file, settings.text_column) for file in files if not isinstance(file, Skipped))
        if not parts:
            raise ValueError(f"{called} must hold at least one file, got none in {str(path)!r}; name another folder.")
        return OpenSource(settings, str(path), parts, left_out)
    if isinstance(path, str) and is_hub_name(path):
        return _open_hub(settings, path, called)
    raise FileNotFoundError(
        f"{called}.path must be {', '.join(map(repr, EMBEDDED))}, a file, a folder or the name of a hub dataset, "
        f"got {str(path)!r}, which does not exist; check the path."
    )


def _open_table(settings: StreamSource, documents: "Documents | Dataset", called: str) -> OpenSource:
    name, dataset = (
        (documents.source, documents.dataset) if isinstance(documents, Documents) else ("dataset", documents)
    )
    if not hasattr(dataset, "column_names") or not hasattr(dataset, "__len__"):
        raise TypeError(
            f"{called}.path must be a path, a name, Documents or a datasets.Dataset, got {type(documents).__name__}; "
            "for a dataset that streams, pass its name."
        )
    return OpenSource(settings, name, (TablePart(name, dataset),))


def _open_hub(settings: StreamSource, name: str, called: str) -> OpenSource:
    rows = load_hub(name, settings.subset, settings.split, settings.text_column, f"{called}.path")
    rows = rows.reshard()  # Parquet by row group: more to shuffle and to share
    parts = tuple(HubPart(name, rows, shard) for shard in range(rows.num_shards))
    return OpenSource(settings, name, parts)
