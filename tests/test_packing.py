"""Packing: rows hold the documents' tokens in order, and the report accounts for every one of them."""

import pickle
import sys
from dataclasses import asdict
from itertools import pairwise
from types import ModuleType

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import quick

from anchor_attn.masks import PackedLayout
from anchor_attn.results import CheckError
from anchor_attn.train import ByteTokenizer, bench, load_tokenizer, pack_documents, read_documents
from anchor_attn.train import tokens as tokens_room

LENGTHS = st.lists(st.integers(0, 12), min_size=1, max_size=12).filter(any)


class Numbered:
    """A vocabulary in which every token of a test has its own id."""

    name = "numbered"
    anchor_token_id = 9_999
    vocab_size = 10_000

    def encode(self, texts):
        return [np.array([int(word) for word in text.split()], dtype=np.int32) for text in texts]


def numbered(lengths):
    """Documents of these lengths whose tokens count on: [0 1 2] [3 4]."""
    ends = np.cumsum(lengths)
    return [list(range(end - length, end)) for end, length in zip(ends, lengths, strict=True)]


def pack_slowly(documents, seq_len, anchor_tokens, cut, max_rows):
    """Rows as lists of pieces, by the definition, and what was dropped and not read."""
    room, rows, dropped, queue = seq_len - anchor_tokens, [], [], [list(d) for d in documents if d]
    while queue and (max_rows is None or len(rows) < max_rows):
        row = []
        while queue and sum(map(len, row)) < room:
            document = queue.pop(0)
            space = room - sum(map(len, row))
            row.append(document[:space])
            if rest := document[space:]:
                if cut == "continue":
                    queue.insert(0, rest)
                else:
                    dropped += rest
        rows.append(row)
    return rows, dropped, [token for document in queue for token in document]


def pieces(row, anchor_tokens):
    """The documents of a packed row."""
    own = row["input_ids"][anchor_tokens:]
    return [part.tolist() for part in np.split(own, np.cumsum(row["document_lengths"])[:-1])]


@quick
@given(
    LENGTHS, st.integers(0, 2), st.integers(1, 9), st.sampled_from(["continue", "drop"]), st.none() | st.integers(1, 4)
)
@example([3, 5, 2], 1, 5, "continue", None)
@example([3, 5, 2], 1, 5, "drop", None)
def test_rows_are_those_of_the_definition_and_nothing_is_lost(lengths, anchor_tokens, room, cut, max_rows):
    documents, seq_len = numbered(lengths), room + anchor_tokens
    rows = pack_documents(
        documents, seq_len, tokenizer=Numbered(), anchor_tokens=anchor_tokens, cut=cut, max_rows=max_rows
    )
    expected, dropped, unread = pack_slowly(documents, seq_len, anchor_tokens, cut, max_rows)
    assert [pieces(row, anchor_tokens) for row in rows] == expected
    assert all((row["input_ids"][:anchor_tokens] == Numbered.anchor_token_id).all() for row in rows)
    assert rows.document_lengths == [[len(piece) for piece in row] for row in expected]

    report = rows.report
    assert report.document_tokens == sum(lengths) == report.packed_tokens + report.dropped_tokens + report.unread_tokens
    assert (report.dropped_tokens, report.unread_tokens) == (len(dropped), len(unread))
    assert report.rows == len(rows) == len(expected)
    assert report.documents + len(report.empty_documents) == len(lengths)
    firsts, lasts = ({document[end] for document in documents if document} for end in (0, -1))
    assert report.continued == sum(row[0][0] not in firsts for row in expected)
    assert report.dropped_documents == (sum(row[-1][-1] not in lasts for row in expected) if cut == "drop" else 0)
    assert report.unread_documents == len(firsts & set(unread))
    assert report.padded_tokens == sum(seq_len - len(row["input_ids"]) for row in rows)


@quick
@given(LENGTHS, st.integers(0, 2**32 - 1))
def test_a_shuffle_keeps_documents_whole_and_follows_its_seed(lengths, seed):
    documents = numbered(lengths)
    one = pack_documents(documents, 500, tokenizer=Numbered(), shuffle_seed=seed)
    two = pack_documents(documents, 500, tokenizer=Numbered(), shuffle_seed=seed)
    assert sorted(pieces(one[0], 1)) == sorted(document for document in documents if document)
    assert (one.tokens == two.tokens).all()


