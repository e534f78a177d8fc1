"""`AnchorAttention`, the module: against textbook attention and transformers' layers, and under what training does."""

import copy
import os
import re
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from budget import assert_within_budget, plain_attention
from families import tiny_model
from hypothesis import given
from strategies import anchored_layouts, quick
from test_rope_precision import rotated_in_float64
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from anchor_attn import PackedLayout, wrap
from anchor_attn.masks import PATTERNS, dense_mask
from anchor_attn.module import AnchorAttention
from anchor_attn.rope import ROPE_PRECISIONS, inverse_frequencies, rotary_table
from anchor_attn.rope.precision import _table

LAYOUT = PackedLayout.from_lengths([[7, 5, 1], [4, 6]], seq_len=15)
REAL = LAYOUT.document_ids != -1
FEATURES = {
    "plain": {},
    "grouped": {"num_kv_heads": 2},
    "head-size": {"num_kv_heads": 1, "head_dim": 6, "bias": True},
    "norm-and-sinks": {"qk_norm": True, "sinks": True, "num_kv_heads": 2},
    "window": {"sliding_window": 3, "keep_anchor": False},
    "window-and-anchor": {"sliding_window": 3, "softcap": 0.7, "scale": 0.5},
    "partial-interleaved": {"rotary_dim": 4, "rotary_interleaved": True, "rope_theta": 100.0},
    "reset": {"position_policy": "reset", "rope_theta": 10.0},
    "no-rope": {"rope_theta": None},
}

every_feature = pytest.mark.parametrize("options", [pytest.param(value, id=name) for name, value in FEATURES.items()])
every_precision = pytest.mark.parametrize("rope_precision", ROPE_PRECISIONS)
# torch 2.13's compiler trips over torch's own warnings: deprecations when it is imported,
# and at a graph break looks for gradients where there are none.
compiles = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script:DeprecationWarning", "ignore:The .grad attribute of a Tensor:UserWarning"
)


def create_attention(dtype=torch.float32, scale_weights=3.0, **options):
    """A module of 4 heads over 32 numbers, the same weights each time, large enough that scores matter."""
    torch.manual_seed(0)
    attention = AnchorAttention(32, 4, **options)
    with torch.no_grad():
        for name, parameter in attention.named_parameters():
            if "sinks" in name or "norm" in name or "bias" in name:
                parameter.add_(torch.randn_like(parameter))
            else:
                parameter.mul_(scale_weights)
    return attention.to(dtype)


def random_hidden(layout=LAYOUT, dtype=torch.float32, size=32):
    """[B, S, hidden], the same each time."""
    torch.manual_seed(1)
    return torch.randn(layout.batch_size, layout.seq_len, size).to(dtype)


def textbook(attention, hidden, layout=LAYOUT, dtype=torch.float64, position_ids=None):
    """What the module means, in `dtype`: projections, RoPE as complex numbers and dense attention."""
    weights = {name: parameter.to(dtype) for name, parameter in attention.named_parameters()}

    def project(name, states):
        return F.linear(states, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    query, key, value = (
        project(name, hidden.to(dtype)).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for name in ("q_proj", "k_proj", "v_proj")
    )
    if attention.q_norm is not None:
        query, key = (
            states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + 1e-6) * weights[name]
            for name, states in (("q_norm.weight", query), ("k_norm.weight", key))
        )
    if attention.rope_theta is not None:
        positions = layout.position_ids(attention.position_policy) if position_ids is None else position_ids
        inv_freq = inverse_frequencies(attention.rotary_dim, attention.rope_theta)
        query, key = (
            rotated_in_float64(states, positions, inv_freq, attention.rotary_interleaved).to(dtype)
            for states in (query, key)
        )
    mask = dense_mask(layout, attention.pattern, attention.sliding_window, attention.keep_anchor)
    scale = attention.head_dim**-0.5 if attention.scale is None else attention.scale
    out = plain_attention(query, key, value, mask, scale, attention.softcap, weights.get("sinks"))
    out = out.masked_fill((layout.document_ids == -1)[:, None, :, None], 0)
    return project("o_proj", out.transpose(1, 2).flatten(2))


