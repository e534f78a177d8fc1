"""Sources of a stream: every record once, whatever the shards; what cannot be used is counted and named."""

import gzip
import json

import datasets
import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from strategies import quick

from anchor_attn.train import PackedStream, StreamSource, read_documents
from anchor_attn.train.streaming import documents as documents_room
from anchor_attn.train.streaming import files as files_room
from anchor_attn.train.streaming.documents import DocumentStream, Draws, Shard
from anchor_attn.train.streaming.parts import shard_blocks
from anchor_attn.train.streaming.source import open_sources
from anchor_attn.train.tokenizers import ByteTokenizer

ONCE_IN_ORDER = Draws(seed=0, shuffle=False, window_documents=7, epochs=1)
ONCE = ONCE_IN_ORDER._replace(shuffle=True)
ENDLESS = ONCE._replace(epochs=None)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Files of a few hundred bytes have as many blocks as large ones."""
    monkeypatch.setattr(files_room, "BLOCK_BYTES", 64)
    monkeypatch.setattr(files_room, "BATCH_RECORDS", 4)
    monkeypatch.setattr(documents_room, "ENCODED_TOGETHER", 3)


def texts_of(count, seed=0):
    sizes = np.random.default_rng(seed).integers(0, 60, count)
    return [f"{seed}.{number} {'é' * size}." for number, size in enumerate(sizes)]


def write_lines(path, texts):
    path.write_bytes(b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts))


def write_messy_lines(path, texts):
    """Blank lines, \\r\\n, a byte order mark, no end of the last line."""
    lines = [json.dumps({"text": text}, ensure_ascii=False).encode() for text in texts]
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n\n \n".join(lines))


def write_gzip(path, texts):
    path.write_bytes(gzip.compress(b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)))


def write_parquet(path, texts):
    Dataset.from_dict({"other": list(range(len(texts))), "text": texts}).to_parquet(path, batch_size=9)


def make_source(kind, folder, monkeypatch):
    """A source of 40 documents, and their texts in the source's own order."""
    texts = texts_of(40)
    writers = {
        "a.jsonl": write_lines,
        "messy.jsonl": write_messy_lines,
        "a.jsonl.gz": write_gzip,
        "a.parquet": write_parquet,
    }
    if kind in writers:
        writers[kind](folder / kind, texts)
        return folder / kind, texts
    if kind == "rows in a folder":
        write_lines(folder / "a.jsonl", texts[:11])
        write_gzip(folder / "b.jsonl.gz", texts[11:20])
        write_parquet(folder / "c.parquet", texts[20:31])
        write_messy_lines(folder / "d.json", texts[31:])
        (folder / "README").write_text("not a row")
        return folder, texts
    if kind == "text in a folder":
        for number, text in enumerate(texts):
            (folder / f"{number:02}.txt").write_text(text)
        return folder, texts
    if kind == "a dataset":
        return Dataset.from_dict({"text": texts}), texts
    if kind == "token ids":
        return Dataset.from_dict({"input_ids": [list(text.encode()) for text in texts]}), texts
    if kind == "documents":
        write_lines(folder / "a.jsonl", texts)
        return read_documents(folder / "a.jsonl"), texts
    assert kind == "a hub name"
    shards = Dataset.from_dict({"text": texts, "other": texts}).to_iterable_dataset(num_shards=3)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: shards)
    return "owner/name", texts


KINDS = [
    "a.jsonl",
    "messy.jsonl",
    "a.jsonl.gz",
    "a.parquet",
    "rows in a folder",
    "text in a folder",
    "a dataset",
    "token ids",
    "documents",
    "a hub name",
]


def streams_of(source, num_shards=1, draws=ONCE, **settings):
    (opened,) = open_sources(source if isinstance(source, StreamSource) else StreamSource(source, **settings))
    return [DocumentStream(opened, 0, ByteTokenizer(), Shard(index, num_shards), draws) for index in range(num_shards)]


def drawn(stream, count=None):
    """The texts of the next documents, all of them when count is None."""
    texts = []
    while (count is None or len(texts) < count) and (document := stream.draw()) is not None:
        texts.append(document.ids.astype(np.uint8).tobytes().decode())
    return texts


# --- sharding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_shards", [1, 2, 3, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_the_shards_together_read_every_document_once(kind, num_shards, tmp_path, monkeypatch):
    source, texts = make_source(kind, tmp_path, monkeypatch)
    shares = [drawn(stream) for stream in streams_of(source, num_shards)]
    assert sorted(text for share in shares for text in share) == sorted(texts)
    if kind != "rows in a folder":  # its compressed file is small against its bytes
        assert all(shares)


