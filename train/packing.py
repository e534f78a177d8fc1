"""From documents to rows of S tokens, every token accounted for.

documents   [a a a]  [b b b b b]  [c c]
rows        0 a a a b b     0 b b b c c        0 = the anchor; the rest of b opens the next row
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from anchor_attn.train.items import TOKENS
from anchor_attn.train.tokenizers import Tokenizer, load_tokenizer
from anchor_attn.train.tokens import check_tokens, read_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Cut = Literal["continue", "drop"]
CUTS = ("continue", "drop")


@dataclass(frozen=True)
class LengthDistribution:
    """Tokens a document, before any cut: smallest, quartiles, largest and mean."""

    min: int
    lower_quartile: float
    median: float
    upper_quartile: float
    max: int
    mean: float


@dataclass(frozen=True)
class PackingReport:
    """Where every token went: `document_tokens == packed_tokens + dropped_tokens + unread_tokens`.

    Attributes:
        seq_len: tokens a row, the anchor included.
        anchor_tokens: anchor tokens a row; counted nowhere below.
        cut: what became of documents at a row's end.
        rows: rows made.
        documents: documents with at least one token.
        document_tokens: their tokens.
        packed_tokens: document tokens in the rows.
        continued: rows that open with the rest of a document, as a document of its own.
        dropped_documents: documents that lost their rest at a row's end.
        dropped_tokens: what they lost.
        unread_documents: documents that `max_rows` left no row for.
        unread_tokens: their tokens, and the rest of the document that the last row cut.
        padded_tokens: slots of the last row that a collator fills up to `seq_len`.
        empty_documents: names of documents that have no token.
        document_lengths: of the documents with at least one token.
    """

    seq_len: int
    anchor_tokens: int
    cut: Cut
    rows: int
    documents: int
    document_tokens: int
    packed_tokens: int
    continued: int
    dropped_documents: int
    dropped_tokens: int
    unread_documents: int
    unread_tokens: int
    padded_tokens: int
    empty_documents: tuple[str, ...]
    document_lengths: LengthDistribution

    def __str__(self) -> str:
        lengths = self.document_lengths
        return (
            f"{self.documents:,} documents, {self.document_tokens:,} tokens -> {self.rows:,} rows of {self.seq_len:,}, "
            f"{self.padded_tokens:,} slots padded\n"
            f"tokens a document: {lengths.min:,} min, {lengths.lower_quartile:,.0f} / {lengths.median:,.0f} / "
            f"{lengths.upper_quartile:,.0f} quartiles, {lengths.max:,} max, {lengths.mean:,.1f} mean\n"
            f"{self.continued:,} rows open with the rest of a document; dropped {self.dropped_tokens:,} tokens of "
            f"{self.dropped_documents:,} documents; unread {self.unread_tokens:,} tokens, "
            f"{self.unread_documents:,} whole documents; {len(self.empty_documents):,} empty documents"
        )


class PackedRows(Dataset[dict[str, Any]]):
    """Packed rows, as a map-style dataset that a Trainer or DataLoader takes.

        rows[0]   {"input_ids": int32 [256 97 97 97 98 98], "document_lengths": [3, 2]}

    `input_ids` includes the anchor, `document_lengths` does not. Only the last row may be shorter than `seq_len`.

    Attributes:
        tokens: int32, all documents one after the other; rows are slices of it. Read-only where it is the column of
            the caller's dataset: int32 ids in one piece are not copied.
        seq_len: tokens a full row, the anchor included.
        anchor_tokens: anchor tokens at the front of every row.
        tokenizer: where `anchor_token_id` and `vocab_size` come from.
        report: where every token went.
    """

    def __init__(self, tokens: NDArray[np.int32], rows: "_Rows", tokenizer: Tokenizer, report: PackingReport) -> None:
        self.tokens = tokens
        self.seq_len = report.seq_len
        self.anchor_tokens = report.anchor_tokens
        self.tokenizer = tokenizer
        self.report = report
        self._rows = rows
        self._anchor = np.full(report.anchor_tokens, tokenizer.anchor_token_id, dtype=np.int32)

    def __len__(self) -> int:
        return len(self._rows.begins)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = range(len(self))[index]
        own = self.tokens[self._rows.begins[row] : self._rows.ends[row]]
        return {TOKENS: np.concatenate([self._anchor, own]), "document_lengths": self._lengths(row)}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[row] for row in range(len(self)))

    @property
    def document_lengths(self) -> list[list[int]]:
        """Per row, the tokens of each document, as `PackedLayout.from_lengths` takes them."""
        return [self._lengths(row) for row in range(len(self))]

    def _lengths(self, row: int) -> list[int]:
        first, last = self._rows.piece_bounds[row : row + 2]
        return self._rows.piece_lengths[first:last].tolist()


def pack_documents(
    documents: Iterable[Any],
    seq_len: int,
    *,
    tokenizer: "str | PathLike[str] | Tokenizer | PreTrainedTokenizerBase | None" = None,
    anchor_tokens: int = 1,
    cut: Cut = "continue",
    shuffle_seed: int | None = None,
    max_rows: int | None = None,
) -> PackedRows:
    """Pack documents into rows: the anchor, then documents in order, cut at the row's end.

        lengths [3, 5, 2], seq_len=6    continue   0 a a a b b     0 b b b c c
                                        drop       0 a a a b b     0 c c

    Args:
        documents: `Documents`, a Hugging Face dataset, or any finite iterable of rows with `text` or `input_ids`, of
            strings, or of sequences of token ids. The token ids of a dataset are taken as they lie in its arrow
            column, without a step a document.
        seq_len: tokens a row, the anchor included [S].
        tokenizer: as in `load_tokenizer`; bytes when None. It gives the anchor and the vocabulary even where the
            documents come as token ids.
        anchor_tokens: how often the anchor stands at the front of a row.
        cut: what becomes of the rest of a document that a row's end cuts: "continue" opens the next row with it, as
            a document of its own, "drop" throws it away.
        shuffle_seed: shuffle the documents with this seed; keep their order when None.
        max_rows: stop after so many rows; the report says what stays unread.

    Raises:
        TypeError: something that is neither text nor token ids.
        ValueError: a row too short for the anchor and one token, an unknown cut, no token at all, or a token id
            outside the vocabulary; the message names the document.
    """
    room = check_room(seq_len, anchor_tokens)
    _check_cut(cut, max_rows)
    tokenizer = load_tokenizer("bytes" if tokenizer is None else tokenizer)
    read = read_tokens(documents, tokenizer)
    empty = tuple(read.names(np.flatnonzero(read.lengths == 0).tolist()))
    order = np.flatnonzero(read.lengths)
    if not len(order):
        raise ValueError(
            f"documents must hold at least one token, got {len(empty)} documents without any; pass other documents."
        )
    if shuffle_seed is not None:
        order = order[np.random.default_rng(shuffle_seed).permutation(len(order))]
    lengths = read.lengths[order]
    document_ends = lengths.cumsum()
    tokens = read.tokens() if shuffle_seed is None else read.gathered(order)
    check_tokens(tokens, read, order, tokenizer)
    rows = _rows(document_ends, room, cut, max_rows)
    tokens = tokens[: rows.ends[-1]]  # what no row reads need not travel with them
    report = _report(rows, lengths, document_ends, seq_len, anchor_tokens, cut, empty)
    return PackedRows(tokens, rows, tokenizer, report)


@dataclass(frozen=True)
class _Rows:
    """Rows as slices [begin, end) of the token stream, and their pieces of documents.

    Attributes:
        begins: int64 [rows].
        ends: int64 [rows].
        piece_lengths: int64, of all rows one after the other.
        piece_bounds: int64 [rows + 1], where each row's pieces begin.
    """

    begins: NDArray[np.int64]
    ends: NDArray[np.int64]
    piece_lengths: NDArray[np.int64]
    piece_bounds: NDArray[np.int64]


def _rows(document_ends: NDArray[np.int64], room: int, cut: Cut, max_rows: int | None) -> _Rows:
    total = int(document_ends[-1])
    begins = np.arange(0, total, room) if cut == "continue" else _begins_after_drop(document_ends, room)
    begins = begins[:max_rows]
    ends = np.minimum(begins + room, total)
    edges = np.union1d(np.concatenate([begins, ends]), document_ends)
    row = np.searchsorted(begins, edges[:-1], side="right") - 1
    inside = edges[:-1] < ends[row]  # the others are what was dropped, and what comes after the last row
    piece_bounds = np.searchsorted(row[inside], np.arange(len(begins) + 1))
    return _Rows(begins, ends, np.diff(edges)[inside], piece_bounds)


def _begins_after_drop(document_ends: NDArray[np.int64], room: int) -> NDArray[np.int64]:
    """Row begins where every row that is full waits for the end of the document that it cut."""
    begins = [0]
    while begins[-1] + room < document_ends[-1]:
        begins.append(int(document_ends[np.searchsorted(document_ends, begins[-1] + room)]))
    return np.array([begin for begin in begins if begin < document_ends[-1]])


def _report(
    rows: _Rows,
    lengths: NDArray[np.int64],
    document_ends: NDArray[np.int64],
    seq_len: int,
    anchor_tokens: int,
    cut: Cut,
    empty: tuple[str, ...],
) -> PackingReport:
    document_begins = document_ends - lengths
    packed = int((rows.ends - rows.begins).sum())
    last = int(rows.ends[-1])
    read = last if cut == "continue" else int(document_ends[np.searchsorted(document_ends, last)])
    lower, median, upper = np.percentile(lengths, [25, 50, 75]).tolist()
    return PackingReport(
        seq_len=seq_len,
        anchor_tokens=anchor_tokens,
        cut=cut,
        rows=len(rows.begins),
        documents=len(lengths),
        document_tokens=int(document_ends[-1]),
        packed_tokens=packed,
        continued=int(np.isin(rows.begins, document_begins, invert=True).sum()),
        dropped_documents=int(np.isin(rows.ends, document_ends, invert=True).sum()) if cut == "drop" else 0,
        dropped_tokens=read - packed,
        unread_documents=int((document_begins >= read).sum()),
        unread_tokens=int(document_ends[-1]) - read,
        padded_tokens=seq_len - anchor_tokens - int(rows.ends[-1] - rows.begins[-1]),
        empty_documents=empty,
        document_lengths=LengthDistribution(
            int(lengths.min()), lower, median, upper, int(lengths.max()), float(lengths.mean())
        ),
    )


def check_room(seq_len: int, anchor_tokens: int) -> int:
    """Document tokens a row.

    Raises:
        ValueError: a row too short for the anchor and one token.
    """
    if anchor_tokens < 0:
        raise ValueError(f"anchor_tokens must be at least 0, got {anchor_tokens}; pass 1 for the paper's anchor.")
    if seq_len < anchor_tokens + 1:
        raise ValueError(
            f"seq_len must be at least {anchor_tokens + 1} (anchor_tokens={anchor_tokens} and one token), "
            f"got {seq_len}; raise seq_len."
        )
    return seq_len - anchor_tokens


def _check_cut(cut: str, max_rows: int | None) -> None:
    if cut not in CUTS:
        raise ValueError(f"cut must be one of {CUTS}, got {cut!r}; pass one of them.")
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows must be at least 1, got {max_rows}; pass None to pack everything.")