def gradients(attention, out):
    """Of a fixed weighting of the outputs, by parameter."""
    torch.manual_seed(2)
    weights = torch.randn(out.shape).to(out.dtype)
    names, parameters = zip(*attention.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad((out * weights).sum(), parameters), strict=True))


def assert_same_gradients(ours, others, **tolerance):
    assert ours.keys() == others.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], others[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance)


def training_step(attention, hidden, layout=LAYOUT):
    """The output and the gradients by parameter."""
    out = attention(hidden, layout)
    return out.detach(), gradients(attention, out)


# --- against the definition ------------------------------------------------------------------------------------------


@every_feature
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("engine", ["reference", "varlen"])
def test_the_module_is_textbook_attention(options, pattern, engine):
    attention = create_attention(torch.float64, pattern=pattern, engine=engine, **options)
    hidden = random_hidden(dtype=torch.float64)
    ours, oracle = attention(hidden, LAYOUT), textbook(attention, hidden)

    torch.testing.assert_close(ours, oracle, rtol=0, atol=1e-12)
    assert_same_gradients(gradients(attention, ours), gradients(attention, oracle), rtol=1e-9, atol=1e-11)


@every_feature
@pytest.mark.parametrize("autocast", [False, True], ids=["cast", "autocast"])
@pytest.mark.parametrize("rope_precision", ["exact", "float32", "model"])
def test_low_precision_stays_within_the_budget(options, autocast, rope_precision):
    attention = create_attention(rope_precision=rope_precision, **options)
    hidden = random_hidden()
    if not autocast:
        attention, hidden = attention.to(torch.bfloat16), hidden.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = attention(hidden, LAYOUT)

    assert ours.dtype == torch.bfloat16
    eager, oracle = (textbook(attention, hidden, dtype=dtype).detach() for dtype in (torch.bfloat16, torch.float64))
    assert_within_budget(ours.detach(), eager, oracle)
    assert all(grad.isfinite().all() for grad in gradients(attention, ours).values())


def test_the_stated_precision_shows_in_the_output():
    hidden, shifted = random_hidden(), LAYOUT.position_ids() + 3_000_000  # where float32 angles err by 0.1
    errors = {}
    for policy in ROPE_PRECISIONS:
        attention = create_attention(rope_precision=policy)
        right = textbook(attention, hidden, position_ids=shifted)
        errors[policy] = float((attention(hidden, LAYOUT, shifted) - right).detach().abs().mean())

    assert errors["exact"] < 1e-5 < 1e-3 < errors["float32"] < errors["bfloat16"]
    assert errors["model"] == errors["float32"]


