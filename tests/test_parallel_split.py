"""A rank's part of a batch: every token once, every copy of the anchor, the whole row's masks, positions and labels."""

import pickle

import pytest
import torch
from families import tiny_model
from hypothesis import given
from hypothesis import strategies as st
from strategies import contiguous_layouts, interleaved_layouts, quick

from anchor_attn import AnchorAttention, PackedLayout, anchor_attention, unwrap, wrap
from anchor_attn.hf import set_pattern
from anchor_attn.masks import dense_mask
from anchor_attn.parallel import parallelize, shard_layout, split_batch, ulysses_attention
from anchor_attn.train import PackedCollator

SCHEMES = ["document", "ulysses"]
any_layouts = st.one_of(contiguous_layouts(), interleaved_layouts())
LAYOUT = PackedLayout.from_lengths([[2, 4, 3]])


class Mesh:
    """As much of a one-dimensional DeviceMesh as is asked before anything is exchanged."""

    ndim, mesh_dim_names = 1, None

    def __init__(self, rank=0, ranks=2):
        self.rank, self.ranks = rank, ranks

    def size(self):
        return self.ranks

    def get_local_rank(self):
        return self.rank


def parts_of(layout, ranks, **settings):
    return [shard_layout(layout, rank, ranks, pattern="intra_doc", **settings) for rank in range(ranks)]


def batch_of(lengths=((2, 4, 3), (5, 1)), **settings):
    rows = [
        {"input_ids": [1, *range(10 * row + 2, 10 * row + 2 + sum(own))], "document_lengths": list(own)}
        for row, own in enumerate(lengths)
    ]
    return PackedCollator(**settings)(rows)


# --- tokens, masks and positions -------------------------------------------------------------------------------------


@quick
@given(any_layouts, st.integers(1, 4), st.sampled_from(SCHEMES), st.sampled_from([0.0, 0.3, None]), st.integers(1, 5))
def test_every_token_of_a_document_is_on_one_rank_and_the_anchor_on_all(layout, ranks, scheme, tolerance, multiple):
    parts = parts_of(layout, ranks, scheme=scheme, tolerance=tolerance, pad_to_multiple=multiple)
    for row, ids in enumerate(layout.document_ids):
        held = torch.cat([part.slots[row] for part in parts])
        times = torch.bincount(held[held >= 0], minlength=layout.seq_len)
        assert torch.equal(times, (ids > 0).long() + ranks * (ids == 0))
    for part in parts:
        assert part.seq_len % multiple == 0
        assert part.seq_len > 0
        assert (part.document_ids[:, : layout.anchor_tokens] == 0).all()


@quick
@given(any_layouts, st.integers(1, 4), st.sampled_from(SCHEMES), st.sampled_from(["full", "intra_doc", "anchor"]))
def test_masks_of_the_parts_are_the_whole_mask_at_their_slots(layout, ranks, scheme, pattern):
    if (pattern == "anchor" and not layout.anchor_tokens) or (pattern == "full" and scheme == "document"):
        return
    parts = parts_of(layout, ranks, scheme=scheme)
    whole = dense_mask(layout, pattern)
    slices = [part.slots[:, part.own_tokens :] for part in parts]
    anchors = torch.arange(layout.anchor_tokens).expand(layout.batch_size, -1)
    described = [(part.own, part.slots[:, : part.own_tokens]) for part in parts]
    described.append((parts[0].shared, torch.cat([anchors, *slices], dim=1)))
    for own, slots in described:
        if own is None:
            assert slots.numel() == 0 or (slots == anchors).all()
            continue
        assert PackedLayout.from_document_ids(own.document_ids) == own  # numbered as the convention has it
        mask = dense_mask(own, pattern)
        for row in range(layout.batch_size):
            real = slots[row] >= 0
            chosen = slots[row][real]
            assert torch.equal(mask[row][real][:, real], whole[row][chosen][:, chosen])


