"""Streams: a resumed run sees the next row, ranks and workers share the documents, the report accounts for the rest."""

import gzip
import io
import json
import os
import pickle
import resource
import shutil
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from anchor_attn.masks import PackedLayout
from anchor_attn.train import (
    PackedCollator,
    PackedStream,
    StreamSource,
    create_loader,
    pack_documents,
    read_report,
)
from anchor_attn.train.streaming import documents as documents_room
from anchor_attn.train.streaming import files as files_room

SEQ_LEN = 64
# From Python 3.12 on, a fork beside threads warns; torch has threads.
forks = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files_room, "BLOCK_BYTES", 512)
        patch.setattr(documents_room, "ENCODED_TOGETHER", 5)
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two files of 60 documents each, some longer than rows, with a bad record in each."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = np.random.default_rng(0)
    for name in ("a", "b"):
        lines = [json.dumps({"text": f"{name}{n:02}" + "." * int(draw.integers(0, 150))}) for n in range(60)]
        (folder / f"{name}.jsonl").write_text("\n".join([*lines, "{broken"]))
    return folder


def stream_of(corpus, **settings):
    sources = [
        StreamSource(corpus / "a.jsonl", weight=2, tag="<a>", long_tokens=60, long_factor=2),
        StreamSource(corpus / "b.jsonl"),
    ]
    return PackedStream(sources, SEQ_LEN, **{"open_rows": 3, "window_documents": 9, **settings})


def comparable(row):
    return {name: np.asarray(value).tolist() for name, value in row.items()}


def take(rows, count):
    return [comparable(row) for row in islice(rows, count)]  # a zip would draw one row more