def test_one_document_under_full_attention_is_plain_causal_attention():
    layout = PackedLayout.from_lengths([[12], [12]], anchor_tokens=0)
    attention = create_attention(pattern="full", rope_theta=None, num_kv_heads=2)
    hidden = random_hidden(layout)
    query, key, value = (
        project(hidden).unflatten(-1, (-1, 8)).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    plain = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    torch.testing.assert_close(attention(hidden, layout), attention.o_proj(plain.transpose(1, 2).flatten(2)))


# --- documents and positions -----------------------------------------------------------------------------------------


@quick
@given(anchored_layouts(max_rows=2))
def test_each_document_alone_behind_the_anchor_equals_the_packed_row(layout):
    attention = create_attention(torch.float64, qk_norm=True, sinks=True, num_kv_heads=2)
    hidden = random_hidden(layout, torch.float64)
    # Rows of a batch begin with the same anchor tokens, as they would in a model.
    hidden[:, : layout.anchor_tokens] = hidden[:1, : layout.anchor_tokens]
    position_ids = layout.position_ids()
    packed = attention(hidden, layout)

    for row, lengths in enumerate(layout.document_lengths):
        for document in range(1, len(lengths) + 1):
            ids = layout.document_ids[row]
            own = ((ids == document) | (ids == 0)).nonzero()[:, 0]
            alone = PackedLayout.from_lengths([[lengths[document - 1]]], layout.anchor_tokens)
            out = attention(hidden[row : row + 1, own], alone, position_ids[row : row + 1, own])
            torch.testing.assert_close(out[0], packed[row, own], rtol=0, atol=1e-12)


def test_a_model_of_such_layers_keeps_documents_apart():
    layers = [create_attention(torch.float64, sinks=True) for _ in range(2)]
    embedding = torch.randn(50, 32, dtype=torch.float64)

    def model(tokens, document_ids):
        hidden = embedding[tokens]
        for layer in layers:
            hidden = hidden + layer(hidden, document_ids)
        return hidden

    tokens = torch.randint(0, 50, LAYOUT.document_ids.shape, generator=torch.Generator().manual_seed(0))
    before = model(tokens, LAYOUT)
    tokens[:, 1:4] = (tokens[:, 1:4] + 1) % 50
    moved = (model(tokens, LAYOUT) - before).abs().amax(-1)

    first = LAYOUT.document_ids == 1
    assert moved[:, 1:4].min() > 0
    assert not moved[~first].any()


def test_ids_and_their_layout_give_the_same():
    attention, hidden = create_attention(), random_hidden()

    assert torch.equal(attention(hidden, LAYOUT.document_ids), attention(hidden, LAYOUT))


@pytest.mark.parametrize("position_policy", ["continuous", "reset"])
def test_positions_come_from_the_policy_or_the_caller(position_policy):
    attention, hidden = create_attention(position_policy=position_policy, rope_theta=10.0), random_hidden()
    other = "reset" if position_policy == "continuous" else "continuous"
    by_policy = attention(hidden, LAYOUT)

    assert torch.equal(by_policy, attention(hidden, LAYOUT, LAYOUT.position_ids(position_policy)))
    assert not torch.allclose(by_policy, attention(hidden, LAYOUT, LAYOUT.position_ids(other)))
    row = torch.arange(15)
    if position_policy == "continuous":
        assert torch.equal(by_policy, attention(hidden, LAYOUT, row))
        assert torch.equal(by_policy, attention(hidden, LAYOUT, row[None].int()))


def test_a_given_table_stands_in_for_the_modules_own():
    attention, hidden = create_attention(rope_theta=1e4), random_hidden()
    table = rotary_table(LAYOUT.position_ids(), inverse_frequencies(8, 1e6), "exact", hidden.dtype)

    assert torch.equal(attention(hidden, LAYOUT, rotary=table), create_attention(rope_theta=1e6)(hidden, LAYOUT))
    assert torch.equal(
        create_attention(rope_theta=None)(hidden, LAYOUT, rotary=table), attention(hidden, LAYOUT, rotary=table)
    )
    assert not torch.allclose(attention(hidden, LAYOUT, rotary=table), attention(hidden, LAYOUT))


@every_precision
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_modules_own_table_has_the_stated_precision(rope_precision, dtype):
    attention, hidden = create_attention(dtype, rope_precision=rope_precision), random_hidden(dtype=dtype)
    table = rotary_table(LAYOUT.position_ids(), inverse_frequencies(8, 1e4), rope_precision, dtype)
    own, by_position = attention(hidden, LAYOUT), attention(hidden, LAYOUT, LAYOUT.position_ids())

    assert torch.equal(own, attention(hidden, LAYOUT, rotary=table))
    assert torch.equal(own, by_position)


def test_layers_make_one_table_a_batch():
    layout, hidden = PackedLayout.from_lengths([[7, 5]]), random_hidden()[:1, :13]
    layers = [create_attention() for _ in range(3)]
    with mock.patch("anchor_attn.rope.precision._table", side_effect=_table) as made:
        for layer in layers:
            layer(hidden, layout)

    assert made.call_count == 1


def test_thetas_of_two_layers_differ_on_one_layout():
    hidden = random_hidden()
    outs = [create_attention(rope_theta=theta)(hidden, LAYOUT) for theta in (1e2, 1e6, 1e2)]

    assert not torch.allclose(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


# --- against transformers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("run_in", ["float32", "bfloat16", "float64", "autocast"])
def test_transformers_weights_give_transformers_outputs(family, pattern, run_in):
    dtype = torch.float32 if run_in == "autocast" else getattr(torch, run_in)
    model = wrap(tiny_model(family, dtype, use_sliding_window=False), pattern)
    # A cast has rounded this buffer; a checkpoint loaded in its dtype has it in float32.
    model.model.rotary_emb.inv_freq = inverse_frequencies(8, 10_000)
    layer, seen = model.model.layers[1].self_attn, {}
    layer.register_forward_hook(
        lambda module, args, kwargs, out: seen.update(hidden=kwargs["hidden_states"], out=out[0]), with_kwargs=True
    )
    options = {"pattern": pattern, "qk_norm": family == "qwen3", "bias": family == "qwen2", "scale": layer.scaling}
    state = layer.state_dict()
    if family == "qwen2":  # which has a bias in front of its attention only
        state["o_proj.bias"] = torch.zeros(32)
    outs = {}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=run_in == "autocast"):
        tokens = torch.randint(3, 60, LAYOUT.document_ids.shape, generator=torch.Generator().manual_seed(0))
        model(input_ids=tokens, position_ids=LAYOUT.position_ids(), document_ids=LAYOUT)
        for rope_precision in ROPE_PRECISIONS:
            ours = AnchorAttention(32, 4, 2, dtype=dtype, rope_precision=rope_precision, **options)
            ours.load_state_dict(state)
            outs[rope_precision] = ours(seen["hidden"], LAYOUT)[REAL]

    theirs = seen["out"][REAL]
    assert {out.dtype for out in outs.values()} == {theirs.dtype}
    if family != "qwen3":  # its norm rounds before the weight, in float32 at most; torch's after it
        assert torch.equal(outs["model"], theirs)
    eps = torch.finfo(torch.float32 if dtype == torch.float64 else theirs.dtype).eps
    for rope_precision in ("model", "float32", "exact"):
        torch.testing.assert_close(outs[rope_precision], theirs, rtol=0, atol=8 * eps * float(theirs.abs().max()))


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_changes_nothing(use_reentrant, dropout):
    attention = create_attention(qk_norm=True, sinks=True, dropout=dropout, engine="reference")
    hidden = random_hidden().requires_grad_()
    results = []
    for forward in (attention, lambda *args: checkpoint(attention, *args, use_reentrant=use_reentrant)):
        torch.manual_seed(3)
        layout = copy.deepcopy(LAYOUT)  # its tables are made in the first forward and found in the second
        out = forward(hidden, layout)
        results.append((out.detach(), gradients_by_backward(attention, out)))

    assert torch.equal(results[0][0], results[1][0])
    assert_same_gradients(results[0][1], results[1][1], rtol=0, atol=0)


def gradients_by_backward(attention, out):
    attention.zero_grad()
    out.square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in attention.named_parameters()}