@quick
@given(any_layouts, st.integers(1, 4), st.sampled_from(SCHEMES), st.sampled_from(["continuous", "reset"]))
def test_tokens_keep_the_positions_that_they_have_in_the_whole_row(layout, ranks, scheme, policy):
    for part in parts_of(layout, ranks, scheme=scheme):
        rows, places = (part.slots >= 0).nonzero(as_tuple=True)
        expected = layout.position_ids(policy)[rows, part.slots[rows, places]]
        assert torch.equal(part.position_ids(policy)[rows, places], expected)
        assert not part.position_ids(policy)[part.slots < 0].any()


def test_the_examples_of_the_docstrings():
    assert shard_layout(LAYOUT, 0, 2, "ulysses").slots.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert shard_layout(LAYOUT, 1, 2, tolerance=None).slots.tolist() == [[0, 1, 2, 7, 8, 9]]
    drawn = PackedLayout.from_lengths([[3, 4, 3]])
    shared = [shard_layout(drawn, rank, 2) for rank in (0, 1)]
    assert [part.document_ids.tolist() for part in shared] == [[[0, 1, 1, 1, 2, 2]], [[0, 3, 3, 3, 2, 2]]]
    assert shared[0].shared == PackedLayout.from_lengths([[4]])


def test_pieces_of_a_document_that_come_together_on_a_rank_are_one():
    layout = PackedLayout.from_document_ids(torch.tensor([[0, 1, 1, 2, 2, 2, 2, 1, 1]]))
    own = shard_layout(layout, 0, 2, tolerance=None).own
    assert own == PackedLayout.from_lengths([[4]])
    assert not own.is_interleaved


def test_a_part_is_pickled_moved_and_described():
    part = shard_layout(LAYOUT, 1, 2, "ulysses")
    again = pickle.loads(pickle.dumps(part))
    assert torch.equal(again.slots, part.slots)
    assert (again.shared, again.own, again.rank) == (part.shared, part.own, 1)
    assert part.to("cpu") is part
    moved = part.to("meta")
    assert {moved.device.type, moved.own.device.type, moved.shared.device.type} == {"meta"}
    assert repr(part) == (
        "ShardedLayout(rank=1, ranks=2, scheme='ulysses', batch_size=1, seq_len=6, shared_tokens=9, device='cpu')"
    )


# --- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_labels_are_shifted_before_the_row_is_split_and_each_is_counted_once(scheme, ranks):
    batch = batch_of()
    batch["labels"][:, 1] = batch["input_ids"][:, 1]  # what the anchor predicts, which every rank has
    shifted = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    counted = torch.zeros_like(shifted)
    for rank in range(ranks):
        local = split_batch(batch, rank, ranks, scheme)
        rows, places = (local["shift_labels"] != -100).nonzero(as_tuple=True)
        slots = local["document_ids"].slots[rows, places]
        counted[rows, slots] += 1
        assert torch.equal(local["shift_labels"][rows, places], shifted[rows, slots])
        assert local["num_items_in_batch"] * ranks == (shifted != -100).sum()
        assert torch.equal(local["input_ids"], local["document_ids"].take(batch["input_ids"], 0))
    assert torch.equal(counted, (shifted != -100).long())


def test_a_batch_without_labels_or_positions_is_split_as_well():
    batch = batch_of()
    positions = split_batch(batch, 1, 2)["position_ids"]
    local = split_batch({name: batch[name] for name in ("input_ids", "document_ids")}, 1, 2)
    assert set(local) == {"input_ids", "document_ids", "position_ids"}
    assert torch.equal(local["position_ids"], positions)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 2}, r"^rank must lie in \[0, ranks\), got 2 of 2"),
        ({"rank": -1}, r"^rank must lie in \[0, ranks\), got -1 of 2"),
        ({"scheme": "ring"}, r"^scheme must be one of .* got 'ring'"),
        ({"pattern": "full"}, r"^pattern must keep documents to themselves .* got 'full'"),
        ({"layout": PackedLayout.from_lengths([[2]], 0)}, r"^pattern='anchor' must have an anchor to show"),
        ({"pad_to_multiple": 0}, r"^pad_to_multiple must be at least 1, got 0"),
    ],
)
def test_layouts_are_not_sharded_without_meaning(changes, message):
    with pytest.raises(ValueError, match=message):
        shard_layout(**{"layout": LAYOUT, "rank": 0, "ranks": 2, **changes})


