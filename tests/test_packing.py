"""Packing: rows hold the documents' tokens in order, and the report accounts for every one of them."""

import pickle
from dataclasses import asdict

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import quick

from anchor_attn.masks import PackedLayout
from anchor_attn.train import ByteTokenizer, load_tokenizer, pack_documents, read_documents

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
        ({"documents": [[5], np.array([2**64 - 1], dtype=np.uint64)]}, "in 'document 2'"),
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


# Tokenizers


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