def test_dropout_acts_in_training_only_and_keeps_the_mean():
    attention = create_attention(dropout=0.25, engine="reference")
    hidden = random_hidden()
    with torch.no_grad():
        plain = create_attention(engine="reference")(hidden, LAYOUT)
        dropped = torch.stack([attention(hidden, LAYOUT) for _ in range(600)])
        resting = attention.eval()(hidden, LAYOUT)

    assert torch.equal(resting, plain)
    assert not torch.equal(dropped[0], dropped[1])
    noise = dropped.std(dim=0) / 600**0.5
    assert ((dropped.mean(dim=0) - plain).abs() <= 6 * noise + 1e-6).all()


def test_a_cast_leaves_the_rotary_angles_alone():
    hidden, shifted = random_hidden(), LAYOUT.position_ids() + 5_000
    cast = create_attention().to(torch.bfloat16).to(torch.float32)
    straight = create_attention()
    straight.load_state_dict(cast.state_dict())

    assert torch.equal(cast(hidden, LAYOUT, shifted), straight(hidden, LAYOUT, shifted))
    assert not list(cast.buffers())


@every_feature
def test_copies_and_state_dicts_give_the_same(options):
    attention, hidden = create_attention(**options), random_hidden()
    copied = copy.deepcopy(attention)
    torch.manual_seed(9)
    loaded = AnchorAttention(32, 4, **options)
    assert not torch.equal(loaded(hidden, LAYOUT), attention(hidden, LAYOUT))
    loaded.load_state_dict(attention.state_dict())

    for other in (copied, loaded):
        assert torch.equal(other(hidden, LAYOUT), attention(hidden, LAYOUT))
    assert not {id(parameter) for parameter in copied.parameters()} & {
        id(parameter) for parameter in attention.parameters()
    }