@pytest.mark.parametrize("kind", KINDS)
def test_one_shard_without_shuffling_reads_the_order_of_the_source(kind, tmp_path, monkeypatch):
    source, texts = make_source(kind, tmp_path, monkeypatch)
    (stream,) = streams_of(source, draws=ONCE_IN_ORDER)
    assert drawn(stream) == texts


@quick
@given(
    st.lists(st.integers(0, 90), min_size=1, max_size=12),
    st.integers(1, 9),
    st.integers(1, 300),
    st.sampled_from([b"\n", b"\r\n"]),
    st.booleans(),
)
def test_a_line_belongs_to_one_block_however_files_and_lines_are_cut(sizes, num_shards, block_bytes, end, ended):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(files_room, "BLOCK_BYTES", block_bytes)
        lines = [json.dumps({"text": f"{number}{'x' * size}"}).encode() for number, size in enumerate(sizes)]
        (Path(folder) / "a.jsonl").write_bytes(end.join(lines) + (end if ended else b""))
        (Path(folder) / "b.jsonl").write_bytes(b"" if len(sizes) % 2 else end.join(lines))
        (source,) = open_sources(folder)
        read = [
            record.content["text"]
            for shard in range(num_shards)
            for part, begin, stop in shard_blocks(source.parts, shard, num_shards)
            for record in source.parts[part].read(begin, stop, None)
        ]
    once = [json.loads(line)["text"] for line in lines]
    assert read == once * (1 if len(sizes) % 2 else 2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_is_read_on_from_any_place_in_it(kind, tmp_path, monkeypatch):
    source, _ = make_source(kind, tmp_path, monkeypatch)
    (opened,) = open_sources(source)
    for part, begin, end in shard_blocks(opened.parts, 1, 3):
        records = list(opened.parts[part].read(begin, end, None))
        for number, record in enumerate(records, start=1):
            assert list(opened.parts[part].read(begin, end, record.next_place)) == records[number:]


def test_shards_of_lines_are_balanced_by_bytes(tmp_path):
    write_lines(tmp_path / "a.jsonl", [f"{number:4}" for number in range(1_000)])
    shares = [len(drawn(stream)) for stream in streams_of(tmp_path / "a.jsonl", 8)]
    assert max(shares) - min(shares) <= 1


def test_shards_of_one_compressed_file_are_balanced_by_records(tmp_path):
    write_gzip(tmp_path / "a.jsonl.gz", [f"{number:4}" for number in range(1_000)])
    shares = [len(drawn(stream)) for stream in streams_of(tmp_path / "a.jsonl.gz", 8)]
    assert max(shares) - min(shares) <= 3


def test_a_shard_without_a_document_ends_with_one_clear_error(tmp_path):
    write_lines(tmp_path / "a.jsonl", ["one", "two"])
    stream = streams_of(tmp_path / "a.jsonl", 4, ENDLESS)[1]
    message = (
        r"sources\[0\] must hold a document for each of 4 shards \(ranks × workers\), got 2 in '.*a\.jsonl' and "
        r"none for shard 1; use fewer workers or ranks, or a source with more documents\."
    )
    with pytest.raises(ValueError, match=rf"^{message}$"):
        stream.draw()


@pytest.mark.parametrize("epochs", [1, 3])
def test_where_epochs_are_counted_a_shard_without_a_document_warns_once_and_gives_nothing(epochs, tmp_path):
    write_lines(tmp_path / "a.jsonl", ["one"])
    streams = streams_of(tmp_path / "a.jsonl", 2, ONCE._replace(epochs=epochs))
    with pytest.warns(
        UserWarning, match=r"^A shard gives no row of a source: sources\[0\] .* 2 shards .* got 1 in"
    ) as said:
        assert [drawn(stream) for stream in streams] == [["one"] * epochs, []]
    assert len(said) == 1


def test_a_source_in_which_no_record_is_a_document_is_refused_however_often_it_is_read(tmp_path):
    (tmp_path / "a.jsonl").write_text("{broken\n" * 3)
    (tmp_path / "empty.jsonl").write_text("")
    for name, faults in (("a", r" \(.*not JSON.*\)"), ("empty", "")):
        for draws in (ONCE, ENDLESS):
            (stream,) = streams_of(tmp_path / f"{name}.jsonl", draws=draws)
            with pytest.raises(ValueError, match=rf"got 0 in '.*' and none for shard 0{faults}; use fewer"):
                stream.draw()


def test_the_documents_of_an_error_are_counted_so_far(tmp_path, monkeypatch):
    monkeypatch.setattr(documents_room, "MOST_COUNTED", 3)
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n' * 4 + json.dumps({"text": "x" * 3_000}))
    stream = streams_of(tmp_path / "a.jsonl", 4, ENDLESS)[2]
    with pytest.raises(ValueError, match=r"got at least 3 in '.*' and none for shard 2;"):
        stream.draw()


# --- order ----------------------------------------------------------------------------------------------------------


def test_every_epoch_draws_another_order_of_the_same_documents(tmp_path, monkeypatch):
    source, texts = make_source("a.jsonl", tmp_path, monkeypatch)
    (stream,) = streams_of(source, draws=ENDLESS)
    epochs = [drawn(stream, 40) for _ in range(3)]
    assert all(sorted(epoch) == sorted(texts) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, texts]}) == 4


