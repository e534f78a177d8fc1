"""PackedLayout: constructors against each other, positions against a loop, and every bad value's one line."""

import copy
import pickle
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import anchor_counts, contiguous_layouts, document_lengths, id_rows, interleaved_layouts, layouts, quick

from anchor_attn.masks import PackedLayout, Run


def ids_of(layout):
    return layout.document_ids.tolist()


# --- constructors ----------------------------------------------------------------------------------------------------


@quick
@given(document_lengths(), anchor_counts, st.integers(0, 4))
def test_lengths_to_ids_to_lengths_is_the_identity(lengths, anchor_tokens, padding):
    seq_len = max(1, anchor_tokens + max(map(sum, lengths))) + padding
    laid = PackedLayout.from_lengths(lengths, anchor_tokens=anchor_tokens, seq_len=seq_len)
    read = PackedLayout.from_document_ids(laid.document_ids)

    # A row of padding alone says nothing of its anchors, but only when there are none to say.
    assert read == laid
    assert read.runs == laid.runs
    assert [list(row) for row in read.document_lengths] == lengths
    assert read.anchor_tokens == anchor_tokens
    assert read.seq_len == seq_len
    assert read.num_documents == sum(map(len, lengths))
    assert read.row_tokens == tuple(anchor_tokens + sum(row) for row in lengths)


@quick
@given(document_lengths(), anchor_counts)
def test_lengths_become_anchors_then_documents_in_order_then_padding(lengths, anchor_tokens):
    seq_len = max(1, anchor_tokens + max(map(sum, lengths)))
    layout = PackedLayout.from_lengths(lengths, anchor_tokens=anchor_tokens, seq_len=seq_len)

    rows = [
        [0] * anchor_tokens + [number for number, length in enumerate(row, start=1) for _ in range(length)]
        for row in lengths
    ]
    assert ids_of(layout) == [row + [-1] * (seq_len - len(row)) for row in rows]
    assert layout.document_ids.dtype == torch.int32
    assert (layout.batch_size, layout.seq_len) == (len(lengths), seq_len)


def test_rows_are_padded_to_the_longest_when_no_seq_len_is_given():
    layout = PackedLayout.from_lengths([[3, 2], [4]])

    assert ids_of(layout) == [[0, 1, 1, 1, 2, 2], [0, 1, 1, 1, 1, -1]]
    assert layout.document_lengths == ((3, 2), (4,))


@quick
@given(id_rows() | id_rows(interleaved=True))
def test_ids_in_the_convention_are_read_as_they_are(rows):
    layout = PackedLayout.from_document_ids(torch.tensor(rows))

    assert ids_of(layout) == rows
    assert [sum(id_ != -1 for id_ in row) for row in rows] == list(layout.row_tokens)
    assert [[row.count(number) for number in range(1, max(row) + 1)] for row in rows] == [
        list(lengths) for lengths in layout.document_lengths
    ]


@quick
@given(layouts(), st.data())
def test_any_relabelling_of_documents_gives_the_equal_layout(layout, data):
    labels = st.integers(-(2**40), 2**40).filter(lambda label: label != -1)
    rows = []
    for row in ids_of(layout):
        new = data.draw(st.lists(labels, min_size=max(row) + 1, max_size=max(row) + 1, unique=True))
        rows.append([-1 if id_ == -1 else new[id_] for id_ in row])

    assert PackedLayout.from_any_ids(torch.tensor(rows), layout.anchor_tokens) == layout
    assert ids_of(PackedLayout.from_any_ids(torch.tensor(rows), layout.anchor_tokens)) == ids_of(layout)


def test_the_first_slots_are_the_anchor_whatever_their_label():
    layout = PackedLayout.from_any_ids(torch.tensor([[9, 7, 7, 4, -1], [4, 4, 0, 0, 4]]), anchor_tokens=1)

    assert ids_of(layout) == [[0, 1, 1, 2, -1], [0, 1, 2, 2, 1]]


@pytest.mark.parametrize("anchor_tokens", [0, 1, 2])
def test_a_row_of_anchors_alone_is_a_layout_without_documents(anchor_tokens):
    layout = PackedLayout.from_any_ids(torch.full((2, 3), -1), anchor_tokens)

    assert ids_of(layout) == [[0] * anchor_tokens + [-1] * (3 - anchor_tokens)] * 2
    assert layout.num_documents == 0
    assert layout == PackedLayout.from_lengths([[], []], anchor_tokens, seq_len=3)


