"""`wrap(rope_precision=…)`: packed forwards rotate in the stated precision, and all else stays as it was."""

import copy
import re
from unittest import mock

import pytest
import torch
from families import state_of, tiny_model
from test_wrap import LAYOUT, TOKENS, logits_of

from anchor_attn import unwrap, wrap
from anchor_attn.hf import forward
from anchor_attn.rope import extend
from anchor_attn.rope.precision import ROPE_PRECISIONS

CORE = ("llama", "gemma3_text", "gpt_neox", "gpt_oss", "cohere2", "deepseek_v2", "deepseek_v3", "phi", "olmo2", "glm4")
STATED = ("bfloat16", "float32", "exact")

every_family = pytest.mark.parametrize("family", CORE)
every_stated_precision = pytest.mark.parametrize("precision", STATED)


def shift_of_logits(model, shift):
    """How far logits move when all positions do, relative to the largest: rounding alone, RoPE being relative."""
    positions = LAYOUT.position_ids()
    near, far = (
        logits_of(model, document_ids=LAYOUT, position_ids=positions + moved)[LAYOUT.document_ids >= 0]
        for moved in (0, shift)
    )
    return float((near - far).abs().max() / near.abs().max())


def queries_of(model, **inputs):
    """What each layer hands to `anchor_attention`: query, key and value."""
    with mock.patch.object(forward, "anchor_attention", wraps=forward.anchor_attention) as attend:
        logits_of(model, document_ids=LAYOUT, **inputs)
    return [call.args[:3] for call in attend.call_args_list]


# --- the precision ---------------------------------------------------------------------------------------------------


# The tiny GPT-NeoX rotates one pair, by the frequency 1: float32 holds its angles exactly.
@pytest.mark.parametrize("family", [name for name in CORE if name != "gpt_neox"])
def test_at_position_four_million_exact_is_as_good_as_at_zero_and_the_models_own_is_not(family):
    plain = tiny_model(family, torch.float32)
    own = shift_of_logits(wrap(copy.deepcopy(plain)), 4_000_000)
    exact = shift_of_logits(wrap(plain, rope_precision="exact"), 4_000_000)

    assert exact < 2e-4
    assert own > 20 * exact


@every_family
@every_stated_precision
def test_a_packed_forward_in_bfloat16_attends_in_bfloat16(family, precision):
    model = wrap(tiny_model(family, torch.bfloat16), rope_precision=precision)

    assert {part.dtype for states in queries_of(model) for part in states} == {torch.bfloat16}


def test_bfloat16_rounds_queries_and_keys_of_a_float32_model():
    model = tiny_model("llama", torch.float32)
    for precision, rounds in (("bfloat16", True), ("float32", False)):
        for query, key, value in queries_of(wrap(model, rope_precision=precision)):
            assert query.dtype == key.dtype == torch.float32
            assert all(torch.equal(part, part.bfloat16().float()) == rounds for part in (query, key))
            assert not torch.equal(value, value.bfloat16().float())


@every_family
def test_at_short_positions_every_precision_computes_the_same_in_float32(family):
    plain = tiny_model(family, torch.float32)
    expected = logits_of(wrap(copy.deepcopy(plain)), document_ids=LAYOUT)
    for precision in ("float32", "exact"):
        logits = logits_of(wrap(copy.deepcopy(plain), rope_precision=precision), document_ids=LAYOUT)
        torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@every_stated_precision
def test_frequencies_that_a_cast_rounded_are_computed_anew(precision):
    """`.to(torch.bfloat16)` rounds the rotary module's buffer too, and going back does not bring it back."""
    model, rounded = tiny_model("llama", torch.float32), tiny_model("llama", torch.float32)
    rounded.model.rotary_emb.inv_freq.copy_(rounded.model.rotary_emb.inv_freq.bfloat16().float())
    positions = LAYOUT.position_ids() + 999
    one, two = (
        logits_of(wrap(part, rope_precision=precision), document_ids=LAYOUT, position_ids=positions)
        for part in (model, rounded)
    )

    assert torch.equal(one, two)


def test_under_autocast_exact_rotates_in_float32():
    model = wrap(tiny_model("llama", torch.float32), rope_precision="exact")
    with torch.autocast("cpu", torch.bfloat16):
        moved = shift_of_logits(model, 4_000_000)
        parts = queries_of(model)

    assert {part.dtype for states in parts for part in states} == {torch.bfloat16}
    assert moved < 0.02


