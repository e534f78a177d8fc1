"""An anchor in front of packed rows: every token keeps its document, and the end of the row is explicit."""

from functools import partial

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from strategies import layouts, quick

from anchor_attn.masks import PackedLayout
from anchor_attn.masks.dialects import from_position_ids, from_seq_idx
from anchor_attn.train import PackedCollator, insert_anchor

ROW = {"input_ids": [7, 8, 9, 4, 5]}
DOCUMENTS = {
    "seq_lengths": [3, 2],
    "document_lengths": [3, 2],
    "document_ids": [1, 1, 1, 2, 2],
    "position_ids": [0, 1, 2, 0, 1],
}


def lists(row):
    return {name: values.tolist() for name, values in row.items()}


@pytest.mark.parametrize("column", DOCUMENTS)
def test_every_column_that_says_where_documents_are_is_read(column):
    row = ROW | {column: DOCUMENTS[column]}
    assert lists(insert_anchor(row, 256, last_token="drop")) == {
        "input_ids": [256, 7, 8, 9, 4],
        "document_ids": [0, 1, 1, 1, 2],
    }
    assert lists(insert_anchor(row, 256, last_token="keep")) == {
        "input_ids": [256, 7, 8, 9, 4, 5],
        "document_ids": [0, 1, 1, 1, 2, 2],
    }


@pytest.mark.parametrize(
    "layout",
    [
        from_seq_idx(torch.tensor([[0, 0, 0, 1, 1]])),
        from_position_ids(torch.tensor([[0, 1, 2, 0, 1]]), "reset_to_zero", 0),
    ],
    ids=["seq_idx", "position_ids"],
)
def test_any_convention_is_read_through_its_layout(layout):
    given_row = insert_anchor(ROW, 256, last_token="drop", layout=layout)
    assert lists(given_row)["document_ids"] == [0, 1, 1, 1, 2]


@quick
@given(layouts(anchor_tokens=st.just(0), max_rows=1), st.integers(1, 3), st.sampled_from(["drop", "keep"]))
def test_tokens_keep_their_documents_and_padding_gives_way_first(layout, anchor_tokens, last_token):
    (own_tokens,), seq_len = layout.row_tokens, layout.seq_len
    tokens = np.arange(100, 100 + seq_len)
    insert = partial(
        insert_anchor, anchor_token_id=1, anchor_tokens=anchor_tokens, last_token=last_token, layout=layout
    )
    fits = own_tokens and (last_token == "keep" or seq_len > anchor_tokens)
    if not fits:
        with pytest.raises(ValueError, match="row must have room for"):
            insert({"input_ids": tokens})
        return
    row = insert({"input_ids": tokens, "labels": tokens})
    kept = own_tokens if last_token == "keep" else min(own_tokens, seq_len - anchor_tokens)
    length = seq_len if last_token == "drop" else max(seq_len, own_tokens + anchor_tokens)
    own = slice(anchor_tokens, anchor_tokens + kept)
    assert {len(values) for values in row.values()} == {length}
    assert row["input_ids"][own].tolist() == row["labels"][own].tolist() == tokens[:kept].tolist()
    assert row["document_ids"][own].tolist() == layout.document_ids[0, :kept].tolist()
    assert (row["input_ids"][:anchor_tokens] == 1).all()
    assert (row["labels"][:anchor_tokens] == -100).all()
    assert (row["labels"][own.stop :] == -100).all()
    PackedLayout.from_document_ids(torch.tensor(row["document_ids"])[None])


def test_a_whole_dataset_is_mapped_and_collated():
    packed = Dataset.from_dict({"input_ids": [[1, 2, 3, 4], [5, 6, 7, 8]], "seq_lengths": [[3, 1], [4]]})
    rows = packed.map(
        partial(insert_anchor, anchor_token_id=256, last_token="drop"), remove_columns=packed.column_names
    )
    batch = PackedCollator()(list(rows))
    assert batch["input_ids"].tolist() == [[256, 1, 2, 3], [256, 5, 6, 7]]
    assert batch["labels"].tolist() == [[-100, -100, 2, 3], [-100, -100, 6, 7]]


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        (ROW, {}, r"row must say where its documents are, in one of document_ids, .* got the columns \['input_ids'\]"),
        (ROW | {"document_ids": [0, 1, 1, 2, 2]}, {}, r"row must have no anchor yet, got 1 in front of it"),
        (ROW | {"seq_lengths": [3, 1]}, {}, r"seq_lengths must add up to the input_ids in every row"),
        (ROW | {"seq_lengths": [3, 2], "document_ids": [1, 1, 2, 2, 2]}, {}, "must describe the same documents"),
        (ROW | {"position_ids": [0, 1, 2, 3, 4]}, {}, "position_ids must begin again with every document"),
        (ROW | {"seq_lengths": [3, 2], "labels": [1]}, {}, r"labels must have one entry a token, got \(1,\) for 5"),
        (ROW | {"seq_lengths": [3, 2]}, {"anchor_tokens": 5}, r"row must have room for 5 anchor tokens and one"),
        (ROW | {"seq_lengths": [3, 2]}, {"anchor_tokens": 0}, r"anchor_tokens must be at least 1, got 0"),
        (ROW | {"seq_lengths": [3, 2]}, {"last_token": "cut"}, r"last_token must be one of \('drop', 'keep'\)"),
        (
            ROW,
            {"layout": PackedLayout.from_lengths([[3]], 0)},
            r"layout must describe this row, \[1, 5\], got \[1, 3\]",
        ),
    ],
)
def test_rows_that_cannot_take_an_anchor_are_refused(row, settings, message):
    with pytest.raises(ValueError, match=message):
        insert_anchor(row, 256, **{"last_token": "drop", **settings})