def test_a_shuffle_moves_documents():
    documents = numbered([2] * 50)
    orders = [
        pack_documents(documents, 200, tokenizer=Numbered(), shuffle_seed=s).tokens.tolist() for s in (None, 1, 2)
    ]
    assert orders[0] == list(range(100))
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_only_the_last_row_is_short():
    rows = pack_documents(["a" * 700], 128)
    assert [len(row["input_ids"]) for row in rows] == [128] * 5 + [66]
    assert rows.report.padded_tokens == 62


def test_empty_documents_are_counted_and_named():
    rows = pack_documents([{"name": "a.txt", "text": ""}, {"text": "b"}, {"input_ids": []}], 8)
    assert rows.report.empty_documents == ("a.txt", "document 3")
    assert (rows.report.documents, rows.report.document_tokens) == (1, 1)


@pytest.fixture
def documents(tmp_path):
    for name, text in {"a": "first", "b": "second é", "c": "third"}.items():
        (tmp_path / name).write_text(text)
    return read_documents(tmp_path)


def test_every_form_of_documents_packs_to_the_same_rows(documents):
    ids = [list(row["text"].encode()) for row in documents]
    forms = [
        documents,
        documents.dataset,
        list(documents),
        (row["text"] for row in documents),
        ids,
        [np.array(row, dtype=np.uint8) for row in ids],
        [torch.tensor(row) for row in ids],
        Dataset.from_dict({"input_ids": ids}),
        Dataset.from_dict({"input_ids": ids}).to_iterable_dataset(),
    ]
    rows = [pack_documents(form, 8) for form in forms]
    assert bytes(rows[0].tokens.astype(np.uint8)).decode() == "firstsecond éthird"
    for other in rows[1:]:
        assert other.tokens.dtype == np.int32
        assert (other.tokens == rows[0].tokens).all()
        assert other.document_lengths == rows[0].document_lengths


def test_rows_are_a_map_style_dataset(documents):
    rows = pack_documents(documents, 8)
    assert rows[0]["input_ids"].tolist() == [256, *b"firstse"]
    assert rows[0]["document_lengths"] == [5, 2]
    assert (rows[-1]["input_ids"] == rows[np.int64(len(rows) - 1)]["input_ids"]).all()
    assert rows[0]["input_ids"].dtype == np.int32
    with pytest.raises(IndexError):
        rows[len(rows)]
    loaded = list(torch.utils.data.DataLoader(rows, batch_size=2, collate_fn=list, shuffle=True))
    assert sum(map(len, loaded)) == len(rows)
    assert (pickle.loads(pickle.dumps(rows)).tokens == rows.tokens).all()


def test_a_row_can_be_written_on_without_harm_to_the_others(documents):
    rows = pack_documents(documents, 8)
    before = rows[0]["input_ids"].tolist()
    rows[0]["input_ids"][:] = 0
    assert rows[0]["input_ids"].tolist() == before


def test_rows_describe_themselves_to_the_layout(documents):
    rows = pack_documents(documents, 8, anchor_tokens=2)
    layout = PackedLayout.from_lengths(rows.document_lengths, rows.anchor_tokens, rows.seq_len)
    assert layout.row_tokens == tuple(len(row["input_ids"]) for row in rows)