def through_a_file(state):
    """As a checkpoint has it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def in_another_order(state):
    """The same state, as a loader may hand it back: torchdata sends what changed as a set of keys."""
    if isinstance(state, dict):
        return {name: in_another_order(state[name]) for name in reversed(state)}
    return [in_another_order(item) for item in state] if isinstance(state, list) else state


PACKINGS = {
    "concat": {},
    "drop": {"packing": "drop"},
    "best_fit": {"packing": "best_fit"},
    "chunks": {"packing": "best_fit", "chunk_tokens": 8},
    "in order": {"shuffle": False},
    "two epochs": {"packing": "best_fit", "epochs": 2},
}


# --- going on -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", PACKINGS.values(), ids=PACKINGS)
def test_a_stream_resumed_behind_any_row_gives_the_next_one(settings, corpus):
    whole = take(stream_of(corpus, **settings), 82)
    for count in range(0, 70, 3):
        first = stream_of(corpus, **settings)
        rows = iter(first)
        assert take(rows, count) == whole[:count]
        second = stream_of(corpus, **settings)
        second.load_state_dict(through_a_file(first.state_dict()))
        assert second.state_dict() == first.state_dict()
        assert take(second, 12) == whole[count : count + 12]


@pytest.mark.parametrize("packing", ["concat", "drop", "best_fit", "chunks"])
def test_the_order_of_keys_in_a_state_changes_no_row_and_no_report(packing, corpus):
    settings = {**PACKINGS[packing], "epochs": 1}
    whole = take(stream_of(corpus, **settings), 10_000)
    for count in range(0, len(whole) + 1, 4):
        first, second = stream_of(corpus, **settings), stream_of(corpus, **settings)
        take(iter(first), count)
        state = in_another_order(first.state_dict())
        assert read_report(state) == first.report()
        second.load_state_dict(state)
        assert take(second, 10_000) == whole[count:]


@hypothesis_settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(["concat", "drop", "best_fit"]),
    st.lists(st.integers(0, 25), min_size=1, max_size=5),
    st.integers(0, 9),
    st.integers(0, 3),
    st.integers(1, 40),
)
def test_a_run_that_is_killed_again_and_again_sees_what_an_undisturbed_one_sees(
    corpus, packing, counts, seed, rank, window_documents
):
    settings = {"seed": seed, "packing": packing, "window_documents": window_documents, "rank": rank, "world_size": 4}
    whole = take(stream_of(corpus, **settings), sum(counts))
    seen, state = [], None
    for count in counts:
        stream = stream_of(corpus, **settings)
        if state is not None:
            stream.load_state_dict(pickle.loads(pickle.dumps(state)))
        rows = iter(stream)
        seen += take(rows, count)
        state = stream.state_dict()
    assert seen == whole


@pytest.mark.parametrize("at", ["front", "end"])
def test_a_stream_resumed_at_its_front_or_its_end_is_whole_or_empty(at, corpus):
    stream = stream_of(corpus, epochs=1)
    whole = take(stream, 10_000) if at == "end" else []
    again = stream_of(corpus, epochs=1)
    again.load_state_dict(stream.state_dict())
    assert take(again, 10_000) == ([] if at == "end" else take(stream_of(corpus, epochs=1), 10_000))
    assert bool(whole) is (at == "end")


def test_iterating_twice_gives_the_same_rows_twice(corpus):
    stream = stream_of(corpus, epochs=1)
    assert take(stream, 10_000) == take(stream, 10_000)


def test_a_resumed_stream_reads_no_file_from_its_front(corpus, monkeypatch):
    stream = stream_of(corpus, shuffle=False)
    take(iter(stream), 70)
    places = []
    read = files_room.LinesPart.read

    def watched(part, begin, end, place):
        places.append(begin if place is None else place)
        return read(part, begin, end, place)

    monkeypatch.setattr(files_room.LinesPart, "read", watched)
    again = stream_of(corpus, shuffle=False)
    again.load_state_dict(stream.state_dict())
    take(iter(again), 1)
    assert len(places) >= 2
    assert min(places) > 300


def test_a_state_holds_no_text_and_stays_small(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": "x" * 2_000}) for _ in range(2_000)))
    stream = PackedStream(tmp_path / "a.jsonl", 1_024)
    take(iter(stream), 700)
    assert len(pickle.dumps(stream.state_dict())) < 3_000 + 4 * 1_024


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ({"seq_len": 65}, r"seq_len=64 where this one has 65"),
        ({"packing": "best_fit"}, r"packing='concat' where this one has 'best_fit'"),
        ({"seed": 1}, r"seed=0 where this one has 1"),
        ({"window_documents": 8}, r"window_documents=4096 where this one has 8"),
        ({"tokenizer": "other"}, r"tokenizer='bytes' where this one has 'other'"),
        ({"source": {"weight": 2}}, r"sources: 0: weight=1\.0 where this one has 2"),
    ],
)
def test_the_state_of_another_stream_is_refused_by_what_differs(other, difference, corpus):
    class Other(documents_room.Tokenizer):
        name, anchor_token_id, vocab_size = "other", 0, 257

        def encode(self, texts):
            return []

    state = PackedStream(corpus / "a.jsonl", 64).state_dict()
    settings = {"seq_len": 64, **other}
    if "tokenizer" in settings:
        settings["tokenizer"] = Other()
    source = StreamSource(corpus / "a.jsonl", **settings.pop("source", {}))
    with pytest.raises(ValueError, match=rf"state must be of the same stream, got {difference}; resume with"):
        PackedStream(source, **settings).load_state_dict(state)


def test_the_state_of_changed_files_of_another_rank_or_of_something_else_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n' * 20)
    state = PackedStream(path, 64).state_dict()
    stream = PackedStream(path, 64, rank=1, world_size=2)
    stream.load_state_dict(state)
    with pytest.raises(ValueError, match=r"got shard=\[0, 1\] where this one has \[1, 2\]"):
        iter(stream)
    path.write_text('{"text": "one"}\n' * 21)
    with pytest.raises(ValueError, match=r"sources: 0: files='1 \(\w+\)' where this one has '1 \(\w+\)'"):
        PackedStream(path, 64).load_state_dict(state)
    with pytest.raises(ValueError, match=r"state must be of a PackedStream in the format .* got None; give a loader's"):
        PackedStream(path, 64).load_state_dict({"model": 1})


def write_documents(path, texts):
    """Files of rows with these texts; a text file has the first."""
    if path.suffix == ".parquet":
        Dataset.from_dict({"text": texts}).to_parquet(path)
    elif path.suffix == ".txt":
        path.write_text(texts[0])
    else:
        data = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "parquet", "txt"])
def test_files_that_were_changed_are_refused_at_the_same_size_and_a_copy_is_not(suffix, tmp_path):
    before, after = (tmp_path / name / f"a.{suffix}" for name in ("before", "after"))
    for path, text in ((before, "three"), (after, "eight")):
        path.parent.mkdir()
        write_documents(path, [text, "two", "one"])
    state = PackedStream(before.parent, 64).state_dict()
    if suffix in ("jsonl", "txt"):
        assert before.stat().st_size == after.stat().st_size
    with pytest.raises(ValueError, match=r"got sources: 0: files='1 \(\w+\)' where this one has '1 \(\w+\)'; resume"):
        PackedStream(after.parent, 64).load_state_dict(state)
    shutil.copy(before, after)
    os.utime(after, (0, 0))
    PackedStream(after.parent, 64).load_state_dict(state)


def test_documents_in_memory_that_were_changed_are_refused():
    one, other = (Dataset.from_dict({"text": [*"abcdefg", text]}) for text in ("h", "i"))
    state = PackedStream(one, 64).state_dict()
    PackedStream(Dataset.from_dict({"text": [*"abcdefgh"]}), 64).load_state_dict(state)
    with pytest.raises(ValueError, match=r"got sources: 0: files="):
        PackedStream(other, 64).load_state_dict(state)


@pytest.mark.parametrize("place", [0, 0.5, 1], ids=["front", "middle", "end"])
def test_of_a_large_file_the_front_the_end_and_stretches_between_are_seen(place, tmp_path):
    """Eight stretches of 8 KiB: of a file of twice as much every other one."""
    path = tmp_path / "a.jsonl"
    content = bytearray(b"x" * (2 * files_room.SAMPLES * files_room.SAMPLE_BYTES))
    path.write_bytes(content)
    meta = PackedStream(path, 64).settings
    begin = min(int(place * len(content)), len(content) - 1)
    end = min(begin + files_room.SAMPLE_BYTES + 2, len(content))
    content[begin:end] = b"y" * (end - begin)
    path.write_bytes(content)
    assert PackedStream(path, 64).settings != meta


def test_a_file_is_sampled_at_any_size_and_before_there_are_workers(tmp_path):
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.truncate(2**40)  # a hole: 1 TiB that takes no room
    stream = PackedStream(path, 64)
    create_loader(stream, 1, PackedCollator(seq_len=64), num_workers=2)
    assert "settings" in vars(stream)
    assert len(files_room.sample_file(path)) < 2**17


# --- DataLoader -----------------------------------------------------------------------------------------------------


def loader_of(corpus, num_workers, **settings):
    return create_loader(stream_of(corpus, **settings), 2, PackedCollator(seq_len=SEQ_LEN), num_workers=num_workers)


def plain_rows(stream, num_workers):
    """Every row of a finite stream, as the workers give it."""
    loader = create_loader(stream, 1, PackedCollator(seq_len=stream.seq_len), num_workers=num_workers)
    for batch in loader:
        (lengths,) = batch["document_ids"].document_lengths
        yield [bytes(own.tolist()).decode() for own in batch["input_ids"][0, 1 : 1 + sum(lengths)].split(list(lengths))]


def batches(loader, count):
    return [
        {
            name: (value.document_ids if isinstance(value, PackedLayout) else value).tolist()
            for name, value in batch.items()
        }
        for batch in islice(loader, count)
    ]


@forks
@pytest.mark.parametrize(("num_workers", "packing"), [(0, "best_fit"), (1, "concat"), (2, "best_fit"), (2, "chunks")])
def test_a_loader_resumed_behind_any_batch_gives_the_next_one(num_workers, packing, corpus):
    whole = batches(loader_of(corpus, num_workers, **PACKINGS[packing]), 24)
    for count in (1, int(np.random.default_rng(num_workers).integers(2, 14))):
        first = loader_of(corpus, num_workers, **PACKINGS[packing])
        assert batches(first, count) == whole[:count]
        second = loader_of(corpus, num_workers, **PACKINGS[packing])
        second.load_state_dict(through_a_file(first.state_dict()))
        assert batches(second, 10) == whole[count : count + 10]


@forks
@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("chunk_tokens", [None, 8], ids=["whole", "chunks"])
@pytest.mark.parametrize("packing", ["best_fit", "concat"])
def test_a_finite_loader_resumed_behind_any_batch_gives_the_others(packing, chunk_tokens, num_workers, tmp_path):
    """Rows that are open at the end are closed, in the order of the first run."""
    draw = np.random.default_rng(5)
    texts = [f"{number:02}" + "." * int(draw.integers(0, 60)) for number in range(30)]
    write_documents(tmp_path / "a.jsonl", texts)

    def loader():
        settings = {"packing": packing, "chunk_tokens": chunk_tokens, "epochs": 1, "window_documents": 9}
        stream = PackedStream(tmp_path / "a.jsonl", SEQ_LEN, **settings)
        return create_loader(stream, 2, PackedCollator(seq_len=SEQ_LEN), num_workers=num_workers)

    whole = batches(loader(), 100)
    assert len(whole) > 5
    for count in range(len(whole) + 1):
        first, second = loader(), loader()
        assert batches(first, count) == whole[:count]
        second.load_state_dict(through_a_file(first.state_dict()))
        assert batches(second, 100) == whole[count:]


@forks
@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (1, 2), (2, 0), (2, 2), (4, 1), (4, 0)])
def test_ranks_and_workers_together_see_every_document_once(world_size, num_workers, corpus):
    seen = []
    for rank in range(world_size):
        stream = PackedStream(corpus, SEQ_LEN, epochs=1, packing="best_fit", rank=rank, world_size=world_size)
        seen += [text for row in plain_rows(stream, num_workers) for text in row]
    names = [text[:3] for text in seen if not text.startswith(".")]  # the rest of a long document is dots
    assert sorted(names) == sorted(f"{name}{number:02}" for name in "ab" for number in range(60))


@forks
def test_a_hub_dataset_is_not_shared_out_twice_between_workers(monkeypatch):
    import datasets

    shards = datasets.Dataset.from_dict({"text": [f"{n:03}" for n in range(100)]}).to_iterable_dataset(num_shards=1)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: shards)
    stream = PackedStream("owner/name", 4, epochs=1)
    seen = [text for row in plain_rows(stream, 2) for text in row]
    assert sorted(seen) == [f"{number:03}" for number in range(100)]


@forks
def test_a_bad_source_ends_a_worker_with_our_message(tmp_path):
    (tmp_path / "a.jsonl").write_text("{broken\n" * 3)
    stream = PackedStream(StreamSource(tmp_path / "a.jsonl", bad_records=2), 64)
    with pytest.raises(ValueError, match=r"sources\[0\] must hold at most bad_records=2 bad records a worker, got 3"):
        next(plain_rows(stream, 1))


def test_a_collator_of_another_shape_is_refused(corpus):
    with pytest.raises(ValueError, match=r"collator must have the stream's seq_len=64, got None; pass PackedCollator"):
        create_loader(stream_of(corpus), 2, PackedCollator())
    with pytest.raises(ValueError, match=r"collator must have the stream's anchor_tokens=1, got 2"):
        create_loader(stream_of(corpus), 2, PackedCollator(seq_len=SEQ_LEN, anchor_tokens=2))


# --- ranks ----------------------------------------------------------------------------------------------------------


def test_rank_and_world_size_are_those_of_torchrun(corpus, monkeypatch):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "5")
    assert take(stream_of(corpus), 9) == take(stream_of(corpus, rank=2, world_size=5), 9)
    assert take(stream_of(corpus), 9) != take(stream_of(corpus, rank=1, world_size=5), 9)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({"rank": 2, "world_size": 2}, r"rank must be from 0 to world_size - 1, got 2 of 2"),
        ({"rank": 1}, r"rank and world_size must be given together, got 1 and None"),
    ],
)
def test_ranks_that_cannot_be_are_refused(ranks, message, corpus):
    with pytest.raises(ValueError, match=message):
        stream_of(corpus, **ranks)


# --- mixture --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (0.9, 0.1), (1, 7)])
def test_every_source_has_its_share_of_the_tokens_to_within_a_document(weights, tmp_path):
    for name, size in (("short", 20), ("long", 400)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": "x" * size}) for _ in range(50)))
    paths = [tmp_path / "short.jsonl", tmp_path / "long.jsonl"]
    sources = [StreamSource(path, weight=weight) for path, weight in zip(paths, weights, strict=True)]
    stream = PackedStream(sources, 128)
    for _, _row in zip(range(500), stream, strict=False):
        short, long = stream.report().sources
        ahead = short.tokens / weights[0] - long.tokens / weights[1]
        assert -400 / weights[1] <= ahead <= 20 / weights[0] + 1e-6
    assert short.epochs > 1


def test_upsampling_by_length_keeps_the_shares_of_the_sources(corpus):
    sources = [StreamSource(corpus / "a.jsonl", long_tokens=60, long_factor=5), StreamSource(corpus / "b.jsonl")]
    stream = PackedStream(sources, SEQ_LEN)
    take(iter(stream), 600)
    a, b = stream.report().sources
    assert a.share == pytest.approx(0.5, abs=0.01)
    assert a.thinned_documents > 0 == b.thinned_documents
    assert a.tokens / a.documents > 1.2 * b.tokens / b.documents


def test_when_a_source_is_over_the_others_go_on(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "aaaa"}\n' * 3)
    (tmp_path / "b.jsonl").write_text('{"text": "bbbb"}\n' * 30)
    stream = PackedStream([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], 9, epochs=1)
    assert len(take(stream, 1_000)) == 17
    assert [source.documents for source in stream.report().sources] == [3, 30]


# --- rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("packing", "cut"), [("concat", "continue"), ("drop", "drop")])
def test_a_stream_in_order_gives_the_rows_of_pack_documents(packing, cut, corpus):
    texts = [json.loads(line)["text"] for line in (corpus / "a.jsonl").read_text().splitlines()[:-1]]
    expected = [comparable(row) for row in pack_documents(texts, SEQ_LEN, cut=cut)]
    assert take(PackedStream(corpus / "a.jsonl", SEQ_LEN, packing=packing, shuffle=False, epochs=1), 999) == expected


def test_neither_a_tag_nor_the_first_own_token_behind_it_is_labelled(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "hello"}\n')
    stream = PackedStream(StreamSource(tmp_path / "a.jsonl", tag="<web>"), 16, epochs=1)
    batch = PackedCollator(seq_len=16)(list(stream))
    assert bytes(batch["input_ids"][0, 1:11].tolist()) == b"<web>hello"
    assert batch["document_ids"].document_ids.tolist() == [[0] + [1] * 10 + [-1] * 5]
    assert batch["labels"].tolist() == [[-100] * 7 + list(b"ello") + [-100] * 5]


def test_the_labelled_tokens_are_the_same_with_a_tag_and_without(corpus):
    def labelled(tag):
        source = StreamSource(corpus / "a.jsonl", tag=tag)
        stream = PackedStream(source, 1_024, epochs=1, packing="best_fit")
        labels = PackedCollator(seq_len=1_024)(list(stream))["labels"]
        return sorted(labels[labels != -100].tolist())

    assert labelled("<a>") == labelled(None)


def test_a_tag_that_a_row_cuts_stays_unlabelled_on_both_sides(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "hello"}\n')
    stream = PackedStream(StreamSource(tmp_path / "a.jsonl", tag="<web>"), 4, epochs=1)
    rows = [(bytes(row["input_ids"][1:].tolist()), row["labels"].tolist()) for row in stream]
    assert rows == [
        (b"<we", [-100] * 4),
        (b"b>h", [-100] * 4),
        (b"ell", [-100, *b"ell"]),
        (b"o", [-100, *b"o"]),
    ]


def test_interleaved_rows_hold_the_documents_of_plain_ones_in_pieces(corpus):
    settings = {"packing": "best_fit", "epochs": 1}
    pieces = 0
    for plain, mixed in zip(stream_of(corpus, **settings), stream_of(corpus, chunk_tokens=8, **settings), strict=True):
        layout = PackedLayout.from_document_ids(torch.tensor(mixed["document_ids"])[None])
        pieces += len(layout.runs[0]) > len(plain["document_lengths"])
        bounds = np.cumsum([1, *plain["document_lengths"]])
        for name in ("input_ids", "labels"):
            own = [plain[name][begin:end].tolist() for begin, end in pairwise(bounds)]
            found = [mixed[name][mixed["document_ids"] == id_].tolist() for id_ in range(1, len(own) + 1)]
            assert sorted(found) == sorted(own)
    assert pieces > 10


@pytest.mark.parametrize("anchor_tokens", [0, 1, 3])
def test_rows_have_their_anchors_and_fit(anchor_tokens, corpus):
    for row in stream_of(corpus, anchor_tokens=anchor_tokens, packing="best_fit", epochs=1):
        assert row["input_ids"][:anchor_tokens].tolist() == [256] * anchor_tokens
        assert 256 not in row["input_ids"][anchor_tokens:]
        assert len(row["input_ids"]) == anchor_tokens + sum(row["document_lengths"]) <= SEQ_LEN


# --- report ---------------------------------------------------------------------------------------------------------


@forks
@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_report_of_a_loader_sums_its_workers(num_workers, corpus):
    loader = loader_of(corpus, num_workers, packing="best_fit", epochs=1)
    given_tokens = sum(sum(map(sum, batch["document_ids"].document_lengths)) for batch in loader)
    report = read_report(loader.state_dict())
    assert report.packed_tokens == given_tokens
    assert report.open_tokens == report.dropped_tokens == 0
    assert 0 < report.padding_share < 0.5
    assert [source.records for source in report.sources] == [61, 61]
    assert [source.bad_records for source in report.sources] == [{"not JSON": 1}] * 2
    assert [source.first_bad for source in report.sources] == [("a.jsonl:61: not JSON",), ("b.jsonl:61: not JSON",)]
    assert report.meta == {**json.loads(json.dumps(report.meta)), "sources": report.meta["sources"]}


def test_a_report_says_in_a_few_lines_where_the_tokens_went(corpus):
    stream = stream_of(corpus, epochs=1)
    take(stream, 10_000)
    report = stream.report()
    text = str(report)
    assert f"{report.documents:,} documents -> {report.rows:,} rows of 64" in text
    assert "1 of 61 records bad (1 × not JSON)" in text
    assert report.sources[0].thinned_documents > 0
    open_report = stream_of(corpus)
    take(iter(open_report), 7)
    open_report = open_report.report()
    tag_tokens = 3 * open_report.sources[0].documents
    drawn = sum(source.tokens for source in open_report.sources) + tag_tokens
    assert drawn == open_report.packed_tokens + open_report.open_tokens


def test_a_state_without_a_stream_has_no_report():
    with pytest.raises(ValueError, match=r"state must hold that of a PackedStream, got the keys \['model'\]"):
        read_report({"model": 1})


# --- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the resident size from /proc")
@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_memory_stays_flat_over_a_million_documents(packing, tmp_path, monkeypatch):
    monkeypatch.setattr(files_room, "BLOCK_BYTES", 256 * 1024)
    monkeypatch.setattr(documents_room, "ENCODED_TOGETHER", 256)
    with (tmp_path / "a.jsonl").open("w") as file:
        for number in range(1_000_000):
            file.write(json.dumps({"text": f"{number} {'x' * (number * 7919 % 90)}"}) + "\n")
    stream = PackedStream(tmp_path / "a.jsonl", 2_048, packing=packing, epochs=1)
    resident, documents = [], 0
    for number, row in enumerate(stream):
        documents += len(row["document_lengths"])
        if number % 2_000 == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            resident.append(pages * resource.getpagesize())
    report = stream.report()
    assert report.sources[0].documents == 1_000_000
    assert documents == 1_000_000 + (report.cut_documents if packing == "concat" else 0)
    settled = resident[len(resident) // 10 :]
    print(f"\n{packing}: {settled[0] / 2**20:.1f} MiB behind a tenth, {max(settled) / 2**20:.1f} MiB at most")
    assert max(settled) - settled[0] < 16 * 2**20


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"packing": "bfd"}, r"packing must be one of \('concat', 'drop', 'best_fit'\), got 'bfd'"),
        ({"open_rows": 0}, r"open_rows must be at least 1, got 0"),
        ({"chunk_tokens": 0}, r"chunk_tokens must be at least 1, got 0"),
        ({"epochs": 0}, r"epochs must be at least 1, got 0"),
        ({"seed": -1}, r"seed must be at least 0, got -1"),
        ({"anchor_tokens": 64}, r"seq_len must be at least 65 \(anchor_tokens=64 and one token\), got 64"),
    ],
)
def test_settings_out_of_their_range_are_refused(settings, message, corpus):
    with pytest.raises(ValueError, match=message):
        stream_of(corpus, **settings)