def test_one_slot_is_enough_for_the_anchor():
    assert ids_of(PackedLayout.from_any_ids(torch.tensor([[5]]))) == [[0]]
    assert ids_of(PackedLayout.from_lengths([[]])) == [[0]]


@quick
@given(contiguous_layouts())
def test_documents_in_one_piece_are_not_called_interleaved(layout):
    assert not layout.is_interleaved


@quick
@given(interleaved_layouts())
def test_a_document_in_two_pieces_is_called_interleaved(layout):
    assert layout.is_interleaved
    assert [[id_ for run in row for id_ in [run.document_id] * run.length] for row in layout.runs] == [
        [id_ for id_ in row if id_ > 0] for row in ids_of(layout)
    ]


def test_pieces_of_a_document_are_runs_and_its_length_is_their_sum():
    layout = PackedLayout.from_document_ids(torch.tensor([[0, 0, 1, 1, 2, 1, 3, 3, -1]]))

    assert layout.runs == ((Run(1, 2), Run(2, 1), Run(1, 1), Run(3, 2)),)
    assert layout.document_lengths == ((3, 1, 2),)
    assert layout.row_tokens == (8,)
    assert layout.num_documents == 3
    assert layout.anchor_tokens == 2


DTYPES = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("read", [PackedLayout.from_document_ids, PackedLayout.from_any_ids], ids=["ids", "any_ids"])
def test_every_integer_dtype_is_read_and_held_as_int32(read, dtype):
    layout = read(torch.tensor([[0, 1, 1, 2]], dtype=dtype))

    assert layout == PackedLayout.from_lengths([[2, 1]])
    assert layout.document_ids.dtype == torch.int32


def test_numpy_and_torch_integers_are_lengths_too():
    expected = PackedLayout.from_lengths([[3, 2]], anchor_tokens=2, seq_len=9)
    by_numpy = PackedLayout.from_lengths(np.array([[3, 2]]), anchor_tokens=np.int64(2), seq_len=np.int32(9))
    by_torch = PackedLayout.from_lengths(torch.tensor([[3, 2]]), anchor_tokens=2, seq_len=torch.tensor(9))

    assert by_numpy == by_torch == expected
    assert all(type(run.length) is int for layout in (by_numpy, by_torch) for run in layout.runs[0])
    assert type(by_numpy.anchor_tokens) is int


def test_rows_may_come_from_a_generator():
    assert PackedLayout.from_lengths((n for n in row) for row in [[3, 2], [4]]) == PackedLayout.from_lengths(
        [[3, 2], [4]]
    )


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_changing_the_users_tensor_afterwards_changes_nothing(dtype):
    ids = torch.tensor([[0, 1, 1, 2]], dtype=dtype)
    by_ids, by_any = PackedLayout.from_document_ids(ids), PackedLayout.from_any_ids(ids)
    ids.fill_(7)

    assert ids_of(by_ids) == ids_of(by_any) == [[0, 1, 1, 2]]


def test_strided_and_expanded_ids_are_read_in_row_order():
    ids = torch.tensor([[0, 0], [1, 1], [1, 2], [2, 2]], dtype=torch.int32).T
    expanded = torch.tensor([[0, 1, 2]]).expand(3, -1)

    assert PackedLayout.from_document_ids(ids) == PackedLayout.from_lengths([[2, 1], [1, 2]])
    assert PackedLayout.from_document_ids(expanded) == PackedLayout.from_lengths([[1, 1]] * 3)


# --- positions and ranks ---------------------------------------------------------------------------------------------


def positions_by_loop(rows, policy, anchor_tokens):
    positions = []
    for row in rows:
        restarts = {0: 0}
        positions.append([])
        for slot, id_ in enumerate(row):
            own = restarts.get(id_, anchor_tokens)
            restarts[id_] = own + 1
            positions[-1].append(0 if id_ == -1 else slot if policy == "continuous" else own)
    return positions


@quick
@given(layouts(), st.sampled_from(["continuous", "reset"]))
def test_position_ids_equal_a_loop_over_tokens(layout, policy):
    positions = layout.position_ids(policy)

    assert positions.dtype == torch.int64
    assert positions.tolist() == positions_by_loop(ids_of(layout), policy, layout.anchor_tokens)