def test_parameters_have_the_names_that_checkpoints_have():
    plain, full = AnchorAttention(32, 4), AnchorAttention(32, 4, bias=True, qk_norm=True, sinks=True)
    projections = [f"{name}_proj.weight" for name in "qkvo"]

    assert sorted(plain.state_dict()) == sorted(projections)
    assert sorted(full.state_dict()) == sorted(
        [*projections, *(f"{name}_proj.bias" for name in "qkvo"), "q_norm.weight", "k_norm.weight", "sinks"]
    )


@every_feature
def test_a_module_made_on_meta_starts_as_one_made_here(options):
    with torch.device("meta"):
        attention = AnchorAttention(32, 4, **options)
    assert all(parameter.is_meta for parameter in attention.parameters())
    attention.to_empty(device="cpu")
    for parameter in attention.parameters():
        nn.init.constant_(parameter, torch.nan)
    torch.manual_seed(5)
    attention.reset_parameters()
    torch.manual_seed(5)
    here = AnchorAttention(32, 4, **options)

    assert attention.state_dict().keys() == here.state_dict().keys()
    for name, parameter in attention.state_dict().items():
        assert torch.equal(parameter, here.state_dict()[name]), name


def test_the_repr_says_what_differs():
    plain = AnchorAttention(32, 4)
    assert plain.extra_repr() == (
        "hidden_size=32, num_heads=4, num_kv_heads=4, head_dim=8, pattern='anchor', engine='auto', "
        "rope_theta=10000.0, rope_precision='exact', rotary_dim=8, position_policy='continuous'"
    )
    other = AnchorAttention(32, 4, rope_theta=None, softcap=5.0, sliding_window=9, keep_anchor=False, sinks=True)
    assert other.extra_repr().endswith("rope_theta=None, softcap=5.0, sliding_window=9, keep_anchor=False, sinks=True")


# --- compiled --------------------------------------------------------------------------------------------------------


class Decoder(nn.Module):
    """Attention and a projection, twelve times: more layers than torch recompiles a function for."""

    def __init__(self, **options):
        super().__init__()
        self.attentions = nn.ModuleList(create_attention(**options) for _ in range(12))
        self.outs = nn.ModuleList(nn.Linear(32, 32) for _ in range(12))

    def forward(self, hidden, document_ids):
        for attention, out in zip(self.attentions, self.outs, strict=True):
            hidden = F.rms_norm(hidden + attention(hidden, document_ids), (32,))
            hidden = hidden + out(hidden)
        return hidden


def different_batches(count=20):
    """Layouts of 2 rows of 40 tokens, no two alike."""
    for index in range(count):
        lengths = [[index + 1, 38 - index], [5, index + 2, 3]]
        yield PackedLayout.from_lengths(lengths[:: 1 if index % 2 else -1], seq_len=40)


