"""The collator: inputs, labels, positions and layout of packed rows."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import quick

from anchor_attn.masks import PackedLayout
from anchor_attn.train import PackedCollator, pack_documents

ANCHOR, BOS, PAD = 256, 300, 301

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=6)
ROWS = st.lists(LENGTHS, min_size=1, max_size=3)


def features_of(rows, anchor_tokens):
    """Rows of documents of these lengths; tokens count on from 1 and never meet the special ones."""
    features, token = [], 0
    for lengths in rows:
        tokens = [(token + place) % 250 + 1 for place in range(sum(lengths))]
        token += len(tokens)
        features.append({"input_ids": np.array([ANCHOR] * anchor_tokens + tokens), "document_lengths": lengths})
    return features


def label_slowly(tokens, ids):
    """Labels by the definition, a token at a time."""
    labels = []
    for place, (token, document_id) in enumerate(zip(tokens, ids, strict=True)):
        predicted_by_its_own = place > 0 and ids[place - 1] == document_id
        labels.append(token if document_id > 0 and predicted_by_its_own else -100)
    return labels


@quick
@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(1, 12), st.integers(0, 2))
def test_documents_come_back_from_rows_collator_and_layout(lengths, room, anchor_tokens):
    documents = [[place % 256 for place in range(number, number + length)] for number, length in enumerate(lengths)]
    rows = pack_documents(documents, room + anchor_tokens, anchor_tokens=anchor_tokens)
    batch = PackedCollator(anchor_tokens=anchor_tokens, seq_len=rows.seq_len, pad_token_id=PAD)(list(rows))
    layout = batch["document_ids"]
    assert batch["input_ids"].shape == (len(rows), rows.seq_len)
    assert [list(row) for row in layout.document_lengths] == rows.document_lengths
    assert batch["input_ids"][layout.document_ids > 0].tolist() == [
        token for document in documents for token in document
    ]
    assert (batch["input_ids"][layout.document_ids == 0] == ANCHOR).all()
    assert (batch["input_ids"][layout.document_ids == -1] == PAD).all()


@quick
@given(ROWS, st.integers(0, 2))
@example([[2, 3]], 1)
def test_labels_leave_out_anchors_padding_and_first_tokens(rows, anchor_tokens):
    features = features_of(rows, anchor_tokens)
    batch = PackedCollator(anchor_tokens=anchor_tokens)(features)
    for feature, lengths, labels in zip(features, rows, batch["labels"].tolist(), strict=True):
        documents = np.split(feature["input_ids"][anchor_tokens:], np.cumsum(lengths)[:-1])
        expected = [-100] * anchor_tokens
        for document in documents:
            expected += [-100, *document[1:]]
        assert labels == expected + [-100] * (len(labels) - len(expected))


@quick
@given(ROWS, st.integers(0, 2), st.sampled_from(["continuous", "reset"]), st.integers(0, 3))
def test_a_bos_changes_neither_the_labelled_tokens_nor_the_others(rows, anchor_tokens, policy, extra):
    features = features_of(rows, anchor_tokens)
    seq_len = max(len(feature["input_ids"]) for feature in features) + extra
    options = {"anchor_tokens": anchor_tokens, "seq_len": seq_len, "pad_token_id": PAD}
    plain = PackedCollator(policy, **options)(features)
    batch = PackedCollator(policy, bos_token_id=BOS, **options)(features)

    longest = max(len(f["input_ids"]) + len(f["document_lengths"]) for f in features)
    assert batch["input_ids"].shape == (len(rows), max(seq_len, longest))
    expected = PackedLayout.from_lengths(
        [[length + 1 for length in row] for row in rows], anchor_tokens, batch["input_ids"].shape[1]
    )
    assert batch["document_ids"] == expected
    assert torch.equal(batch["document_ids"].document_ids, expected.document_ids)
    assert torch.equal(batch["position_ids"], expected.position_ids(policy))

    is_bos = batch["input_ids"] == BOS
    first = torch.from_numpy(np.array([[rank == 0 for rank in row] for row in expected.document_ranks()]))
    assert torch.equal(is_bos, first & (expected.document_ids > 0))
    for row in range(len(rows)):
        for key, padding in (("input_ids", PAD), ("labels", -100)):
            assert batch[key][row][expected.document_ids[row].ge(0) & ~is_bos[row]].tolist() == (
                plain[key][row][plain["document_ids"].document_ids[row] >= 0].tolist()
            )
            assert (batch[key][row][expected.document_ids[row] == -1] == padding).all()
    assert (batch["labels"][is_bos] == -100).all()
    assert batch["labels"][batch["labels"] != -100].tolist() == plain["labels"][plain["labels"] != -100].tolist()


@st.composite
def interleaved_ids(draw):
    """Ids of one row with documents in several pieces, its anchor in front."""
    labels = draw(st.lists(st.integers(5, 8), min_size=1, max_size=20))
    return PackedLayout.from_any_ids(torch.tensor([[0, *labels]])).document_ids[0].tolist()


@quick
@given(st.lists(interleaved_ids(), min_size=1, max_size=3))
@example([[0, 1, 1, 2, 1, 1, 2]])
def test_interleaved_rows_label_what_their_own_document_predicts(rows):
    features = [{"input_ids": list(range(10, 10 + len(row))), "document_ids": row} for row in rows]
    plain = PackedCollator("reset")(features)
    for feature, labels in zip(features, plain["labels"].tolist(), strict=True):
        length = len(feature["input_ids"])
        assert labels[:length] == label_slowly(feature["input_ids"], feature["document_ids"])
        assert set(labels[length:]) <= {-100}

    batch = PackedCollator("reset", bos_token_id=BOS)(features)
    layout = batch["document_ids"]
    assert (batch["input_ids"] == BOS).sum() == layout.num_documents
    for row in range(len(rows)):
        own = (batch["input_ids"][row] != BOS) & (layout.document_ids[row] >= 0)
        assert layout.document_ids[row][own].tolist() == rows[row]
        assert batch["input_ids"][row][own].tolist() == features[row]["input_ids"]
    assert batch["labels"][batch["labels"] != -100].tolist() == plain["labels"][plain["labels"] != -100].tolist()


def test_the_picture_of_the_docstring():
    def drawn(values, letters):
        return " ".join("." if value == -100 else letters.get(value, "0") for value in values)

    letters = {1: "a", 2: "b", BOS: "B", ANCHOR: "0"}
    feature = {"input_ids": [ANCHOR, 1, 1, 2, 2, 2], "document_lengths": [2, 3]}
    lines = []
    for bos in (None, BOS):
        batch = PackedCollator(bos_token_id=bos)([feature])
        lines += [drawn(batch[key][0].tolist(), letters) for key in ("input_ids", "labels")]
    for line in lines:
        assert line in PackedCollator.__doc__
    assert lines == ["0 a a b b b", ". . a . b b", "0 B a a B b b b", ". . . a . . b b"]


def test_positions_follow_the_policy():
    features = features_of([[3, 2], [4]], 1)
    continuous, reset = (
        PackedCollator(policy)(features)["position_ids"].tolist() for policy in ("continuous", "reset")
    )
    assert continuous == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 0]]
    assert reset == [[0, 1, 2, 3, 1, 2], [0, 1, 2, 3, 4, 0]]


def test_a_batch_is_of_int64_and_a_layout():
    batch = PackedCollator(seq_len=9)(features_of([[3, 2]], 1))
    assert list(batch) == ["input_ids", "labels", "position_ids", "document_ids"]
    for key in ("input_ids", "labels", "position_ids"):
        assert (batch[key].dtype, batch[key].shape) == (torch.int64, (1, 9))
    assert isinstance(batch["document_ids"], PackedLayout)


def test_a_data_loader_takes_rows_and_collator():
    rows = pack_documents(["some text", "more text"], 8)
    loader = torch.utils.data.DataLoader(rows, batch_size=2, collate_fn=PackedCollator(seq_len=8))
    assert [tuple(batch["input_ids"].shape) for batch in loader] == [(2, 8), (1, 8)]


def test_a_collator_survives_a_pickle():
    collator = PackedCollator("reset", seq_len=4)
    assert pickle.loads(pickle.dumps(collator)) == collator


GOOD = {"input_ids": [9, 1, 2, 3], "document_lengths": [1, 2]}


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ([], "features must hold at least one row, got none"),
        ([GOOD, {"input_ids": [9, 1]}], r"features\[1\] must have 'input_ids' and .* got \['input_ids'\]; pack with"),
        ([{"document_lengths": [1]}], r"features\[0\] must have 'input_ids' and"),
        ([GOOD, {**GOOD, "document_lengths": [1, 1]}], r"features\[1\]\['document_lengths'\] must add .* got 2 for 4"),
        ([GOOD, {"input_ids": [9] * 6, "document_lengths": [5]}], r"features\[1\] must fit seq_len=5, got a row of 6"),
        ([{**GOOD, "document_lengths": [0, 3]}], r"lengths\[0\] must hold counts of at least 1, got 0"),
        (
            [{**GOOD, "input_ids": [9.0, 1.0]}],
            r"features\[0\]\['input_ids'\] must be a flat row of integers, got float64",
        ),
        ([{**GOOD, "input_ids": [[9, 1, 2, 3]]}], r"flat row of integers, got int64 \[1, 4\]"),
        ([{"input_ids": [9, 1], "document_ids": [0, 1, 1]}], r"one id a token, got 3 for 2 tokens"),
        ([{"input_ids": [9, 1], "document_ids": [0, 2]}], r"document_ids must number documents 1, 2, 3"),
        ([{"input_ids": [9, 1], "document_ids": [1, 1]}], r"must have 1 anchor tokens \(0\) at the front .* got 0"),
        ([{"input_ids": [9, 1], "document_ids": [0, 1]}, GOOD], r"features\[1\] must describe its documents as the"),
    ],
)
def test_bad_rows_raise_one_line_that_names_them(features, message):
    with pytest.raises(ValueError, match=message) as bad:
        PackedCollator(seq_len=5)(features)
    assert "\n" not in str(bad.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"position_policy": "restart"}, r"position_policy must be one of \('continuous', 'reset'\), got 'restart'"),
        ({"anchor_tokens": -1}, "anchor_tokens must be at least 0, got -1"),
        ({"seq_len": 1}, "seq_len must be above anchor_tokens=1, got 1"),
    ],
)
def test_bad_options_raise_before_the_first_batch(options, message):
    with pytest.raises(ValueError, match=message):
        PackedCollator(**options)


def test_labels_of_the_rows_themselves_are_kept_where_a_token_may_be_predicted():
    feature = {"input_ids": [0, 1, 2, 3, 4], "document_lengths": [4], "labels": [-100, -100, -100, 3, 4]}
    assert PackedCollator()([feature])["labels"].tolist() == [[-100, -100, -100, 3, 4]]
    with pytest.raises(ValueError, match=r"features\[0\]\['labels'\] must have one label a token"):
        PackedCollator()([{**feature, "labels": [1]}])


def test_two_answers_to_which_token_belongs_where_are_refused():
    feature = {"input_ids": [0, 1, 2, 3, 4], "document_lengths": [4], "document_ids": [0, 1, 1, 2, 2]}
    with pytest.raises(ValueError, match=r"features\[0\] must say once which token belongs to which document"):
        PackedCollator()([feature])