@quick
@given(layouts())
def test_document_ranks_equal_a_loop_over_tokens(layout):
    ranks = layout.document_ranks()
    restarted = positions_by_loop(ids_of(layout), "reset", layout.anchor_tokens)

    assert ranks.dtype == torch.int64
    assert ranks.tolist() == [[position - layout.anchor_tokens for position in row] for row in restarted]


def test_positions_of_an_interleaved_row_run_on_over_its_pieces():
    layout = PackedLayout.from_document_ids(torch.tensor([[0, 0, 1, 1, 2, 1, 2, 2, 1, -1]]))

    assert layout.position_ids().tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 8, 0]]
    assert layout.position_ids("reset").tolist() == [[0, 1, 2, 3, 2, 4, 3, 4, 5, 0]]
    assert layout.document_ranks().tolist() == [[-2, -1, 0, 1, 0, 2, 1, 2, 3, -2]]


@pytest.mark.parametrize("policy", ["continuous", "reset"])
def test_the_picture_of_positions_in_the_docstring_is_true(policy):
    picture = PackedLayout.position_ids.__doc__
    ids, positions = (
        [int(word) for word in re.search(rf"^ *{name} +((?:-?\d+ +)*-?\d+)", picture, re.M).group(1).split()]
        for name in ("ids", policy)
    )

    assert PackedLayout.from_document_ids(torch.tensor([ids])).position_ids(policy).tolist() == [positions]


@pytest.mark.parametrize(
    ("constructor", "example"),
    [("from_lengths", [[3, 2], [4]]), ("from_any_ids", torch.tensor([[9, 7, 7, 4, -1]]))],
    ids=["from_lengths", "from_any_ids"],
)
def test_the_example_in_a_constructors_docstring_is_true(constructor, example):
    method = getattr(PackedLayout, constructor)
    call = f"{constructor}({example if isinstance(example, list) else example.tolist()})"
    after = method.__doc__.split(call)[1].split("\n\n")[0]

    assert [[int(word) for word in line.split()] for line in after.strip().splitlines()] == ids_of(method(example))


def test_writing_into_positions_does_not_reach_the_layout():
    layout = PackedLayout.from_lengths([[3, 2]])
    for policy in ("continuous", "reset"):
        layout.position_ids(policy).zero_()

    assert layout.position_ids().tolist() == [[0, 1, 2, 3, 4, 5]]
    assert layout.position_ids("reset").tolist() == [[0, 1, 2, 3, 1, 2]]


# --- an object among objects -----------------------------------------------------------------------------------------


def test_moving_to_another_device_keeps_all_but_the_place():
    layout = PackedLayout.from_lengths([[3, 2], [4]])
    layout.document_ranks()
    moved = layout.to("meta", non_blocking=True)

    assert moved.device.type == "meta"
    assert layout.device.type == "cpu"
    assert moved == layout
    assert moved.row_tokens == layout.row_tokens
    assert moved.document_ranks().device.type == "meta"
    assert moved.position_ids("reset").device.type == "meta"


def test_moving_to_its_own_device_is_free():
    layout = PackedLayout.from_lengths([[3, 2]])

    assert layout.to("cpu") is layout


@quick
@given(layouts())
def test_equal_layouts_hash_alike_and_survive_pickle_and_copies(layout):
    layout.document_ranks()
    again = PackedLayout.from_document_ids(layout.document_ids)
    for twin in (again, pickle.loads(pickle.dumps(layout)), copy.deepcopy(layout), copy.copy(layout)):
        assert twin == layout
        assert hash(twin) == hash(layout)
        assert torch.equal(twin.document_ids, layout.document_ids)
        assert torch.equal(twin.document_ranks(), layout.document_ranks())
    assert copy.deepcopy(layout).document_ids.data_ptr() != layout.document_ids.data_ptr()


def test_a_pickle_leaves_the_plans_at_home():
    layout = PackedLayout.from_lengths([[3]])
    layout.plan("unpicklable", lambda: lambda: None)

    assert pickle.loads(pickle.dumps(layout)) == layout


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(PackedLayout.from_lengths([[2, 3]]), id="other-documents"),
        pytest.param(PackedLayout.from_lengths([[5]]), id="fewer-documents"),
        pytest.param(PackedLayout.from_lengths([[3, 2]], anchor_tokens=0, seq_len=6), id="other-anchor"),
        pytest.param(PackedLayout.from_lengths([[3, 2]], seq_len=7), id="more-padding"),
        pytest.param(PackedLayout.from_lengths([[3, 2], [3, 2]]), id="more-rows"),
        pytest.param("PackedLayout", id="no-layout"),
    ],
)
def test_layouts_that_differ_are_not_equal(other):
    assert PackedLayout.from_lengths([[3, 2]]) != other