@compiles
@pytest.mark.parametrize("as_tensor", [False, True], ids=["layout", "ids"])
def test_other_documents_compile_nothing_again(as_tensor):
    decoder, counter = Decoder(qk_norm=True, num_kv_heads=2), CompileCounter()
    torch.compiler.reset()
    compiled = torch.compile(decoder, backend=counter)
    frames = []
    for layout in different_batches():
        hidden = random_hidden(layout)
        ours = training_step_of(compiled, decoder, hidden, layout.document_ids if as_tensor else layout)
        theirs = training_step_of(decoder, decoder, hidden, layout)
        frames.append(counter.frame_count)
        torch.testing.assert_close(ours[0], theirs[0])
        assert_same_gradients(ours[1], theirs[1])

    assert frames[-1] == frames[0] <= 8, frames


def training_step_of(forward, model, hidden, document_ids):
    out = forward(hidden, document_ids)
    return out.detach(), gradients(model, out)


@compiles
@pytest.mark.slow
@every_precision
def test_compiled_by_inductor_it_computes_the_same(rope_precision):
    torch.compiler.reset()
    attention = create_attention(rope_precision=rope_precision, qk_norm=True, sinks=True, sliding_window=3)
    compiled = torch.compile(attention)
    for layout in different_batches(3):
        hidden = random_hidden(layout)
        ours, theirs = training_step_of(compiled, attention, hidden, layout), training_step(attention, hidden, layout)
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
        assert_same_gradients(ours[1], theirs[1], rtol=1e-4, atol=1e-4)


# --- two processes ---------------------------------------------------------------------------------------------------


def train_one_row(rank, address, folder):
    """One rank of two: its row of the batch, the gradients into a file."""
    os.environ["OMP_NUM_THREADS"] = "1"
    dist.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=2)
    attention = create_attention(torch.float64, qk_norm=True, sinks=True)
    parallel = nn.parallel.DistributedDataParallel(attention)
    layout = PackedLayout.from_document_ids(LAYOUT.document_ids[rank : rank + 1])
    hidden = random_hidden(dtype=torch.float64)[rank : rank + 1]
    parallel(hidden, layout).square().sum().backward()
    torch.save({name: parameter.grad for name, parameter in attention.named_parameters()}, f"{folder}/{rank}.pt")
    dist.barrier()
    # Torch 2.13 may wait for ever where a process group ends: its destructor holds the GIL and joins a thread that
    # wants it, to forget the Python state of the last all-reduce.
    os._exit(0)