def test_the_report_reads_in_four_lines_and_goes_to_json():
    report = pack_documents(numbered([2, 4, 6, 0]), 6, tokenizer=Numbered(), cut="drop").report
    assert str(report) == (
        "3 documents, 12 tokens -> 2 rows of 6, 0 slots padded\n"
        "tokens a document: 2 min, 3 / 4 / 5 quartiles, 6 max, 4.0 mean\n"
        "0 rows open with the rest of a document; dropped 2 tokens of 2 documents; unread 0 tokens, 0 whole documents; "
        "1 empty documents"
    )
    assert asdict(report)["document_lengths"] == {
        "min": 2, "lower_quartile": 3.0, "median": 4.0, "upper_quartile": 5.0, "max": 6, "mean": 4.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 1}, r"seq_len must be at least 2 \(anchor_tokens=1 and one token\), got 1"),
        ({"seq_len": 3, "anchor_tokens": 3}, "seq_len must be at least 4"),
        ({"anchor_tokens": -1}, "anchor_tokens must be at least 0, got -1"),
        ({"cut": "away"}, r"cut must be one of \('continue', 'drop'\), got 'away'"),
        ({"max_rows": 0}, "max_rows must be at least 1, got 0"),
        ({"documents": []}, "documents must hold at least one token, got 0 documents without any"),
        ({"documents": ["", ""]}, "documents must hold at least one token, got 2 documents without any"),
        ({"documents": [{"body": "x", "name": "a.txt"}]}, r"got the columns \['body', 'name'\] in 'a.txt'; rename"),
        ({"documents": [[1], [2, 257]]}, r"token ids from 0 to 256, .* 'bytes', got 257 in 'document 2'; pass the"),
        ({"documents": [[1], np.array([2**40])]}, r"token ids from 0 to 256, .* got 1099511627776 in 'document 2'"),
        ({"documents": [{"name": "a:1", "input_ids": [0, -1]}]}, "got -1 in 'a:1'"),
        ({"documents": [[5], np.array([2**64 - 1], dtype=np.uint64)]}, "got 18446744073709551615 in 'document 2'"),
        ({"documents": [np.array([5, -1], dtype=np.int8)]}, "got -1 in 'document 1'"),
        ({"documents": [np.array([300], dtype=np.int32), [1]]}, "got 300 in 'document 1'"),
    ],
)
def test_bad_values_raise_one_line(options, message):
    with pytest.raises(ValueError, match=message) as bad:
        pack_documents(**{"documents": ["some text"], "seq_len": 8, **options})
    assert "\n" not in str(bad.value)


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ("one text", "documents must be a sequence of documents, got str"),
        ({"text": ["x"]}, "documents must be a sequence of documents, got dict"),
        (None, "documents must be a sequence of documents, got NoneType"),
        ([[1.0]], r"documents must hold text or token ids, got \[1.0\] in 'document 1'"),
        ([[[1]]], r"documents must hold text or token ids, got \[\[1\]\] in 'document 1'"),
        ([[1], 3], "documents must hold text or token ids, got 3 in 'document 2'"),
        ([[True]], r"got \[True\] in 'document 1'"),
    ],
)
def test_what_is_no_document_raises(documents, message):
    with pytest.raises(TypeError, match=message):
        pack_documents(documents, 8)


# --- token ids as they lie in a dataset's column --------------------------------------------------------------------

INTEGERS = [getattr(pa, f"{sign}int{bits}")() for sign in ("", "u") for bits in (8, 16, 32, 64)]


def id_column(documents, dtype, large=False):
    """An arrow array of lists whose values begin behind others in their buffer, as in a slice of a larger column."""
    lists, offset = (pa.LargeListArray, pa.int64()) if large else (pa.ListArray, pa.int32())
    values = pa.array([7, *(token for document in documents for token in document)], dtype).slice(1)
    ends = np.cumsum([0, *map(len, documents)])
    return lists.from_arrays(pa.array(ends, offset), values)


@st.composite
def id_datasets(draw):
    """Datasets of token ids: any integer type, chunks, slices, names, formats, rows picked or in another order."""
    documents = numbered(draw(LENGTHS))
    dtype, large = draw(st.sampled_from(INTEGERS)), draw(st.booleans())
    documents = [[token % 100 for token in document] for document in documents]  # int8 holds them
    cuts = sorted(draw(st.lists(st.integers(0, len(documents)), max_size=3)))
    bounds = [0, *cuts, len(documents)]
    chunks = [id_column(documents[a:b], dtype, large) for a, b in pairwise(bounds)]
    columns = {"input_ids": pa.chunked_array(chunks)}
    if draw(st.booleans()):
        columns["name"] = [f"file {place}" for place in range(len(documents))]
    first = draw(st.integers(0, len(documents) - 1))
    dataset = Dataset(pa.table(columns).slice(first))
    if draw(st.booleans()):
        picked = draw(st.permutations(range(len(dataset))))
        dataset = dataset.select(picked[: draw(st.integers(1, len(picked)))])
    return dataset.with_format(draw(st.sampled_from([None, "numpy", "torch"])))


