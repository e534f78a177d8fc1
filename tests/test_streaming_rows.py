"""Rows while documents come: those of the definition, nothing lost, and whole documents where they fit."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import quick

from anchor_attn.train import pack_documents
from anchor_attn.train.streaming.chunks import interleave_chunks
from anchor_attn.train.streaming.documents import Document
from anchor_attn.train.streaming.rows import RowPacker

LENGTHS = st.lists(st.integers(1, 23), min_size=1, max_size=12)
PACKINGS = st.sampled_from(["concat", "drop", "best_fit"])


def numbered(lengths):
    """Documents of these lengths whose tokens count on: [0 1 2] [3 4]."""
    ends = np.cumsum(lengths)
    return [np.arange(end - length, end, dtype=np.int32) for end, length in zip(ends, lengths, strict=True)]


def rows_of(packer, documents):
    """All rows, each a list of its documents as lists; the packer may be swapped between any two steps."""
    rows = []
    for document in documents:
        packer.add(Document(document))
        while (row := packer.take()) is not None:
            rows.append(row)
    while (row := packer.close()) is not None:
        rows.append(row)
    return [[document.ids.tolist() for document in row.documents] for row in rows]


# --- the rows -------------------------------------------------------------------------------------------------------


@quick
@given(LENGTHS, st.integers(1, 9), st.sampled_from(["concat", "drop"]))
@example([3, 5, 2], 5, "concat")
@example([3, 5, 2], 5, "drop")
def test_rows_in_order_are_those_of_pack_documents(lengths, room, packing):
    packed = pack_documents(numbered(lengths), room + 1, cut={"concat": "continue", "drop": "drop"}[packing])
    expected = [
        [part.tolist() for part in np.split(row["input_ids"][1:], np.cumsum(row["document_lengths"])[:-1])]
        for row in packed
    ]
    packer = RowPacker(packing, room, 1)
    assert rows_of(packer, numbered(lengths)) == expected
    assert packer.counts.rows == packed.report.rows
    assert packer.counts.dropped_tokens == packed.report.dropped_tokens
    assert packer.counts.padded_tokens == packed.report.padded_tokens


@quick
@given(LENGTHS, st.integers(1, 9), st.integers(1, 4))
@example([4, 4, 4, 5, 5], 9, 2)
def test_best_fit_keeps_documents_whole_that_fit_and_cuts_the_others_at_full_rows(lengths, room, open_rows):
    packer = RowPacker("best_fit", room, open_rows)
    rows = rows_of(packer, numbered(lengths))
    pieces = sorted(piece for row in rows for piece in row)
    cut = [ids[at : at + room].tolist() for ids in numbered(lengths) for at in range(0, len(ids), room)]
    assert pieces == sorted(cut)
    assert all(sum(map(len, row)) <= room for row in rows)


@quick
@given(LENGTHS, st.integers(1, 9), PACKINGS, st.integers(1, 4))
def test_every_token_is_packed_or_dropped_and_every_slot_counted(lengths, room, packing, open_rows):
    packer = RowPacker(packing, room, open_rows)
    rows = rows_of(packer, numbered(lengths))
    counts = packer.counts
    packed = [token for row in rows for piece in row for token in piece]
    assert len(set(packed)) == len(packed) == counts.packed_tokens
    assert counts.packed_tokens + counts.dropped_tokens == sum(lengths)
    assert counts.packed_tokens + counts.padded_tokens == room * counts.rows == room * len(rows)
    pieces = {}
    for row in rows:
        for piece in row:
            document = int(np.searchsorted(np.cumsum(lengths), piece[0], side="right"))
            pieces.setdefault(document, []).append(len(piece))
    broken = sum(len(sizes) > 1 or sum(sizes) < lengths[document] for document, sizes in pieces.items())
    assert counts.cut_documents == broken


def test_best_fit_chooses_the_fullest_row_that_has_room():
    packer = RowPacker("best_fit", 10, 3)
    assert rows_of(packer, numbered([5, 8, 7, 2, 3])) == [
        [[5, 6, 7, 8, 9, 10, 11, 12], [20, 21]],
        [[13, 14, 15, 16, 17, 18, 19], [22, 23, 24]],
        [[0, 1, 2, 3, 4]],
    ]


def test_best_fit_never_holds_more_rows_open_than_it_may():
    packer = RowPacker("best_fit", 100, 7)
    for length in np.random.default_rng(0).integers(1, 250, 2_000):
        packer.add(Document(np.zeros(length, dtype=np.int32)))
        while packer.take() is not None:
            pass
        assert len(packer.state_dict()["open"]) <= 7


def test_more_open_rows_leave_fewer_slots_padded():
    lengths = np.random.default_rng(0).integers(1, 100, 3_000).tolist()
    padded = []
    for open_rows in (1, 4, 16, 64):
        packer = RowPacker("best_fit", 128, open_rows)
        rows_of(packer, numbered(lengths))
        padded.append(packer.counts.padded_tokens)
    assert all(fewer < more for more, fewer in pairwise(padded))


# --- going on -------------------------------------------------------------------------------------------------------


@quick
@given(LENGTHS, st.integers(1, 9), PACKINGS, st.integers(1, 4))
def test_a_packer_rebuilt_at_every_step_makes_the_same_rows(lengths, room, packing, open_rows):
    expected = rows_of(RowPacker(packing, room, open_rows), numbered(lengths))
    packer, rows = RowPacker(packing, room, open_rows), []
    for ids in numbered(lengths):
        packer.add(Document(ids, 1))
        while True:
            packer = RowPacker(packing, room, open_rows, packer.state_dict(), Document(ids, 1))
            if (row := packer.take()) is None:
                break
            rows.append(row)
    while True:
        packer = RowPacker(packing, room, open_rows, packer.state_dict())
        if (row := packer.close()) is None:
            break
        rows.append(row)
    assert [[document.ids.tolist() for document in row.documents] for row in rows] == expected
    first_tokens = {int(ids[0]) for ids in numbered(lengths)}
    for row in rows:
        for document in row.documents:
            assert document.unlabelled == (int(document.ids[0]) in first_tokens)


def test_what_is_open_does_not_hold_the_callers_batch_in_memory():
    packer, batch = RowPacker("concat", 10, 1), np.zeros(1_000, dtype=np.int32)
    packer.add(Document(batch[:3]))
    packer.take()
    (row,) = packer._open.values()
    assert all(not np.shares_memory(document.ids, batch) for document in row.documents)


# --- interleaved chunks ---------------------------------------------------------------------------------------------


@quick
@given(st.lists(st.integers(1, 15), min_size=1, max_size=6), st.integers(1, 7), st.integers(0, 99))
def test_chunks_are_of_their_own_document_and_in_order(lengths, chunk_tokens, seed):
    order, ids = interleave_chunks(lengths, chunk_tokens, np.random.default_rng(seed))
    owners = np.repeat(np.arange(len(lengths)), lengths)[order]
    assert sorted(order.tolist()) == list(range(sum(lengths)))
    for document in range(len(lengths)):
        assert (np.diff(order[owners == document]) == 1).all()
        assert len(set(ids[owners == document].tolist())) == 1
    first_seen = list(dict.fromkeys(ids.tolist()))
    assert first_seen == list(range(1, len(lengths) + 1))
    changes = np.flatnonzero(np.diff(owners)) + 1
    for place in changes:  # a piece ends at the end of a chunk or of its document
        before = order[place - 1] + 1
        own = before - np.cumsum([0, *lengths])[owners[place - 1]]
        assert own % chunk_tokens == 0 or own == lengths[owners[place - 1]]


def test_every_interleaving_is_as_likely_as_any_other():
    drawn = {}
    for seed in range(3_000):
        _, ids = interleave_chunks([2, 1], 1, np.random.default_rng(seed))
        drawn[tuple(ids.tolist())] = drawn.get(tuple(ids.tolist()), 0) + 1
    assert drawn.keys() == {(1, 1, 2), (1, 2, 1), (1, 2, 2)}  # a a b, a b a, and b a a under its new numbers
    assert all(850 < count < 1_150 for count in drawn.values())


def test_a_chunk_of_no_token_is_refused():
    with pytest.raises(ValueError, match=r"chunk_tokens must be at least 1, got 0; pass 512, say\."):
        interleave_chunks([3], 0, np.random.default_rng(0))