def test_repr_says_the_sizes_and_the_place():
    assert repr(PackedLayout.from_lengths([[3, 2], [4]])) == (
        "PackedLayout(batch_size=2, seq_len=6, num_documents=3, anchor_tokens=1, device='cpu')"
    )


def test_a_plan_is_built_once_a_key_and_not_shared_between_layouts():
    layout, built = PackedLayout.from_lengths([[3]]), []
    for key in ("a", "a", ("a", 1)):
        layout.plan(key, lambda key=key: built.append(key) or len(built))
    PackedLayout.from_lengths([[3]]).plan("a", lambda: built.append("other layout"))

    assert built == ["a", ("a", 1), "other layout"]


def test_a_plan_first_made_in_inference_mode_serves_training_too():
    layout = PackedLayout.from_lengths([[3]])
    with torch.inference_mode():
        layout.document_ranks()
    embeddings = torch.zeros(1, 4, requires_grad=True)
    embeddings[:, layout.document_ranks()].sum().backward()

    assert embeddings.grad.sum() == 4


def test_labels_are_renumbered_on_the_host_under_any_default_device():
    ids = torch.tensor([[9, 7, 7, 4]])
    with torch.device("meta"):
        layout = PackedLayout.from_any_ids(ids)

    assert ids_of(layout) == [[0, 1, 1, 2]]


# --- bad input -------------------------------------------------------------------------------------------------------


def one_line(message):
    """The whole message and nothing after it."""
    return "^" + re.escape(message) + "$"


BAD_IDS = {
    "one-dimension": (
        torch.tensor([0, 1, 1, 2, 2]),
        "document_ids must have shape [B, S], got [5]; add the batch dimension with document_ids[None].",
    ),
    "three-dimensions": (
        torch.zeros(2, 1, 4, dtype=torch.int32),
        "document_ids must have shape [B, S], got [2, 1, 4]; pass one id a token.",
    ),
    "no-dimension": (torch.tensor(1), "document_ids must have shape [B, S], got []; pass one id a token."),
    "no-rows": (
        torch.zeros(0, 4, dtype=torch.int64),
        "document_ids must hold at least one token, got shape [0, 4]; drop empty batches.",
    ),
    "no-tokens": (
        torch.zeros(2, 0, dtype=torch.int64),
        "document_ids must hold at least one token, got shape [2, 0]; drop empty batches.",
    ),
}

BAD_TYPES = {
    "float": (
        torch.zeros(1, 3),
        "document_ids must hold integers, got torch.float32; cast with document_ids.int().",
    ),
    "bool": (
        torch.zeros(1, 3, dtype=torch.bool),
        "document_ids must hold integers, got torch.bool; cast with document_ids.int().",
    ),
    "complex": (
        torch.zeros(1, 3, dtype=torch.complex64),
        "document_ids must hold integers, got torch.complex64; cast with document_ids.int().",
    ),
    "list": ([[0, 1]], "document_ids must be a torch tensor, got list; wrap it in torch.tensor(…)."),
    "numpy": (np.array([[0, 1]]), "document_ids must be a torch tensor, got ndarray; wrap it in torch.tensor(…)."),
    "none": (None, "document_ids must be a torch tensor, got NoneType; wrap it in torch.tensor(…)."),
}

