"""The token ids of documents, one after the other, whatever form they come in.

The ids of a dataset are taken as they lie in its column: no step a document, and no copy where none is needed.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anchor_attn.train.documents import Documents
from anchor_attn.train.items import TOKENS
from anchor_attn.train.tokenizers import Tokenizer

BATCH_DOCUMENTS = 1_000
PLAIN_FORMATS = (None, "numpy", "torch")  # of a dataset: they show the ids of the arrow column as they are


@dataclass(frozen=True)
class DocumentTokens:
    """The token ids of all documents as they came, before any copy.

        buffers [a a a] [b b b c]   lengths [3, 0, 3, 1]      no document lies in two buffers

    Attributes:
        buffers: integers of any width; one behind the other they are the documents in order.
        lengths: int64, tokens a document, 0 for the empty ones.
        names: of the documents at these places, counted from 0.
        constant: nobody writes to the buffers any more, so that they may be kept without a copy.
    """

    buffers: Sequence[NDArray[Any]]
    lengths: NDArray[np.int64]
    names: Callable[[list[int]], list[str]]
    constant: bool

    def tokens(self) -> NDArray[np.int32]:
        """All documents in order; ids that int32 does not hold wrap."""
        if self.constant and len(self.buffers) == 1 and self.buffers[0].dtype == np.int32:
            return self.buffers[0]
        return np.concatenate(self.buffers, dtype=np.int32, casting="unsafe")

    def gathered(self, order: NDArray[np.int64]) -> NDArray[np.int32]:
        """The documents at these places, one after the other; ids that int32 does not hold wrap."""
        tokens = np.empty(int(self.lengths[order].sum()), dtype=np.int32)
        begin = 0
        for ids in self.documents(order):
            tokens[begin : begin + len(ids)] = ids
            begin += len(ids)
        return tokens

    def documents(self, order: NDArray[np.int64]) -> Iterator[NDArray[Any]]:
        """The token ids of the documents at these places, none of them empty, as slices of the buffers."""
        buffer_begins = np.cumsum([0, *map(len, self.buffers)])
        begins = (self.lengths.cumsum() - self.lengths)[order]
        buffers = np.searchsorted(buffer_begins, begins, side="right") - 1
        begins -= buffer_begins[buffers]
        ends = begins + self.lengths[order]
        for buffer, begin, end in zip(buffers.tolist(), begins.tolist(), ends.tolist(), strict=True):
            yield self.buffers[buffer][begin:end]


def read_tokens(documents: Iterable[Any], tokenizer: Tokenizer) -> DocumentTokens:
    """The token ids of documents in any form that `pack_documents` takes."""
    return _column_tokens(documents) or _document_tokens(documents, tokenizer)


def _column_tokens(documents: Iterable[Any]) -> DocumentTokens | None:
    """The `input_ids` of a dataset as they lie in its arrow column, or None.

    What is unusual (a text beside the ids, a null, ids that are no integers, a format that may change them) is not
    judged here: documents are then read one by one, and that names what is wrong.
    """
    datasets = sys.modules.get("datasets")  # whoever has a dataset has imported it; for others it would take a second
    dataset = documents.dataset if isinstance(documents, Documents) else documents
    if datasets is None or not isinstance(dataset, datasets.Dataset):
        return None
    shown = dataset.format
    columns = dataset.column_names if shown["output_all_columns"] else shown["columns"]
    if shown["type"] not in PLAIN_FORMATS or shown["format_kwargs"] or TOKENS not in columns or "text" in columns:
        return None
    from pyarrow import compute  # type: ignore[import-untyped]

    column = dataset.select_columns([TOKENS]).with_format("arrow")[:].column(TOKENS)
    if not _holds_integer_lists(column):
        return None
    values = compute.list_flatten(column)  # slices, no copy
    if values.null_count:
        return None

    def names(places: list[int]) -> list[str]:
        if "name" not in columns or not places:
            return [f"document {place + 1}" for place in places]
        return [str(name) for name in dataset.select_columns(["name"])[places]["name"]]

    lengths = compute.list_value_length(column).to_numpy().astype(np.int64)
    return DocumentTokens([chunk.to_numpy() for chunk in values.chunks], lengths, names, constant=True)


def _holds_integer_lists(column: Any) -> bool:
    from pyarrow import types

    is_list = types.is_list(column.type) or types.is_large_list(column.type)
    return is_list and types.is_integer(column.type.value_type) and not column.null_count


def _document_tokens(documents: Iterable[Any], tokenizer: Tokenizer) -> DocumentTokens:
    """The token ids of any documents, read and tokenized one by one."""
    named = _tokenize(documents, tokenizer)
    lengths = np.array([len(ids) for _, ids in named], dtype=np.int64)
    # A caller may write to his own arrays later, after the check.
    return DocumentTokens(
        [ids for _, ids in named], lengths, lambda places: [named[place][0] for place in places], False
    )


def _tokenize(documents: Iterable[Any], tokenizer: Tokenizer) -> list[tuple[str, NDArray[Any]]]:
    """Name and token ids of every document, in order."""
    named: list[tuple[str, NDArray[Any]]] = []
    contents = _contents(documents)
    while batch := list(islice(contents, BATCH_DOCUMENTS)):
        encoded = iter(tokenizer.encode([content for _, content in batch if isinstance(content, str)]))
        named += [
            (name, next(encoded) if isinstance(content, str) else _token_ids(name, content)) for name, content in batch
        ]
    return named


def _contents(documents: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """Name and text, or token ids, of every document."""
    if isinstance(documents, str | Mapping) or not isinstance(documents, Iterable):
        raise TypeError(
            f"documents must be a sequence of documents, got {type(documents).__name__}; "
            "pass read_documents(…), or a list with one entry a document."
        )
    for number, document in enumerate(documents, start=1):
        name, content = f"document {number}", document
        if isinstance(document, Mapping):
            name = str(document.get("name", name))
            content = document.get("text", document.get(TOKENS))
            if content is None:
                raise ValueError(
                    f"documents must have 'text' or 'input_ids', got the columns {sorted(document)} in {name!r}; "
                    "rename the column, or read them with read_documents, which leaves out rows without."
                )
        yield name, content


def _token_ids(name: str, content: Any) -> NDArray[Any]:
    ids = np.asarray(content)
    if ids.ndim == 1 and ids.size == 0:
        return ids.astype(np.int32)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise TypeError(
            f"documents must hold text or token ids, got {content!r:.60} in {name!r}; "
            "pass a string or a flat sequence of integers."
        )
    return ids


def check_tokens(
    tokens: NDArray[np.int32], read: DocumentTokens, order: NDArray[np.int64], tokenizer: Tokenizer
) -> None:
    """Raise a ValueError that names the document unless every id is in the vocabulary.

    Args:
        tokens: what the documents at `order` came to.
        read: where they came from.
        order: int64, places of documents.
        tokenizer: whose vocabulary it is.
    """
    # 2^40 is 0 in int32: ids that may have wrapped are looked at where they came from.
    checked = [ids for ids in read.buffers if len(ids) and not np.can_cast(ids.dtype, np.int32)]
    if sum(map(len, checked)) < len(tokens):
        checked.append(tokens)
    if all(ids.min() >= 0 and ids.max() < tokenizer.vocab_size for ids in checked):
        return
    for place, ids in zip(order.tolist(), read.documents(order), strict=True):
        outside = (ids < 0) | (ids >= tokenizer.vocab_size)
        if outside.any():
            raise ValueError(
                f"documents must hold token ids from 0 to {tokenizer.vocab_size - 1}, the vocabulary of "
                f"{tokenizer.name!r}, got {int(ids[outside.argmax()])} in {read.names([place])[0]!r}; "
                "pass the tokenizer that made them."
            )