@every_stated_precision
def test_a_packed_forward_under_dynamic_ntk_forgets_longer_ones_and_the_models_own_does_not(precision):
    plain = extend(tiny_model("llama", torch.float32, max_position_embeddings=8), "dynamic", 4)
    model, own = wrap(copy.deepcopy(plain), rope_precision=precision), wrap(plain)
    long = {"document_ids": LAYOUT, "position_ids": LAYOUT.position_ids() + 500}
    before, own_before = (logits_of(part, document_ids=LAYOUT) for part in (model, own))
    assert LAYOUT.seq_len > 8
    for part in (model, own):
        logits_of(part, **long)

    assert torch.equal(logits_of(model, document_ids=LAYOUT), before)
    assert not torch.allclose(logits_of(own, document_ids=LAYOUT), own_before, atol=1e-3)


# --- all else --------------------------------------------------------------------------------------------------------


@every_family
@every_stated_precision
def test_without_document_ids_outputs_equal_the_plain_model_bit_for_bit(family, precision):
    plain = tiny_model(family, torch.bfloat16)
    wrapped = wrap(copy.deepcopy(plain), rope_precision=precision)
    logits_of(wrapped, document_ids=LAYOUT)

    assert torch.equal(logits_of(wrapped), logits_of(plain))
    prompt = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones(2, 6)}
    assert torch.equal(wrapped.generate(TOKENS[:, :6], **prompt), plain.generate(TOKENS[:, :6], **prompt))


@every_stated_precision
def test_unwrapping_and_wrapping_again_take_the_precision_off(precision):
    plain = tiny_model("gemma3_text", torch.float32)
    before, expected = state_of(plain), logits_of(wrap(copy.deepcopy(plain)), document_ids=LAYOUT)
    wrap(plain, rope_precision=precision)
    wrap(plain)

    assert torch.equal(logits_of(plain, document_ids=LAYOUT), expected)
    assert state_of(unwrap(plain)) == before


def test_a_deep_copy_keeps_its_precision_and_its_own_tables():
    model = wrap(tiny_model("llama", torch.float32), rope_precision="exact")
    twin = copy.deepcopy(model)
    unwrap(model)

    assert shift_of_logits(twin, 4_000_000) < 2e-4


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_rotates_alike_when_it_computes_again(reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = wrap(tiny_model("llama", torch.float32), rope_precision="exact").train()
        if checkpointing:
            name = "activation_checkpointing_enable"
            getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")(
                {"use_reentrant": reentrant}
            )
        model(input_ids=TOKENS, labels=TOKENS, document_ids=LAYOUT).loss.backward()
        gradients.append([part.grad for part in model.parameters()])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@every_stated_precision
def test_compiled_it_rotates_as_it_does_eagerly(precision):
    torch._dynamo.reset()
    model = wrap(tiny_model("llama", torch.bfloat16), rope_precision=precision)
    eager = queries_of(model, position_ids=LAYOUT.position_ids() + 99_999)
    model.compile(backend="aot_eager")
    compiled = queries_of(model, position_ids=LAYOUT.position_ids() + 99_999)

    assert all(
        torch.equal(one, two) for pair in zip(eager, compiled, strict=True) for one, two in zip(*pair, strict=True)
    )


# --- bad input -------------------------------------------------------------------------------------------------------


def test_an_unknown_precision_is_refused():
    message = f"rope_precision must be one of {ROPE_PRECISIONS}, got 'fp32'; pass one of them."
    with pytest.raises(ValueError, match=re.escape(message)):
        wrap(tiny_model("llama"), rope_precision="fp32")


def test_a_model_whose_rotary_module_is_of_another_make_is_refused_and_left_as_it_was():
    model = tiny_model("llama", torch.float32)

    class OwnRotaryEmbedding(type(model.model.rotary_emb)):
        def forward(self, x, position_ids):
            return tuple(-part for part in super().forward(x, position_ids))

    model.model.rotary_emb = OwnRotaryEmbedding(model.config)
    before = state_of(model)
    with pytest.raises(ValueError, match=r"^model must have rotary modules as transformers writes them"):
        wrap(model, rope_precision="exact")

    assert state_of(model) == before