@pytest.mark.slow
def test_two_gloo_processes_equal_one(tmp_path):
    torch.multiprocessing.spawn(train_one_row, (str(tmp_path / "meeting"), str(tmp_path)), nprocs=2)
    attention = create_attention(torch.float64, qk_norm=True, sinks=True)
    (attention(random_hidden(dtype=torch.float64), LAYOUT).square().sum() / 2).backward()

    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        alone = {name: parameter.grad for name, parameter in attention.named_parameters()}
        assert_same_gradients(found, alone, rtol=1e-9, atol=1e-12)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"hidden_size": 0}, ValueError, "hidden_size must be at least 1, got 0;"),
        ({"num_heads": 4.0}, TypeError, "num_heads must be an integer, got 4.0;"),
        ({"num_kv_heads": 3}, ValueError, "num_heads must be a multiple of num_kv_heads, got 4 and 3;"),
        ({"hidden_size": 30}, ValueError, "hidden_size must be a multiple of num_heads, got 30 and 4;"),
        ({"head_dim": True}, TypeError, "head_dim must be an integer, got True;"),
        ({"head_dim": 7}, ValueError, "rotary_dim must be even and at least 2, got 7;"),
        ({"rotary_dim": 10}, ValueError, "rotary_dim must be at most head_dim=8, got 10;"),
        ({"rope_theta": -1.0}, ValueError, "theta must be above 0 and finite, got -1.0;"),
        ({"rope_precision": "fp32"}, ValueError, "rope_precision must be one of ('model', 'bfloat16', 'float32',"),
        ({"position_policy": "packed"}, ValueError, "position_policy must be one of ('continuous', 'reset'), got"),
        ({"pattern": "causal"}, ValueError, "pattern must be one of ('full', 'intra_doc', 'anchor'), got 'causal';"),
        ({"engine": "flash"}, ValueError, "engine must be one of ('auto', 'reference', 'flex', 'varlen')"),
        ({"sliding_window": 0}, ValueError, "sliding_window must be at least 1, got 0;"),
        ({"softcap": 0.0}, ValueError, "softcap must be above 0 and finite, got 0.0;"),
        ({"scale": float("inf")}, ValueError, "scale must be above 0 and finite, got inf;"),
        ({"dropout": 1.0}, ValueError, "dropout must lie in [0, 1), got 1.0;"),
    ],
)
def test_options_without_meaning_are_refused_at_the_start(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        AnchorAttention(**{"hidden_size": 32, "num_heads": 4, **options})


ROTARY = rotary_table(LAYOUT.position_ids(), inverse_frequencies(8, 1e4), "exact", torch.float32)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"hidden_states": torch.zeros(2, 15, 31)}, ValueError,
            "hidden_states must have shape [B, S, 32], got [2, 15, 31];",
        ),
        ({"hidden_states": torch.zeros(15, 32)}, ValueError, "hidden_states must have shape [B, S, 32], got [15, 32];"),
        ({"document_ids": [[0, 1]]}, TypeError, "document_ids must be a torch tensor, got list;"),
        (
            {"document_ids": LAYOUT.document_ids * 2}, ValueError,
            "document_ids must number documents 1, 2, 3, … by first appearance, got 2",
        ),
        (
            {"document_ids": PackedLayout.from_lengths([[14]])}, ValueError,
            "document_ids must have the shape of hidden_states [2, 15], got [1, 15];",
        ),
        (
            {"document_ids": LAYOUT.to("meta")}, ValueError,
            "document_ids must be on the device of hidden_states, cpu, got a layout on meta; move it once a batch with "
            "layout.to(device).",
        ),
        (
            {"document_ids": PackedLayout.from_lengths([[8, 7], [15]], anchor_tokens=0)}, ValueError,
            "pattern='anchor' must have an anchor to show, got a layout with anchor_tokens=0;",
        ),
        ({"position_ids": [0]}, TypeError, "position_ids must be a torch tensor, got list;"),
        (
            {"position_ids": torch.zeros(2, 14).long()}, ValueError,
            "position_ids must have shape [2, 15], [1, 15] or [15], got [2, 14];",
        ),
        (
            {"position_ids": LAYOUT.position_ids().to("meta")}, ValueError,
            "position_ids must be on the device of hidden_states, cpu, got meta;",
        ),
        ({"position_ids": torch.zeros(15)}, TypeError, "position_ids must hold integers, got torch.float32;"),
        (
            {"position_ids": torch.arange(15), "rotary": ROTARY}, ValueError,
            "position_ids must be left out beside rotary, got [15];",
        ),
        (
            {"rotary": tuple(part.bfloat16() for part in ROTARY)}, ValueError,
            "cos and sin must be of precision='exact', got torch.bfloat16 and torch.bfloat16;",
        ),
    ],
)  # fmt: skip
def test_calls_that_do_not_fit_are_refused_with_what_to_do(arguments, error, message):
    given = {"hidden_states": random_hidden(), "document_ids": LAYOUT, **arguments}
    with pytest.raises(error, match=re.escape(message)):
        create_attention()(**given)


def test_positions_beside_no_rope_are_refused():
    with pytest.raises(ValueError, match=r"^position_ids must be left out beside rope_theta=None, got \[15\];"):
        create_attention(rope_theta=None)(random_hidden(), LAYOUT, torch.arange(15))