def outcome(documents, seq_len, **options):
    """Everything that packing gives, or the one line that it raises."""
    try:
        rows = pack_documents(documents, seq_len, **options)
    except (TypeError, ValueError) as error:
        return type(error), str(error)
    read = [row["input_ids"].tolist() for row in rows]
    return rows.tokens.tolist(), rows.tokens.dtype, read, rows.document_lengths, rows.report


@quick
@given(
    id_datasets(),
    st.integers(0, 2),
    st.integers(1, 9),
    st.sampled_from(["continue", "drop"]),
    st.none() | st.integers(0, 9),
    st.none() | st.integers(1, 4),
)
def test_a_column_packs_as_its_documents_one_by_one(dataset, anchor_tokens, room, cut, shuffle_seed, max_rows):
    options = {"anchor_tokens": anchor_tokens, "cut": cut, "shuffle_seed": shuffle_seed, "max_rows": max_rows}
    assert tokens_room._column_tokens(dataset) is not None
    one_by_one = outcome(list(dataset), room + anchor_tokens, **options)
    assert outcome(dataset, room + anchor_tokens, **options) == one_by_one


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("shuffle_seed", [None, 0, 1])
def test_ids_outside_the_vocabulary_are_named_as_one_by_one(dtype, shuffle_seed):
    signed = str(dtype).startswith("int")
    bad = -3 if signed else 2 ** min(dtype.bit_width, 63) - 1
    chunks = [id_column(documents, dtype) for documents in ([[1, 2], []], [[3], [4, bad, bad]], [[5], [bad]])]
    names = ["a", "b", "c", "d", "e", "f"]
    dataset = Dataset(pa.table({"input_ids": pa.chunked_array(chunks), "name": names}))

    class FewIds(Numbered):
        vocab_size = 200

    raised, line = outcome(dataset, 8, tokenizer=FewIds(), shuffle_seed=shuffle_seed)
    assert raised is ValueError
    assert f"got {bad} in '" in line
    assert (raised, line) == outcome(list(dataset), 8, tokenizer=FewIds(), shuffle_seed=shuffle_seed)


@pytest.mark.parametrize("dtype", [pa.int64(), pa.uint64(), pa.uint32()], ids=str)
def test_an_id_that_would_wrap_into_the_vocabulary_is_found(dtype):
    wraps = 2**32 if dtype.bit_width == 64 else 2**32 - 1
    mixed = [np.array([1], dtype=np.int32), np.array([wraps, 5], dtype=dtype.to_pandas_dtype())]
    for documents in (Dataset(pa.table({"input_ids": id_column([[1], [wraps, 5]], dtype)})), mixed):
        with pytest.raises(ValueError, match=f"got {wraps} in 'document 2'"):
            pack_documents(documents, 8)