def test_seeds_draw_different_orders_and_a_seed_the_same(tmp_path, monkeypatch):
    source, _ = make_source("a.jsonl", tmp_path, monkeypatch)
    orders = [tuple(drawn(*streams_of(source, draws=ONCE._replace(seed=seed)))) for seed in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]


def test_a_window_reaches_over_many_blocks(tmp_path):
    write_lines(tmp_path / "a.jsonl", [f"{number:04}" for number in range(1_000)])
    (stream,) = streams_of(tmp_path / "a.jsonl", draws=ONCE._replace(window_documents=100))
    window = [int(text) for text in drawn(stream, 100)]
    assert len({number // 10 for number in window}) > 20  # in the file's order they were 10 tens


# --- upsampling -----------------------------------------------------------------------------------------------------


def test_long_documents_are_drawn_so_many_times_as_often(tmp_path):
    write_lines(tmp_path / "a.jsonl", [f"{number:03}" + "x" * (60 if number < 20 else 0) for number in range(100)])
    source = StreamSource(tmp_path / "a.jsonl", long_tokens=50, long_factor=4)
    (stream,) = streams_of(source, draws=ENDLESS)
    counts = {}
    while stream._epoch < 400:
        (text,) = drawn(stream, 1)
        counts[text] = counts.get(text, 0) + 1
    short, long = (
        [count for text, count in counts.items() if (len(text) > 50) is is_long] for is_long in (False, True)
    )
    assert len(short) == 80
    assert len(long) == 20
    assert min(long) >= 399
    assert np.mean(long) / np.mean(short) == pytest.approx(
        4, rel=0.03
    )  # 80 × 400 draws: 3 standard deviations are 0.028
    assert max(short) < 0.4 * min(long)
    assert stream.counts.thinned + stream.counts.documents == pytest.approx(400 * 100, abs=100)


# --- bad records ----------------------------------------------------------------------------------------------------


def write_bad(path):
    lines = [b'{"text": "one"}', b"{broken", b'{"text": ""}', b'{"text": "two"}', b"\xff\xfe", b"[1]", b'{"text": 3}']
    path.write_bytes(b"\n".join(lines))


def test_bad_records_are_counted_and_named_by_their_line(tmp_path):
    write_bad(tmp_path / "a.jsonl")
    (stream,) = streams_of(tmp_path / "a.jsonl", draws=ONCE_IN_ORDER)
    assert drawn(stream) == ["one", "two"]
    assert stream.counts.records == 7
    assert stream.counts.first_bad == [
        "a.jsonl:2: not JSON",
        "a.jsonl:3: empty text",
        "a.jsonl:5: not UTF-8",
        "a.jsonl:6: not a JSON object",
        "a.jsonl:7: text is a int, not a string",
    ]


def test_one_bad_record_more_than_allowed_is_one_clear_error(tmp_path):
    write_bad(tmp_path / "a.jsonl")
    drawn(*streams_of(tmp_path / "a.jsonl", bad_records=5))
    with pytest.raises(
        ValueError,
        match=r"sources\[0\] must hold at most bad_records=4 bad records a worker, got 5 within the first 7 of "
        r"'.*a\.jsonl' \(.*; a\.jsonl:7: text is a int, not a string\); mend them, or raise bad_records\.",
    ):
        drawn(*streams_of(tmp_path / "a.jsonl", draws=ONCE_IN_ORDER, bad_records=4))


def test_bad_records_count_once_however_often_a_run_is_resumed_and_an_epoch_comes_again(tmp_path):
    write_bad(tmp_path / "a.jsonl")
    (stream,) = streams_of(tmp_path / "a.jsonl", draws=ENDLESS, bad_records=5)
    for _ in range(9):
        drawn(stream, 1)
        again = DocumentStream(stream.source, 0, ByteTokenizer(), Shard(0, 1), ENDLESS, stream.state_dict())
        assert again.counts == stream.counts
        stream = again
    assert sum(stream.counts.bad.values()) == 5
    assert stream.counts.records == 7


def test_a_file_that_ends_too_early_counts_as_one_bad_record_and_the_next_one_is_read(tmp_path):
    whole = tmp_path / "a.jsonl.gz"
    write_gzip(whole, [f"{number} {'abc' * number}" for number in range(500)])
    whole.write_bytes(whole.read_bytes()[:-500])
    write_lines(tmp_path / "b.jsonl", ["the next"])
    (stream,) = streams_of(tmp_path, draws=ONCE_IN_ORDER)
    assert drawn(stream)[-1] == "the next"
    ((reason, count),) = stream.counts.bad.items()
    assert (count, reason.partition(",")[0]) == (1, "cannot be read from here on")
    assert "EOFError" in reason
    assert stream.counts.first_bad[0].startswith("a.jsonl.gz:")


def test_a_broken_parquet_file_counts_as_one_bad_record(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and then nothing")
    write_parquet(tmp_path / "b.parquet", ["the next"])
    (stream,) = streams_of(tmp_path)
    assert drawn(stream) == ["the next"]
    assert stream.counts.first_bad[0].startswith("a.parquet:1: cannot be read from here on, ArrowInvalid")


def test_a_record_without_columns_is_called_that(tmp_path):
    (tmp_path / "a.jsonl").write_text('{}\n{"text": "one"}\n')
    (stream,) = streams_of(tmp_path / "a.jsonl")
    assert drawn(stream) == ["one"]
    assert stream.counts.first_bad == ["a.jsonl:1: a record without columns"]


def test_a_column_that_no_row_has_is_named(tmp_path):
    write_lines(tmp_path / "a.jsonl", ["one", "two"])
    with pytest.raises(ValueError, match=r"a\.jsonl:1: no column 'body' or 'input_ids' among 'text'"):
        drawn(*streams_of(tmp_path / "a.jsonl", text_column="body", draws=ONCE_IN_ORDER))


@pytest.mark.parametrize(
    ("ids", "fault"),
    [([], "empty input_ids"), ([1, -1], "negative token id"), ([257], "token id outside the vocabulary of 257")],
)
def test_token_ids_that_are_none_are_bad_records(ids, fault):
    (stream,) = streams_of(Dataset.from_dict({"input_ids": [[1, 2], ids]}))
    drawn(stream)
    assert stream.counts.bad == {fault: 1}


def test_documents_that_a_tokenizer_leaves_empty_are_bad_records(tmp_path):
    class Deaf(ByteTokenizer):
        def encode(self, texts):
            return [ids[:0] if ids[0] == ord("-") else ids for ids in super().encode(texts)]

    write_lines(tmp_path / "a.jsonl", ["one", "-", "two"])
    (opened,) = open_sources(tmp_path / "a.jsonl")
    stream = DocumentStream(opened, 0, Deaf(), Shard(0, 1), ONCE)
    assert sorted(drawn(stream)) == ["one", "two"]
    assert stream.counts.first_bad == ["a.jsonl:2: no token"]


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": 0}, r"weight must be above 0, got 0; leave the source out"),
        ({"weight": float("nan")}, r"weight must be above 0, got nan"),
        ({"long_factor": 0.5}, r"long_factor must be at least 1, got 0\.5"),
        ({"long_factor": 5}, r"long_tokens must say which documents are drawn long_factor=5 times as often"),
        ({"long_tokens": 0}, r"long_tokens must be at least 1, got 0"),
        ({"bad_records": -1}, r"bad_records must be at least 0, got -1"),
        ({"tag": ""}, r"tag must hold at least one character, got ''"),
    ],
)
def test_settings_out_of_their_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        StreamSource("web.jsonl", **settings)


def test_sources_that_are_none_are_refused(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"^sources\[1\]\.path must .* got 'no/such\.txt', which does not exist; check"
    ):
        PackedStream(["stdlib", "no/such.txt"], 64)
    with pytest.raises(ValueError, match=r"^sources\[0\] must hold at least one file, got none in"):
        PackedStream(tmp_path, 64)
    with pytest.raises(ValueError, match="sources must hold at least one source, got none"):
        PackedStream([], 64)
    with pytest.raises(
        TypeError, match=r"sources\[0\]\.path must be a path, a name, Documents or a datasets\.Dataset, got int"
    ):
        PackedStream(StreamSource(3), 64)


def test_a_hub_that_does_not_answer_is_one_clear_error(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"^sources\[0\]\.path must be a path or a dataset .* got 'owner/name'"):
        PackedStream("owner/name", 64)
