"""RoPE at a stated precision against float64, against transformers' Llama, and compiled."""

import math
import re
from unittest import mock

import pytest
import torch
from hypothesis import given
from strategies import layouts, quick
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from anchor_attn import PackedLayout
from anchor_attn.rope import (
    ROPE_PRECISIONS,
    apply_rotary,
    inverse_frequencies,
    packed_rotary_table,
    precision,
    rotary_table,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
THETAS = (1e4, 5e5, 1e6, 1e7, 5e7)
SHIFTS = (16, 1_000, 30_000, 130_000, 1_000_000, 4_000_000)
PROMISED = ("bfloat16", "float32", "exact")

every_precision = pytest.mark.parametrize("policy", ROPE_PRECISIONS)
every_promise = pytest.mark.parametrize("policy", PROMISED)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_pairing = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
# torch 2.13's compiler trips over torch's own deprecations when it is imported.
compiles = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")


def random_states(dtype=torch.float32, head_dim=64, seq_len=96, heads=3, rows=2):
    """[B, H, S, D], seen through a transpose as projections leave them, the same each time."""
    torch.manual_seed(0)
    return torch.randn(rows, seq_len, heads, head_dim).to(dtype).transpose(1, 2)


def positions(seq_len=96, shift=0, rows=2):
    """int64 [B, S], rows that differ."""
    return torch.arange(seq_len) + shift + 7 * torch.arange(rows)[:, None]


def rotated(states, position_ids, inv_freq, policy, interleaved=False, attention_factor=1.0):
    """Table and rotation at once, the table in the dtype of the states."""
    cos, sin = rotary_table(position_ids, inv_freq, policy, states.dtype, attention_factor)
    return apply_rotary(states, cos, sin, policy, interleaved)


def rotated_in_float64(states, position_ids, inv_freq, interleaved=False, attention_factor=1.0):
    """The oracle: pairs as complex numbers, times e^(i · position · frequency)."""
    states, turned = states.double(), 2 * len(inv_freq)
    turn = torch.polar(
        torch.tensor(attention_factor, dtype=torch.float64), position_ids.double()[..., None] * inv_freq.double()
    )[:, None]
    if interleaved:
        pairs = turn * torch.view_as_complex(states[..., :turned].unflatten(-1, (-1, 2)).contiguous())
        out = torch.view_as_real(pairs).flatten(-2)
    else:
        pairs = turn * torch.complex(*states[..., :turned].chunk(2, dim=-1))
        out = torch.cat((pairs.real, pairs.imag), dim=-1)
    return torch.cat((out, states[..., turned:]), dim=-1)


def pair_lengths(states, pairs, interleaved):
    """The length of the pair that each number belongs to; its own size where it belongs to none. [B, H, S, D]."""
    inv_freq = torch.zeros(pairs)
    x = rotated_in_float64(states, torch.zeros(1, states.shape[2]), inv_freq, interleaved)
    y = rotated_in_float64(states, torch.full((1, states.shape[2]), math.pi / 2), inv_freq + 1, interleaved)
    rest = torch.arange(states.shape[-1]) >= 2 * pairs
    return torch.hypot(x, y).where(~rest, x.abs())


def llama(theta=10_000.0, head_dim=64, **rope):
    """transformers' rotary module of one Llama."""
    parameters = {"rope_type": "default", "rope_theta": theta, **rope}
    return LlamaRotaryEmbedding(
        LlamaConfig(hidden_size=4 * head_dim, num_attention_heads=4, rope_parameters=parameters)
    )


# --- frequencies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("theta", THETAS)
@pytest.mark.parametrize("head_dim", [2, 20, 64, 128, 256])
def test_frequencies_equal_transformers_bit_for_bit(theta, head_dim):
    ours = inverse_frequencies(head_dim, theta)

    assert ours.dtype == torch.float32
    assert torch.equal(ours, llama(theta, head_dim).inv_freq)


def test_frequencies_are_powers_of_theta():
    torch.testing.assert_close(inverse_frequencies(4, 10_000), torch.tensor([1.0, 0.01]), rtol=0, atol=1e-9)
    torch.testing.assert_close(inverse_frequencies(6, 1e6), torch.tensor([1.0, 1e-2, 1e-4]), rtol=1e-6, atol=0)


def test_frequencies_lie_on_the_host_whatever_the_default_device_is():
    with torch.device("meta"):
        ours = inverse_frequencies(64, 10_000)

    assert torch.equal(ours, inverse_frequencies(64, 10_000))


# --- tables ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("theta", THETAS)
@pytest.mark.parametrize("shift", [0, 131_072, 4_000_000, 2**29 - 200])
def test_the_exact_table_is_the_float64_one_rounded_once(theta, shift):
    inv_freq = inverse_frequencies(32, theta)
    cos, sin = rotary_table(positions(shift=shift), inv_freq, "exact", torch.bfloat16)
    angles = [
        [position * frequency for frequency in inv_freq.tolist()] for position in positions(shift=shift)[1].tolist()
    ]

    assert cos.dtype == sin.dtype == torch.float32
    for ours, function in ((cos, math.cos), (sin, math.sin)):
        right = torch.tensor([[function(angle) for angle in row] for row in angles], dtype=torch.float64)
        assert torch.equal(ours[1], right.float())


def test_float32_angles_err_with_the_position_and_exact_ones_do_not():
    inv_freq = inverse_frequencies(128, 10_000)
    for shift in (0, *SHIFTS):
        right = rotary_table(positions(shift=shift), inv_freq, "exact", torch.float64).cos
        exact, float32 = (
            (rotary_table(positions(shift=shift), inv_freq, policy, torch.float32).cos - right).abs().max()
            for policy in ("exact", "float32")
        )
        assert exact <= 2**-25
        assert shift * 2**-27 <= float32 <= (shift + 103) * 2**-24 + 2**-23


@every_dtype
@pytest.mark.parametrize(
    ("policy", "stated"),
    [
        ("model", {}),
        ("bfloat16", dict.fromkeys(DTYPES, torch.bfloat16)),
        ("float32", dict.fromkeys(DTYPES, torch.float32)),
        ("exact", {**dict.fromkeys(DTYPES, torch.float32), torch.float64: torch.float64}),
    ],
)
def test_the_table_has_the_stated_dtype_and_no_gradient(policy, stated, dtype):
    inv_freq = inverse_frequencies(8, 10_000).requires_grad_()
    for part in rotary_table(positions(), inv_freq, policy, dtype):
        assert part.dtype == stated.get(dtype, dtype)
        assert not part.requires_grad


@every_precision
def test_autocast_and_the_dtype_of_positions_leave_the_table_alone(policy):
    inv_freq = inverse_frequencies(64, 1e6)
    plain = rotary_table(positions(shift=100_000), inv_freq, policy, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = rotary_table(positions(shift=100_000).int(), inv_freq, policy, torch.float32)

    for part, other in zip(plain, under_autocast, strict=True):
        assert part.dtype == other.dtype
        assert torch.equal(part, other)


def test_a_device_without_float64_gets_its_exact_table_from_the_host():
    assert precision.float64_device(torch.device("mps")) == torch.device("cpu")
    assert precision.float64_device(torch.device("cuda", 1)) == torch.device("cuda", 1)
    inv_freq = inverse_frequencies(8, 10_000)
    with mock.patch.object(precision, "float64_device", return_value=torch.device("meta")):
        rotary_table(positions(), inv_freq, "float32", torch.float32)
        with pytest.raises(NotImplementedError, match="meta tensor"):  # it was made there, and asked back
            rotary_table(positions(), inv_freq, "exact", torch.float32)


@quick
@given(layouts())
def test_the_table_of_a_packed_batch_is_the_table_of_its_positions(layout):
    inv_freq = inverse_frequencies(6, 10_000)
    real = layout.document_ids != -1
    for policy in ("continuous", "reset"):
        packed = packed_rotary_table(layout, inv_freq, "float32", torch.float32, position_policy=policy)
        plain = rotary_table(layout.position_ids(policy), inv_freq, "float32", torch.float32)
        for part, other in zip(packed, plain, strict=True):
            assert torch.equal(part.expand_as(other)[real], other[real])


def test_layers_share_a_table_and_settings_do_not():
    layout = PackedLayout.from_lengths([[5, 3]])
    settings = {
        "inv_freq": (inverse_frequencies(8, 1e4), inverse_frequencies(8, 1e6), inverse_frequencies(8, 1e4) / 2),
        "precision": ("exact", "float32", "bfloat16", "model"),
        "dtype": (torch.float32, torch.float64),
        "attention_factor": (1.0, 1.2),
        "position_policy": ("continuous", "reset"),
    }
    first = {name: values[0] for name, values in settings.items()}
    table = packed_rotary_table(layout, **first)

    assert packed_rotary_table(layout, **{**first, "inv_freq": inverse_frequencies(8, 1e4)}) is table
    for name, values in settings.items():
        for value in values[1:]:
            assert packed_rotary_table(layout, **{**first, name: value}) is not table


def test_two_thetas_in_one_process_differ():
    layout = PackedLayout.from_lengths([[90]])
    states = random_states(seq_len=91, rows=1)
    outs = []
    for theta in (1e4, 5e7, 1e4):
        table = packed_rotary_table(layout, inverse_frequencies(64, theta), "exact", torch.float32)
        outs.append(apply_rotary(states, *table, "exact"))

    assert (outs[0] - outs[1]).abs().max() > 1
    assert torch.equal(outs[0], outs[2])


# --- rotation --------------------------------------------------------------------------------------------------------


@every_precision
@every_dtype
@every_pairing
@pytest.mark.parametrize(("rotary_dim", "attention_factor"), [(64, 1.0), (16, 1.0), (64, 1.2773)])
def test_rotations_equal_float64_to_the_stated_precision(policy, dtype, interleaved, rotary_dim, attention_factor):
    states, inv_freq = random_states(dtype), inverse_frequencies(rotary_dim, 10_000)
    ours = rotated(states, positions(), inv_freq, policy, interleaved, attention_factor)
    right = rotated_in_float64(states, positions(), inv_freq, interleaved, attention_factor)
    lengths = pair_lengths(states, rotary_dim // 2, interleaved) * attention_factor
    stated = {"model": dtype, "bfloat16": torch.bfloat16}.get(policy, torch.float64)
    angles = 0 if (policy, dtype) == ("exact", torch.float64) else 200 * 2**-24  # positions below 200
    errors = (ours.double() - right).abs()

    assert ours.dtype == dtype
    last = 0.5 * torch.finfo(dtype).eps * right.abs()  # the cast of the result
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert (errors <= last + (2.5 * torch.finfo(stated).eps + angles + 1e-15) * lengths + smallest).all()
    if policy == "bfloat16" and dtype != torch.bfloat16:
        assert errors.max() > torch.finfo(torch.bfloat16).eps / 8  # rounded on purpose


@pytest.mark.parametrize("theta", THETAS)
@pytest.mark.parametrize("shift", [0, 4_000_000])
def test_exact_rotation_is_right_to_half_an_ulp_anywhere(theta, shift):
    states, inv_freq = random_states(torch.bfloat16), inverse_frequencies(64, theta)
    ours = rotated(states, positions(shift=shift), inv_freq, "exact").double()
    right = rotated_in_float64(states, positions(shift=shift), inv_freq)

    half_an_ulp = torch.finfo(torch.bfloat16).eps / 2 * right.abs()
    assert ((ours - right).abs() <= half_an_ulp + 2**-22 * pair_lengths(states, 32, False)).all()


@every_dtype
@pytest.mark.parametrize("theta", THETAS)
def test_model_precision_equals_transformers_llama_bit_for_bit(dtype, theta):
    query, key = random_states(dtype), random_states(dtype, heads=1) / 3
    position_ids = positions(shift=60_000)
    expected = apply_rotary_pos_emb(query, key, *llama(theta)(query, position_ids))

    for states, right in zip((query, key), expected, strict=True):
        assert torch.equal(rotated(states, position_ids, inverse_frequencies(64, theta), "model"), right)


def test_model_precision_equals_transformers_yarn_bit_for_bit():
    yarn = llama(factor=4.0, rope_type="yarn", original_max_position_embeddings=64)
    assert yarn.attention_scaling > 1.1
    query = random_states(torch.bfloat16)
    expected, _ = apply_rotary_pos_emb(query, query, *yarn(query, positions()))

    assert torch.equal(
        rotated(query, positions(), yarn.inv_freq, "model", attention_factor=yarn.attention_scaling), expected
    )


@every_pairing
def test_policies_that_round_alike_are_equal_bit_for_bit(interleaved):
    inv_freq = inverse_frequencies(64, 10_000)

    def out(policy, dtype):
        states = random_states(torch.bfloat16).to(dtype)
        return rotated(states, positions(shift=1_000), inv_freq, policy, interleaved)

    assert torch.equal(out("bfloat16", torch.bfloat16), out("model", torch.bfloat16))
    assert torch.equal(out("bfloat16", torch.float32), out("model", torch.bfloat16).float())
    assert torch.equal(out("float32", torch.float32), out("model", torch.float32))
    assert torch.equal(out("float32", torch.float64), out("model", torch.float64))
    assert torch.equal(out("float32", torch.bfloat16), out("float32", torch.float32).bfloat16())
    assert torch.equal(out("exact", torch.bfloat16), out("exact", torch.float32).bfloat16())
    assert not torch.equal(out("bfloat16", torch.bfloat16), out("float32", torch.bfloat16))
    assert not torch.equal(out("exact", torch.float32), out("float32", torch.float32))


def test_bfloat16_rounds_query_and_key_before_they_are_rotated():
    states, inv_freq = random_states(), inverse_frequencies(32, 10_000)
    ours = rotated(states, positions(), inv_freq, "bfloat16")

    assert ours.dtype == torch.float32
    assert torch.equal(ours, ours.bfloat16().float())
    assert torch.equal(ours, rotated(states.bfloat16().float(), positions(), inv_freq, "bfloat16"))
    assert torch.equal(ours[..., 32:], states[..., 32:].bfloat16().float())


@every_precision
def test_interleaved_pairs_are_halves_in_another_order(policy):
    states, inv_freq = random_states(head_dim=24), inverse_frequencies(16, 10_000)
    order = torch.cat((torch.arange(0, 16, 2), torch.arange(1, 16, 2), torch.arange(16, 24)))
    interleaved = rotated(states, positions(), inv_freq, policy, interleaved=True)

    assert torch.equal(interleaved[..., order], rotated(states[..., order], positions(), inv_freq, policy))


@every_precision
@every_pairing
def test_a_rotated_head_keeps_its_order_of_strides(policy, interleaved):
    seen_through_a_transpose = random_states(torch.bfloat16)
    for states in (seen_through_a_transpose, seen_through_a_transpose.contiguous()):
        out = rotated(states, positions(), inverse_frequencies(64, 10_000), policy, interleaved)
        assert out.stride() == states.stride()


@every_pairing
def test_gradients_are_those_of_the_definition(interleaved):
    states = random_states(torch.float64, head_dim=6, seq_len=4, heads=1).requires_grad_()
    table = rotary_table(positions(4), inverse_frequencies(4, 100), "exact", torch.float64)

    assert torch.autograd.gradcheck(lambda x: apply_rotary(x, *table, "exact", interleaved), states)


# --- drift -----------------------------------------------------------------------------------------------------------

# Measured over 2,048 × 2,048 scores, size 128, base 1e4: mean |score at shift - score at 0| for each of SHIFTS.
DRIFT = {
    ("model", torch.bfloat16): (4.2e-3, 4.3e-3, 4.3e-3, 4.4e-3, 7.2e-3, 2.3e-2),
    ("bfloat16", torch.float32): (4.2e-3, 4.3e-3, 4.3e-3, 4.4e-3, 7.2e-3, 2.3e-2),
    ("float32", torch.bfloat16): (2.6e-3, 2.6e-3, 2.6e-3, 2.7e-3, 6.3e-3, 2.3e-2),
    ("exact", torch.bfloat16): (2.6e-3,) * 6,
    ("float32", torch.float32): (9.8e-6, 1.4e-5, 1.8e-4, 7.3e-4, 5.7e-3, 2.3e-2),
    ("exact", torch.float64): (4e-16,) * 6,
}


def scores_at(shift, policy, dtype, rotate=rotated):
    """q·k/√D of random bfloat16 numbers in `dtype`, all positions moved by `shift`; [2048, 2048]."""
    torch.manual_seed(0)
    query, key = (torch.randn(1, 1, 2048, 128).bfloat16().to(dtype) for _ in range(2))
    position_ids, inv_freq = torch.arange(2048)[None] + shift, inverse_frequencies(128, 10_000)
    query, key = (rotate(states, position_ids, inv_freq, policy)[0, 0] for states in (query, key))
    accumulated = torch.promote_types(dtype, torch.float32)
    return query.to(accumulated) @ key.to(accumulated).T / math.sqrt(128)


@pytest.mark.parametrize(("policy", "dtype"), DRIFT, ids=lambda value: str(value).removeprefix("torch."))
def test_scores_drift_with_the_position_as_measured(policy, dtype):
    at_zero = scores_at(0, policy, dtype)
    drift = [float((scores_at(shift, policy, dtype) - at_zero).abs().mean()) for shift in SHIFTS]

    assert drift == pytest.approx(DRIFT[policy, dtype], rel=0.1)


@pytest.mark.parametrize(
    ("dtype", "most", "within"),
    # Without the cast what is left is the rounding of the products, and of their sums in whatever order BLAS has.
    [(torch.bfloat16, 2.7e-3, 0.02), (torch.float32, 2.5e-7, 0.15)],
    ids=["cast", "not cast"],
)
def test_exact_scores_drift_no_more_at_a_million_than_at_a_thousand(dtype, most, within):
    at_zero = scores_at(0, "exact", dtype)
    near, *far = (
        float((scores_at(shift, "exact", dtype) - at_zero).abs().mean()) for shift in (1_000, 1_000_000, 4_000_000)
    )

    assert near < most
    assert far == pytest.approx([near, near], rel=within)


# --- compiled --------------------------------------------------------------------------------------------------------


def produce_and_rotate(states, factor, position_ids, inv_freq, policy, interleaved=False):
    """A rotation behind a product that a compiler would fuse with it, in front of a sum likewise."""
    cos, sin = rotary_table(position_ids, inv_freq, policy, states.dtype)
    out = apply_rotary(states * factor, cos, sin, policy, interleaved)
    return out, out.float() + 1


def outputs_and_gradient(function, states, *args):
    leaf = states.detach().clone().requires_grad_()
    out, plus_one = function(leaf, *args)
    torch.manual_seed(1)
    gradient = torch.autograd.grad((out * torch.randn(out.shape).to(out.dtype)).sum(), leaf)[0]
    return out.detach(), plus_one.detach(), gradient


def assert_compiled_equals_eager(backend, policy, dtype, interleaved, dynamic=None):
    args = random_states(dtype), random_states(dtype, heads=1), positions(), inverse_frequencies(32, 10_000)
    torch.compiler.reset()
    compiled = torch.compile(produce_and_rotate, backend=backend, fullgraph=True, dynamic=dynamic)
    ours = outputs_and_gradient(compiled, *args, policy, interleaved)
    eager = outputs_and_gradient(produce_and_rotate, *args, policy, interleaved)

    for part, other in zip(ours, eager, strict=True):
        assert part.dtype == other.dtype
        assert torch.equal(part, other)


@compiles
@every_precision
@every_pairing
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rotations_compile_into_one_graph_with_the_same_gradients(policy, interleaved, dtype):
    assert_compiled_equals_eager("aot_eager", policy, dtype, interleaved)


@compiles
@pytest.mark.slow
@every_promise
@every_pairing
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_inductor_keeps_the_stated_precision_to_the_bit(policy, interleaved, dtype):
    assert_compiled_equals_eager("inductor", policy, dtype, interleaved)


@compiles
@pytest.mark.slow
@every_promise
def test_inductor_leaves_the_drift_as_it_is(policy):
    torch.compiler.reset()
    compiled = torch.compile(rotated, fullgraph=True)
    dtype = torch.float32 if policy == "bfloat16" else torch.bfloat16
    for shift in (30_000, 4_000_000):
        drifts = [
            float((scores_at(shift, policy, dtype, rotate) - scores_at(0, policy, dtype, rotate)).abs().mean())
            for rotate in (compiled, rotated)
        ]
        assert drifts[0] == pytest.approx(drifts[1], rel=0.1)


@every_promise
@every_pairing
def test_the_operators_keep_torchs_own_rules(policy, interleaved):
    states = random_states(torch.bfloat16, head_dim=12, seq_len=5).requires_grad_()
    arguments = positions(5), inverse_frequencies(8, 10_000), policy, states.dtype, 1.2
    torch.library.opcheck(precision._compiled_table, arguments)
    table = rotary_table(*arguments)
    torch.library.opcheck(precision._compiled_rotation, (states, *table, policy, interleaved))


# --- errors ----------------------------------------------------------------------------------------------------------

FREQUENCIES = inverse_frequencies(8, 10_000)
STATES = torch.zeros(2, 1, 96, 8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: inverse_frequencies(7, 1e4), ValueError, "rotary_dim must be even and at least 2, got 7;"),
        (lambda: inverse_frequencies(0, 1e4), ValueError, "rotary_dim must be even and at least 2, got 0;"),
        (lambda: inverse_frequencies(8.0, 1e4), TypeError, "rotary_dim must be an integer, got 8.0;"),
        (lambda: inverse_frequencies(8, 0), ValueError, "theta must be above 0 and finite, got 0;"),
        (lambda: inverse_frequencies(8, math.nan), ValueError, "theta must be above 0 and finite, got nan;"),
        (
            lambda: rotary_table(positions(), FREQUENCIES, "float16", torch.float32), ValueError,
            "rope_precision must be one of ('model', 'bfloat16', 'float32', 'exact'), got 'float16';",
        ),
        (
            lambda: rotary_table(positions().float(), FREQUENCIES, "exact", torch.float32), TypeError,
            "position_ids must hold integers, got torch.float32;",
        ),
        (
            lambda: rotary_table(positions(), FREQUENCIES.bfloat16(), "exact", torch.float32), TypeError,
            "inv_freq must be float32, got torch.bfloat16; compute it anew, with inverse_frequencies,",
        ),
        (
            lambda: rotary_table(positions(), FREQUENCIES[None], "exact", torch.float32), ValueError,
            "inv_freq must have shape [R/2], got [1, 4];",
        ),
        (
            lambda: rotary_table(positions(), FREQUENCIES, "model", torch.int64), TypeError,
            "dtype must be floating, got torch.int64;",
        ),
        (
            lambda: packed_rotary_table(
                PackedLayout.from_lengths([[3]]), FREQUENCIES, "exact", torch.float32, position_policy="copied"
            ),
            ValueError, "position_policy must be one of ('continuous', 'reset'), got 'copied';",
        ),
        (
            lambda: apply_rotary(STATES, *rotary_table(positions(), FREQUENCIES, "bfloat16", torch.float32), "exact"),
            ValueError, "cos and sin must be of precision='exact', got torch.bfloat16 and torch.bfloat16;",
        ),
        (
            lambda: apply_rotary(STATES, *rotary_table(positions(), FREQUENCIES, "exact", torch.float32), "bfloat16"),
            ValueError, "cos and sin must be of precision='bfloat16', got torch.float32 and torch.float32;",
        ),
        (
            lambda: apply_rotary(STATES, *rotary_table(positions(95), FREQUENCIES, "exact", torch.float32), "exact"),
            ValueError, "cos and sin must be [B, S, R/2] with R at most D for states [2, 1, 96, 8], got [2, 95, 4] and",
        ),
        (
            lambda: apply_rotary(
                STATES[..., :6], *rotary_table(positions(), FREQUENCIES, "exact", torch.float32), "exact"
            ),
            ValueError, "with R at most D for states [2, 1, 96, 6], got [2, 96, 4] and",
        ),
        (
            lambda: apply_rotary(STATES[0], *rotary_table(positions(), FREQUENCIES, "exact", torch.float32), "exact"),
            ValueError, "states must be floating [B, H, S, D], got torch.float32 [1, 96, 8];",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_named_with_what_to_do(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()