@pytest.mark.parametrize(
    ("columns", "form"),
    [
        pytest.param({"input_ids": [[1, 2], None]}, {}, id="a null document"),
        pytest.param({"input_ids": [[1, 2], [3, None]]}, {}, id="a null token"),
        pytest.param({"input_ids": [[True], [False]]}, {}, id="booleans"),
        pytest.param({"input_ids": [[1.0], [2.0]]}, {}, id="floats"),
        pytest.param({"input_ids": [[[1]], [[2]]]}, {}, id="nested lists"),
        pytest.param({"input_ids": ["a", "b"]}, {}, id="texts named input_ids"),
        pytest.param({"input_ids": [3, 4]}, {}, id="numbers"),
        pytest.param({"input_ids": pa.array([[1, 2], [3, 4]], pa.list_(pa.int32(), 2))}, {}, id="lists of one length"),
        pytest.param({"input_ids": [[1], [2]], "text": ["a", "b"]}, {}, id="a text beside the ids"),
        pytest.param({"input_ids": [[1], [2]], "text": ["a", None]}, {}, id="a null text beside the ids"),
        pytest.param(
            {"input_ids": [[1], [2]], "text": ["a", "b"]}, {"columns": ["input_ids"]}, id="a text that is not shown"
        ),
        pytest.param(
            {"input_ids": [[1], [2]], "text": ["a", "b"]},
            {"columns": ["input_ids"], "output_all_columns": True},
            id="a text that is shown after all",
        ),
        pytest.param({"input_ids": [[1], [2]], "x": [1, 2]}, {"columns": ["x"]}, id="ids that are not shown"),
        pytest.param({"input_ids": [[], []], "name": ["a", "b"]}, {"columns": ["input_ids"]}, id="hidden names"),
        pytest.param({"input_ids": [[], [1]], "name": ["a", "b"]}, {"columns": ["input_ids"]}, id="a hidden name"),
        pytest.param({"input_ids": [[], [1]], "name": [5, None]}, {}, id="a name that is a number"),
        pytest.param({"input_ids": [[1], [2]]}, {"type": "numpy", "dtype": np.float32}, id="a format of floats"),
        pytest.param({"input_ids": [[1], [2]]}, {"type": "arrow"}, id="a format of tables"),
        pytest.param({"input_ids": pa.array([], pa.list_(pa.int32()))}, {}, id="no document"),
    ],
)
def test_an_unusual_dataset_packs_or_raises_as_one_by_one(columns, form):
    dataset = Dataset(pa.table(columns)).with_format(**form)
    assert outcome(dataset, 8) == outcome(list(dataset), 8)


def test_a_transform_of_the_dataset_is_applied():
    dataset = Dataset.from_dict({"input_ids": [[1], [2]]})
    dataset.set_transform(lambda batch: {"input_ids": [[token + 1 for token in ids] for ids in batch["input_ids"]]})
    assert pack_documents(dataset, 8).tokens.tolist() == [2, 3]


def test_int32_ids_in_one_piece_are_not_copied():
    ids = np.arange(6, dtype=np.int32)
    dataset = Dataset(pa.table({"input_ids": pa.ListArray.from_arrays([0, 2, 6], pa.array(ids))}))
    rows = pack_documents(dataset, 4)
    assert np.shares_memory(rows.tokens, ids)
    assert not rows.tokens.flags.writeable
    rows[0]["input_ids"][:] = 0
    assert rows[1]["input_ids"].tolist() == [256, 3, 4, 5]
    assert pickle.loads(pickle.dumps(rows)).tokens.tolist() == ids.tolist()


def test_a_caller_may_write_to_his_arrays_after_packing():
    own = np.arange(6, dtype=np.int32)
    rows = pack_documents([own], 8)
    own[:] = 9_999
    assert rows[0]["input_ids"].tolist() == [256, 0, 1, 2, 3, 4, 5]


def test_documents_with_token_ids_are_read_by_column(tmp_path, monkeypatch):
    (tmp_path / "ids.jsonl").write_text('{"input_ids": [1, 2, 3]}\n{"input_ids": [4]}\n{"input_ids": [400]}\n')
    documents = read_documents(tmp_path / "ids.jsonl")
    monkeypatch.setattr(tokens_room, "_tokenize", None)
    assert pack_documents(documents.select([0, 1]), 8).tokens.tolist() == [1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"got 400 in 'ids\.jsonl:3'"):
        pack_documents(documents, 8)


# --- the benchmark --------------------------------------------------------------------------------------------------


def test_the_documents_of_the_benchmark_are_those_drawn_in_chunks_of_a_thousand():
    lengths = np.array(bench.draw_corpus_lengths(3_000_000, 0))
    ids = np.arange(lengths.sum(), dtype=np.int32)
    dataset = bench.token_dataset(ids, lengths)
    assert [len(chunk) for chunk in dataset.data.column("input_ids").chunks][:2] == [1_000, 1_000]
    ends = lengths.cumsum()
    for place in (0, 999, 1_000, len(lengths) - 1):
        assert dataset[place]["input_ids"] == list(range(ends[place] - lengths[place], ends[place]))
    assert len(dataset) == len(lengths)