def test_batches_are_not_split_twice_or_in_part():
    batch = batch_of()
    with pytest.raises(ValueError, match=r"^batch must be whole, got ShardedLayout\(rank=0"):
        split_batch({**batch, "document_ids": split_batch(batch, 0, 2)["document_ids"]}, 0, 2)
    with pytest.raises(ValueError, match=r"^batch must hold input_ids, .* got token_type_ids besides"):
        split_batch({**batch, "token_type_ids": batch["input_ids"]}, 0, 2)
    with pytest.raises(ValueError, match=r"^document_ids must have the shape of input_ids \[2, 3\], got \[2, 10\]"):
        split_batch({**batch, "input_ids": batch["input_ids"][:, :3]}, 0, 2)


def test_a_part_is_bound_to_its_own_ranks_only():
    part = shard_layout(LAYOUT, 0, 2)
    assert part.bind(Mesh(0, 2)).mesh.size() == 2
    with pytest.raises(ValueError, match=r"^mesh must have the ranks .* rank 0 of 2, got rank 1 of 2"):
        part.bind(Mesh(1, 2))
    with pytest.raises(ValueError, match=r"^mesh must have the ranks .* rank 0 of 2, got rank 0 of 4"):
        part.bind(Mesh(0, 4))
    plane = Mesh()
    plane.ndim = 2
    with pytest.raises(ValueError, match=r"^mesh must have one dimension, got 2"):
        part.bind(plane)


def states(heads, tokens):
    return [torch.zeros(1, heads, tokens, 8) for _ in range(3)]


def test_attention_over_ranks_refuses_what_would_be_another_attention():
    part = shard_layout(LAYOUT, 0, 2, tolerance=0.0)
    assert part.shared is not None
    inputs = states(4, part.seq_len)
    with pytest.raises(ValueError, match=r"^layout must know the ranks that share documents.*layout\.bind\(mesh\)"):
        anchor_attention(*inputs, part)
    with pytest.raises(ValueError, match=r"^pattern must keep documents to themselves .* got 'full'"):
        anchor_attention(*inputs, part.bind(Mesh()), pattern="full")
    with pytest.raises(ValueError, match=r"^dropout must be 0 over several ranks, got 0\.1"):
        anchor_attention(*inputs, part.bind(Mesh()), dropout=0.1)
    with pytest.raises(ValueError, match=r"^num_heads must be a multiple of the 2 ranks .* got 3"):
        anchor_attention(*states(3, part.seq_len), part.bind(Mesh()))
    with pytest.raises(ValueError, match=r"^query must have the layout's batch and length \[1, heads, "):
        anchor_attention(*states(4, part.seq_len + 1), part)
    with pytest.raises(ValueError, match=r"^query must hold 1/2 of the layout's 10 tokens, got 6"):
        ulysses_attention(*states(4, 6), LAYOUT, Mesh())
    with pytest.raises(ValueError, match=r"^dropout must be 0 over several ranks"):
        ulysses_attention(*states(4, 5), LAYOUT, Mesh(), dropout=0.5)
    with pytest.raises(ValueError, match=r"^num_heads must be a multiple of the 2 ranks"):
        ulysses_attention(*states(3, 5), LAYOUT, Mesh())


def test_what_knows_nothing_of_ranks_takes_no_part_for_a_whole_row():
    with pytest.raises(TypeError, match=r"^layout must be a PackedLayout, got ShardedLayout"):
        dense_mask(shard_layout(LAYOUT, 0, 2))


# --- models ----------------------------------------------------------------------------------------------------------


