"""Packed rows for a command: from its arguments, from documents that are packed here, or from a packed dataset."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from anchor_attn.lengths import draw_corpus_lengths
from anchor_attn.masks import PackedLayout
from anchor_attn.train.packed_dataset import check_size, layout_of_columns, read_columns

SEQ_LEN = 4096


@dataclass(frozen=True)
class MaskInput:
    """Where rows come from; None is what was not given.

    Attributes:
        lengths: words of the command line: tokens of each document, "/" between rows.
        document_ids: an id a token, "/" between rows.
        data: a packed dataset, or documents, as `read_documents` reads them.
        text_column: of documents.
        tokenizer: for documents, as `load_tokenizer`.
        rows: how many to draw or to read.
        seq_len: tokens a row, the anchor included.
        anchor_tokens: at the front of every row.
        seed: of rows drawn at random.
    """

    lengths: Sequence[str] = ()
    document_ids: str | None = None
    data: str | None = None
    text_column: str = "text"
    tokenizer: str = "bytes"
    rows: int | None = None
    seq_len: int | None = None
    anchor_tokens: int | None = None
    seed: int = 0


def read_layout(given: MaskInput) -> tuple[PackedLayout, str]:
    """The rows that were asked for, and what they are in a few words.

    Raises:
        ValueError: more than one source, an option that the source leaves no room for, or bad values.
    """
    named = {"lengths": bool(given.lengths), "--document-ids": given.document_ids, "--data": given.data}
    sources = [name for name, value in named.items() if value not in (None, False)]
    if len(sources) > 1:
        raise ValueError(f"rows must come from one source, got {' and '.join(sources)}; leave one out.")
    for name, value, least in (("rows", given.rows, 1), ("seq_len", given.seq_len, 1), ("seed", given.seed, 0)):
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}; raise it.")
    if given.rows is not None and sources in (["lengths"], ["--document-ids"]):
        raise ValueError(f"rows must be left out where {sources[0]} say them, got --rows {given.rows}; leave it out.")
    check_size((given.rows or 1) * (given.seq_len or 1))
    if given.lengths:
        return _from_lengths(given), "given lengths"
    if given.document_ids is not None:
        return _from_ids(given), "given ids"
    return _random_rows(given) if given.data is None else _from_data(given, given.data)


def _from_lengths(given: MaskInput) -> PackedLayout:
    rows = _numbers(" ".join(given.lengths), "lengths", "tokens of each document, as 300 50 161 / 511")
    anchor_tokens = 1 if given.anchor_tokens is None else given.anchor_tokens
    check_size(len(rows) * max(given.seq_len or 0, anchor_tokens + max(sum(row) for row in rows)))
    return PackedLayout.from_lengths(rows, anchor_tokens, given.seq_len)


def _from_ids(given: MaskInput) -> PackedLayout:
    rows = _numbers(given.document_ids or "", "document_ids", "one id a token, as '0 1 1 2 1 -1'")
    if given.anchor_tokens is not None:
        raise ValueError(
            f"anchor_tokens must be left out where document_ids say them, got {given.anchor_tokens}; "
            "begin every row with as many zeros."
        )
    if not all(rows):
        raise ValueError("document_ids must hold an id for every token, got an empty row; write '0 1 1', say.")
    longest = max(map(len, rows))
    if given.seq_len is not None and longest > given.seq_len:
        raise ValueError(f"seq_len must hold all document_ids, got {given.seq_len} for {longest}; raise it.")
    seq_len = given.seq_len or longest
    check_size(len(rows) * seq_len)
    return PackedLayout.from_document_ids(torch.tensor([row + [-1] * (seq_len - len(row)) for row in rows]))


def _random_rows(given: MaskInput) -> tuple[PackedLayout, str]:
    anchor_tokens = 1 if given.anchor_tokens is None else given.anchor_tokens
    seq_len = SEQ_LEN if given.seq_len is None else given.seq_len
    if not 0 <= anchor_tokens < seq_len:
        raise ValueError(
            f"anchor_tokens must lie between 0 and {seq_len - 1} (seq_len={seq_len} and one token of a document), got "
            f"{anchor_tokens}; pass 1 for the paper's anchor."
        )
    seeds = range(given.seed, given.seed + (given.rows or 1))
    check_size(len(seeds) * seq_len)
    lengths = [draw_corpus_lengths(seq_len - anchor_tokens, seed) for seed in seeds]
    return PackedLayout.from_lengths(lengths, anchor_tokens), f"random lengths, seed {given.seed}"


def _from_data(given: MaskInput, data: str) -> tuple[PackedLayout, str]:
    if Path(data).exists() and data and (rows := read_columns(Path(data), given.rows or 1)):
        layout, columns = layout_of_columns(rows, given.anchor_tokens, given.seq_len)
        return layout, f"{', '.join(columns)} of {data}"
    return _packed_here(given, data), f"{data}, packed here"


def _packed_here(given: MaskInput, data: str) -> PackedLayout:
    """The first rows that packing makes of documents, of which no more are read than these rows need."""
    from anchor_attn.train import load_tokenizer, pack_documents, read_documents

    anchor_tokens = 1 if given.anchor_tokens is None else given.anchor_tokens
    seq_len = SEQ_LEN if given.seq_len is None else given.seq_len
    tokenizer, rows, limit = load_tokenizer(given.tokenizer), given.rows or 1, 64
    while True:
        documents = read_documents(data, text_column=given.text_column, limit=limit)
        packed = pack_documents(
            documents, seq_len, tokenizer=tokenizer, anchor_tokens=anchor_tokens, cut="continue", max_rows=rows
        )
        if len(documents) < limit or (len(packed) == rows and packed.report.padded_tokens == 0):
            return PackedLayout.from_lengths(packed.document_lengths, anchor_tokens, seq_len)
        limit *= 8


def _numbers(text: str, name: str, example: str) -> list[list[int]]:
    rows = [re.split(r"[\s,]+", row.strip(" ,\t\n")) for row in text.split("/")]
    for word in (word for row in rows for word in row if word):
        if not re.fullmatch(r"[+-]?[0-9]{1,9}", word):
            raise ValueError(f"{name} must be whole numbers, rows apart by /, got {word!r}; write {example}.")
    return [[int(word) for word in row if word] for row in rows]