@pytest.mark.parametrize(
    ("options", "ids", "lengths", "message"),
    [
        ({}, [0, 1, 2, 3, 5, 4], [2, 4], "must hold the documents' tokens in order .* from token 3 on"),
        ({"cut": "drop"}, range(6), [2, 4], "must hold every token before they are timed, got 3 of 6"),
        ({"max_rows": 1}, range(6), [2, 4], "must hold every token before they are timed, got 3 of 6"),
        ({}, range(6), [1, 5], "must say where documents begin before they are timed"),
        ({}, range(6), [6], "must say where documents begin before they are timed"),
    ],
)
def test_rows_that_lose_move_or_merge_fail_the_parity_check(options, ids, lengths, message):
    rows = pack_documents([[0, 1], [2, 3, 4, 5]], 4, **options)
    with pytest.raises(CheckError, match=message):
        bench.check_packing(rows, np.array(ids, dtype=np.int32), np.array(lengths))


@quick
@given(LENGTHS, st.integers(1, 9))
def test_right_rows_pass_the_parity_check(lengths, room):
    lengths = [length for length in lengths if length]
    ids = np.arange(sum(lengths), dtype=np.int32)
    rows = pack_documents(numbered(lengths), room + 1, tokenizer=Numbered())
    bench.check_packing(rows, ids, np.array(lengths))


def test_nothing_is_timed_before_parity_holds(monkeypatch):
    monkeypatch.setattr(bench, "pack_documents", lambda *args, **options: pack_documents(*args, **options, max_rows=1))
    monkeypatch.setattr(bench, "time_packers", None)
    with pytest.raises(CheckError, match="rows must hold every token"):
        bench.bench_packing(10_000, 512, 1, 0)


def test_packers_alternate_and_ratios_are_to_each_strategy_of_trl(monkeypatch):
    now, order = [0.0], []
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])

    def packer(name, *seconds):
        rounds = iter(seconds)

        def pack():
            order.append(name)
            now[0] += next(rounds)
            return [0] * 7

        def rows(packed):
            now[0] += 0.5
            return packed

        return bench.Packer(name, pack, lambda packed: 90, rows, True)

    packers = [packer("ours", 99, 1, 3, 2), packer("TRL wrapped", 99, 4, 5, 1), packer("TRL bfd", 99, 8, 8, 8)]
    ours, wrapped, bfd = bench.time_packers(packers, 512, 100, 3)
    turns = [tuple(order[first : first + 3]) for first in range(0, 12, 3)]
    assert [sorted(turn) for turn in turns] == [["TRL bfd", "TRL wrapped", "ours"]] * 4
    assert len(set(turns)) > 1
    assert (ours.seconds, ours.fastest_s, ours.slowest_s, ours.read_s) == (2, 1, 3, 0.5)
    assert (ours.tokens_per_s, ours.rows, ours.dropped_tokens) == (50, 7, 10)
    assert (ours.ratio_to_wrapped, ours.ratio_to_bfd) == (2, 4)
    assert (wrapped.ratio_to_wrapped, wrapped.ratio_to_bfd) == (1, 2)
    assert (bfd.ratio_to_wrapped, bfd.ratio_to_bfd) == (0.5, 1)