BAD_CONVENTION = {
    "first-document-is-2": (
        [[0, 2, 2, 1]],
        "document_ids must number documents 1, 2, 3, … by first appearance, got 2 at row 0, position 1 after 0 "
        "documents; renumber with PackedLayout.from_any_ids.",
    ),
    "a-number-left-out-in-row-1": (
        [[0, 1, 2, 3], [0, 1, 1, 3]],
        "document_ids must number documents 1, 2, 3, … by first appearance, got 3 at row 1, position 3 after 1 "
        "documents; renumber with PackedLayout.from_any_ids.",
    ),
    "a-row-without-its-anchor": (
        [[0, 1, 1], [1, 1, 1]],
        "document_ids must begin every row with the same number of anchor tokens (0), got 1 in row 0 and 0 in row 1; "
        "give every row its anchor.",
    ),
    "anchor-counts-that-differ": (
        [[0, 0, 1], [0, 0, 0]],
        "document_ids must begin every row with the same number of anchor tokens (0), got 2 in row 0 and 3 in row 1; "
        "give every row its anchor.",
    ),
    "a-row-of-padding-without-its-anchor": (
        [[0, 1, 1], [-1, -1, -1]],
        "document_ids must begin every row with the same number of anchor tokens (0), got 1 in row 0 and 0 in row 1; "
        "give every row its anchor.",
    ),
    "a-zero-later-in-the-row": (
        [[0, 1, 1, 0, 2]],
        "document_ids must hold 0 (anchor) only at the front of a row, got 0 at row 0, position 3; "
        "number documents from 1, or read other labels with PackedLayout.from_any_ids.",
    ),
    "an-anchor-behind-the-first-document": (
        [[1, 0, 2]],
        "document_ids must hold 0 (anchor) only at the front of a row, got 0 at row 0, position 1; "
        "number documents from 1, or read other labels with PackedLayout.from_any_ids.",
    ),
    "padding-in-the-middle": (
        [[0, 1, -1, -1, 2]],
        "document_ids must hold padding (-1) only at the end of a row, got -1 at row 0, position 2; move it.",
    ),
    "padding-before-the-anchor": (
        [[-1, 0, 1]],
        "document_ids must hold padding (-1) only at the end of a row, got -1 at row 0, position 0; move it.",
    ),
    "below-minus-one": (
        [[0, 1, -2]],
        "document_ids must be at least -1, got -2 at row 0, position 2; mark padding with -1.",
    ),
    "the-label-of-ignored-tokens": (
        [[0, 1, -100]],
        "document_ids must be at least -1, got -100 at row 0, position 2; mark padding with -1.",
    ),
    "more-than-int32-holds": (
        [[0, 2**32 + 1]],
        "document_ids must number documents 1, 2, 3, … by first appearance, got 4294967297 at row 0, position 1 after "
        "0 documents; renumber with PackedLayout.from_any_ids.",
    ),
}


def cases(table):
    return {"argvalues": list(table.values()), "ids": list(table)}


@pytest.mark.parametrize("read", [PackedLayout.from_document_ids, PackedLayout.from_any_ids], ids=["ids", "any_ids"])
@pytest.mark.parametrize(("ids", "message"), **cases(BAD_IDS))
def test_ids_of_a_bad_shape_are_refused_in_one_line(ids, message, read):
    with pytest.raises(ValueError, match=one_line(message)):
        read(ids)


@pytest.mark.parametrize("read", [PackedLayout.from_document_ids, PackedLayout.from_any_ids], ids=["ids", "any_ids"])
@pytest.mark.parametrize(("ids", "message"), **cases(BAD_TYPES))
def test_ids_of_a_bad_type_are_refused_in_one_line(ids, message, read):
    with pytest.raises(TypeError, match=one_line(message)):
        read(ids)


@pytest.mark.parametrize(("ids", "message"), **cases(BAD_CONVENTION))
def test_ids_that_break_the_convention_are_refused_in_one_line(ids, message):
    with pytest.raises(ValueError, match=one_line(message)):
        PackedLayout.from_document_ids(torch.tensor(ids))


def test_labels_with_padding_in_the_middle_are_refused_in_one_line():
    message = "document_ids must hold padding (-1) only at the end of a row, got -1 at row 1, position 2; move it."
    with pytest.raises(ValueError, match=one_line(message)):
        PackedLayout.from_any_ids(torch.tensor([[0, 7, 7, 9], [0, 7, -1, 9]]))


def test_labels_shorter_than_the_anchor_are_refused_in_one_line():
    message = "seq_len must be at least 3 (anchor_tokens=3), got 2; raise seq_len."
    with pytest.raises(ValueError, match=one_line(message)):
        PackedLayout.from_any_ids(torch.tensor([[7, 7]]), anchor_tokens=3)


NESTED = "lengths must be nested by row, got {} where a row should stand; wrap a single row as [[length, …]]."