def test_models_that_ranks_would_compute_otherwise_are_refused():
    model = wrap(tiny_model("llama", torch.float32))
    with pytest.raises(ValueError, match=r"^model must be wrapped, got a plain LlamaForCausalLM"):
        parallelize(tiny_model("llama"), Mesh())
    with pytest.raises(ValueError, match=r"^scheme must be one of .* got 'ring'"):
        parallelize(model, Mesh(), "ring")
    with pytest.raises(ValueError, match=r"^num_heads must be a multiple of the 3 ranks .* got 4"):
        parallelize(model, Mesh(0, 3))
    parallelize(model, Mesh(0, 3), tolerance=None)
    for options, message in {
        "attention_dropout": r"^model must have no attention dropout over several ranks, .* attention_dropout=0\.1",
        "rope_parameters": r"^model must have RoPE that does not depend on the length",
    }.items():
        value = 0.1 if options == "attention_dropout" else {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
        with pytest.raises(ValueError, match=message):
            parallelize(wrap(tiny_model("llama", **{options: value})), Mesh())
    experts = parallelize(wrap(tiny_model("mixtral", torch.float32)), Mesh(), tolerance=None)
    with pytest.raises(ValueError, match=r"^model must leave the router's loss out, got MixtralForCausalLM"):
        experts(**batch_of(), output_router_logits=True)
    experts.config.output_router_logits = True
    with pytest.raises(ValueError, match=r"^model must leave the router's loss out, got MixtralForCausalLM"):
        parallelize(experts, Mesh())
    with pytest.raises(ValueError, match=r"^pattern must keep documents to themselves"):
        parallelize(wrap(tiny_model("llama"), pattern="full"), Mesh())


def test_a_parallel_model_refuses_batches_that_it_would_get_wrong():
    batch = batch_of()
    model = parallelize(wrap(tiny_model("llama", torch.float32)), Mesh(), tolerance=None)
    with pytest.raises(ValueError, match=r"^num_items_in_batch must be left out with a batch that is still whole"):
        model(**batch, num_items_in_batch=8)
    with pytest.raises(ValueError, match=r"^mesh must have the ranks .* rank 1 of 2, got rank 0 of 2"):
        model(**split_batch(batch, 1, 2, tolerance=None))
    set_pattern(model, "full")
    with pytest.raises(ValueError, match=r"^pattern must keep documents to themselves"):
        model(**batch)


def test_labels_are_refused_for_a_loss_that_shifts_them_by_itself():
    model = wrap(tiny_model("llama", torch.float32))
    taken = type(model).loss_function.fget(model)
    model.loss_function = lambda logits, labels, vocab_size, shift_labels=None, **kwargs: taken(
        logits, labels, vocab_size, **kwargs
    )
    parallelize(model, Mesh(), tolerance=None)
    batch = batch_of()
    with pytest.raises(ValueError, match=r"^labels must be left out for LlamaForCausalLM, .* of split_batch"):
        model(**batch)
    del batch["labels"]
    assert model(**batch).logits.shape[1] == split_batch(batch, 0, 2, tolerance=None)["input_ids"].shape[1]


def test_unwrapping_and_wrapping_anew_give_the_whole_row_back():
    batch = batch_of()
    model = wrap(tiny_model("llama", torch.float32))
    whole = model(**batch).logits
    parallelize(parallelize(model, Mesh(), tolerance=None), Mesh(), tolerance=None)
    assert model(**batch).logits.shape != whole.shape
    with torch.no_grad():  # without documents it is the plain model
        assert torch.equal(model(input_ids=batch["input_ids"]).logits, unwrap(model)(batch["input_ids"]).logits)
    assert torch.equal(wrap(model)(**batch).logits, whole)


def test_a_module_of_ones_own_knows_the_whole_rows_positions():
    torch.manual_seed(0)
    module = AnchorAttention(32, 4, rope_theta=100.0, pattern="intra_doc")
    part = shard_layout(LAYOUT, 1, 2, tolerance=None)
    local = torch.randn(1, part.seq_len, 32)
    given_positions = module(local, part, position_ids=part.position_ids())
    assert torch.equal(module(local, part), given_positions)
    module.position_policy = "reset"
    assert torch.equal(module(local, part), module(local, part, position_ids=part.position_ids("reset")))