def test_trl_where_absent_is_named_and_has_no_numbers(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    timings = bench.bench_packing(10_000, 512, 1, 0)
    assert [timing.name for timing in timings] == [
        "ours continue",
        "ours drop",
        *(f"TRL {strategy} (not installed)" for strategy in ("wrapped", "bfd", "bfd_split")),
    ]
    kept, dropped, absent = timings[:3]
    assert kept.dropped_tokens == 0 < dropped.dropped_tokens
    assert kept.rows == -(-kept.tokens // 511) > dropped.rows
    assert (kept.ratio_to_wrapped, kept.ratio_to_bfd, absent.seconds, absent.rows) == (None,) * 4


def test_trl_packs_the_same_dataset_and_what_it_drops_is_counted(monkeypatch):
    calls = []

    def pack_dataset(dataset, seq_length, strategy):
        calls.append((strategy, seq_length, datasets.are_progress_bars_disabled()))
        return dataset.select(range(1, len(dataset))) if strategy == "bfd" else dataset

    trl = ModuleType("trl")
    trl.pack_dataset = pack_dataset
    monkeypatch.setitem(sys.modules, "trl", trl)
    datasets.enable_progress_bars()
    timings = bench.bench_packing(10_000, 512, 1, 0)
    assert sorted(calls) == sorted([(strategy, 512, True) for strategy in ("wrapped", "bfd", "bfd_split")] * 2)
    assert not datasets.are_progress_bars_disabled()
    lengths = bench.draw_corpus_lengths(10_000, 0)
    assert [timing.dropped_tokens for timing in timings[2:]] == [0, lengths[0], 0]
    assert [timing.rows for timing in timings[2:]] == [len(lengths), len(lengths) - 1, len(lengths)]
    assert [timing.knows_documents for timing in timings[2:]] == [False, True, True]
    assert timings[2].ratio_to_wrapped == timings[3].ratio_to_bfd == 1


@pytest.mark.parametrize(("tokens", "rounds"), [(0, 1), (1, 0)])
def test_a_benchmark_of_nothing_is_refused(tokens, rounds):
    with pytest.raises(ValueError, match=f"tokens and rounds must be at least 1, got {tokens} and {rounds}"):
        bench.bench_packing(tokens, 512, rounds, 0)


# --- tokenizers -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved_tokenizer(tmp_path_factory):
    """A Hugging Face tokenizer that adds a BOS by itself, cuts at 3 tokens and pads to 5, with added tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2, "</s>": 3, "<s>": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 4), ("</s>", 3)])
    words.enable_truncation(3)
    words.enable_padding(length=5)

    def save(**special):
        folder = tmp_path_factory.mktemp("tokenizer")
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", **special)
        tokenizer.add_tokens(["extra"])
        tokenizer.save_pretrained(folder)
        return folder

    return save


def test_a_hugging_face_tokenizer_adds_cuts_and_pads_nothing(saved_tokenizer):
    from transformers import AutoTokenizer

    folder = saved_tokenizer(bos_token="<s>", eos_token="</s>")
    assert AutoTokenizer.from_pretrained(folder)("a")["input_ids"][0] == 4  # by itself it does
    tokenizer = load_tokenizer(folder)
    encoded = tokenizer.encode(["a", "a b a b a b", "", "extra"])
    added = tokenizer.tokenizer.convert_tokens_to_ids("extra")
    assert [ids.tolist() for ids in encoded] == [[1], [1, 2, 1, 2, 1, 2], [], [added]]
    assert all(ids.dtype == np.int32 for ids in encoded)
    assert tokenizer.encode([]) == []
    assert (tokenizer.name, tokenizer.anchor_token_id, tokenizer.vocab_size) == (str(folder), 4, added + 1)


def test_packing_takes_a_tokenizer_by_path_as_an_object_or_as_loaded(saved_tokenizer):
    from transformers import AutoTokenizer

    folder = saved_tokenizer(bos_token="<s>", eos_token="</s>")
    for tokenizer in (folder, str(folder), AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)):
        rows = pack_documents(["a b", "b"], 6, tokenizer=tokenizer)
        assert rows[0]["input_ids"].tolist() == [4, 1, 2, 2]


def test_the_anchor_is_the_eos_where_there_is_no_bos(saved_tokenizer):
    assert load_tokenizer(saved_tokenizer(eos_token="</s>")).anchor_token_id == 3


def test_a_tokenizer_with_neither_raises(saved_tokenizer):
    with pytest.raises(
        ValueError, match=r"tokenizer must have a BOS or an EOS token for the anchor, got .* with neither"
    ):
        load_tokenizer(saved_tokenizer())


def test_a_tokenizer_that_does_not_load_is_one_clear_line(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer must be 'bytes' or the name .* check the files there") as bad:
        load_tokenizer(tmp_path)
    assert "\n" not in str(bad.value)


@quick
@given(st.text())
def test_bytes_come_back_from_the_byte_tokenizer(text):
    (ids,) = ByteTokenizer().encode([text])
    assert bytes(ids.tolist()).decode() == text
    assert ids.dtype == np.int32
    assert ByteTokenizer.anchor_token_id == ByteTokenizer.vocab_size - 1 == 256