BAD_LENGTHS = {
    "not-nested": (TypeError, {"lengths": [3, 2]}, NESTED.format("3")),
    "a-number": (TypeError, {"lengths": 3}, NESTED.format("3")),
    "none": (TypeError, {"lengths": None}, NESTED.format("None")),
    "a-string": (TypeError, {"lengths": "32"}, NESTED.format("'3'")),
    "a-string-as-row": (TypeError, {"lengths": ["32"]}, NESTED.format("'32'")),
    "bytes-as-row": (TypeError, {"lengths": [b"32"]}, NESTED.format("b'32'")),
    "a-flat-tensor": (TypeError, {"lengths": torch.tensor([3, 2])}, NESTED.format("tensor(3)")),
    "a-flat-array": (TypeError, {"lengths": np.array([3, 2])}, NESTED.format("np.int64(3)")),
    "nested-twice": (
        TypeError,
        {"lengths": [[4], [[3]]]},
        "lengths[1][0] must be an integer, got [3]; pass a whole number.",
    ),
    "float-length": (
        TypeError,
        {"lengths": [[3.0]]},
        "lengths[0][0] must be an integer, got 3.0; pass a whole number.",
    ),
    "bool-length": (
        TypeError,
        {"lengths": [[True]]},
        "lengths[0][0] must be an integer, got True; pass a whole number.",
    ),
    "string-length": (
        TypeError,
        {"lengths": [["3"]]},
        "lengths[0][0] must be an integer, got '3'; pass a whole number.",
    ),
    "float-tensor": (
        TypeError,
        {"lengths": torch.tensor([[3.0]])},
        "lengths[0][0] must be an integer, got tensor(3.); pass a whole number.",
    ),
    "negative-length": (
        ValueError,
        {"lengths": [[3], [2, -1]]},
        "lengths[1] must hold counts of at least 1, got -1; leave empty documents out.",
    ),
    "zero-length": (
        ValueError,
        {"lengths": [[3, 0]]},
        "lengths[0] must hold counts of at least 1, got 0; leave empty documents out.",
    ),
    "no-rows": (ValueError, {"lengths": []}, "lengths must hold at least one row, got none; pass [[length, …], …]."),
    "overflow-by-one": (
        ValueError,
        {"lengths": [[1], [3, 2]], "seq_len": 5},
        "lengths must fit the row of seq_len=5, got 6 tokens in a row, the anchor included; "
        "raise seq_len or cut the documents.",
    ),
    "seq-len-below-the-anchor": (
        ValueError,
        {"lengths": [[]], "anchor_tokens": 3, "seq_len": 2},
        "seq_len must be at least 3 (anchor_tokens=3), got 2; raise seq_len.",
    ),
    "nothing-at-all": (
        ValueError,
        {"lengths": [[]], "anchor_tokens": 0},
        "seq_len must be at least 1 (anchor_tokens=0), got 0; raise seq_len.",
    ),
    "negative-seq-len": (
        ValueError,
        {"lengths": [[3]], "seq_len": -4},
        "seq_len must be at least 1 (anchor_tokens=1), got -4; raise seq_len.",
    ),
    "float-seq-len": (
        TypeError,
        {"lengths": [[3]], "seq_len": 8.0},
        "seq_len must be an integer, got 8.0; pass a whole number.",
    ),
    "negative-anchor": (
        ValueError,
        {"lengths": [[3]], "anchor_tokens": -1},
        "anchor_tokens must be at least 0, got -1; pass 1 for the paper's anchor.",
    ),
    "bool-anchor": (
        TypeError,
        {"lengths": [[3]], "anchor_tokens": True},
        "anchor_tokens must be an integer, got True; pass a whole number.",
    ),
}


@pytest.mark.parametrize(("error", "arguments", "message"), **cases(BAD_LENGTHS))
def test_bad_lengths_are_refused_in_one_line(error, arguments, message):
    with pytest.raises(error, match=one_line(message)):
        PackedLayout.from_lengths(**arguments)


def test_lengths_that_just_fill_the_row_are_legal():
    assert PackedLayout.from_lengths([[1], [3, 2]], seq_len=6).row_tokens == (2, 6)


@pytest.mark.parametrize("policy", ["restart", None, "Reset"], ids=str)
def test_an_unknown_position_policy_is_refused_in_one_line(policy):
    message = f"position_policy must be one of ('continuous', 'reset'), got {policy!r}; pass one of them."
    with pytest.raises(ValueError, match=one_line(message)):
        PackedLayout.from_lengths([[3]]).position_ids(policy)
