"""What `wrap` refuses, nothing half changed, and what else it takes: models without a head, other precisions."""

import re
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import transformers
from families import SIZES, VOCAB_SIZE, state_of, tiny_config, tiny_model
from refused import OTHERS, REFUSED, WITH_A_DECODER, model_with_images, other_model, refused_model
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from anchor_attn import PackedLayout, unwrap, wrap
from anchor_attn.attention import anchor_attention
from anchor_attn.hf import forward, proof, wrapping

LAYOUT = PackedLayout.from_lengths([[7, 5, 1], [4, 6]], seq_len=15)
TOKENS = torch.randint(3, VOCAB_SIZE, LAYOUT.document_ids.shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def plain():
    """A llama of two layers, float32, eval mode."""
    return tiny_model("llama", torch.float32)


@pytest.fixture
def wrapped(plain):
    """The same, wrapped with the anchor pattern."""
    return wrap(plain)


def logits_of(model, **inputs):
    with torch.no_grad():
        return model(input_ids=TOKENS, **inputs).logits


# --- what wrap refuses -----------------------------------------------------------------------------------------------


def assert_refused(model, message):
    """One line with the reason, and the model is as it was."""
    before, training = state_of(model), model.training
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        wrap(model)

    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith("model must ")
    assert state_of(model) == before
    assert model.training == training


@pytest.mark.parametrize("name", REFUSED)
def test_decoders_that_cannot_keep_documents_apart_are_refused(name):
    assert_refused(refused_model(name), REFUSED[name][2])


@pytest.mark.parametrize("name", OTHERS)
def test_encoders_and_models_with_other_inputs_are_refused(name):
    assert_refused(other_model(name), OTHERS[name])


def test_an_encoder_with_its_weights_is_refused_for_attending_both_ways():
    sizes = {**SIZES, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 4}
    encoder = transformers.ModernBertForMaskedLM(transformers.ModernBertConfig(**sizes)).eval()
    assert_refused(encoder, "model must attend causally, got ModernBertForMaskedLM with ModernBertAttention; wrap")


def test_a_decoder_set_to_attend_both_ways_is_refused():
    bidirectional = tiny_model("gemma3_text", use_bidirectional_attention=True)
    assert_refused(bidirectional, "model must attend causally, got Gemma3ForCausalLM set to bidirectional; cha")


@pytest.mark.parametrize("name", WITH_A_DECODER)
@torch.no_grad()
def test_the_text_decoder_of_a_model_with_images_can_be_wrapped_by_itself(name):
    model = model_with_images(name)
    assert_refused(model, "with other inputs; wrap its text decoder by itself, as in wrap(model.get_decoder()).")
    decoder, positions = model.get_decoder(), LAYOUT.position_ids("continuous")
    ones = torch.ones_like(TOKENS)
    expected = {}
    for row, lengths in enumerate(LAYOUT.document_lengths):
        for document in range(1, len(lengths) + 1):
            slots = (LAYOUT.document_ids[row] == document) | (LAYOUT.document_ids[row] == 0)
            inputs = {"input_ids": TOKENS, "position_ids": positions, "attention_mask": ones}
            alone = {key: value[row, slots][None] for key, value in inputs.items()}
            expected[row, document] = decoder(**alone).last_hidden_state[0, 1:]
    wrap(decoder)
    packed = decoder(input_ids=TOKENS, position_ids=positions, document_ids=LAYOUT).last_hidden_state

    for (row, document), states in expected.items():
        own = packed[row, LAYOUT.document_ids[row] == document]
        torch.testing.assert_close(own, states, rtol=0, atol=1e-10 * float(states.abs().max()))


def test_what_is_no_transformers_model_is_refused():
    with pytest.raises(
        TypeError, match=r"^model must be a transformers PreTrainedModel, got Linear; wrap the decoder its"
    ):
        wrap(nn.Linear(2, 2))


def test_a_model_without_its_weights_is_refused():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    with pytest.raises(
        ValueError, match=r"^model must have its weights for the proof, got LlamaForCausalLM on meta; wrap"
    ):
        wrap(model)


def test_a_head_that_answers_per_row_is_refused():
    model = AutoModelForSequenceClassification.from_config(tiny_config("llama"))
    with pytest.raises(
        ValueError,
        match=r"^model must run a forward pass under anchor_attn, got LlamaForSequenceClassification, in which it "
        r"failed with ValueError: its head answers once a row, and rows hold several documents; run it unwrapped",
    ):
        wrap(model)


@pytest.mark.parametrize("strength", [1.0, 0.03])
def test_a_leak_that_no_name_reveals_is_caught_by_the_proof(plain, strength):
    """A causal token shift in one layer, as RWKV or a short convolution has it: its config says plain llama."""

    def add_previous_token(module, args, output):
        return output + strength * F.pad(output, (0, 0, 1, 0))[:, :-1]

    plain.model.layers[1].mlp.register_forward_hook(add_previous_token)
    before = state_of(plain)
    with pytest.raises(
        ValueError, match=r"^model must keep documents apart, got LlamaForCausalLM in which changing one mo"
    ):
        wrap(plain)
    assert state_of(plain) == before


def test_a_layer_without_attention_is_caught_by_the_proof(plain):
    class Mixer(nn.Module):
        def forward(self, hidden_states, **kwargs):
            return torch.zeros_like(hidden_states), None

    plain.model.layers[1].self_attn = Mixer()
    with pytest.raises(
        ValueError, match=r"^model must have softmax attention in all of its 2 layers, got LlamaForCausalLM"
    ):
        wrap(plain)


def test_a_term_of_the_scores_that_no_engine_knows_is_refused(plain, monkeypatch):
    """As T5 and Inkling have it: the layer's own attention names `position_bias`, and ours would drop it."""

    def attention_with_bias(module, query, key, value, attention_mask, scaling, dropout=0.0, position_bias=None):
        raise AssertionError("only its signature is read")

    def add_bias(module, args, kwargs):
        return args, {**kwargs, "position_bias": torch.zeros(())}

    code = transformers.models.llama.modeling_llama
    monkeypatch.setattr(code, "eager_attention_forward", attention_with_bias)
    assert wrapping.is_wrapped(wrap(plain))  # a term that is not given does no harm
    plain.model.layers[1].self_attn.register_forward_pre_hook(add_bias, with_kwargs=True)
    message = "must ask for attention that the engines know, got LlamaForCausalLM with position_bias; wrap"
    assert_refused(unwrap(plain), message)


def test_a_model_that_fails_by_itself_is_not_said_to_ignore_us(plain, monkeypatch):
    monkeypatch.setattr(plain.model.embed_tokens, "forward", mock.Mock(side_effect=RuntimeError("no table\nat all")))
    assert_refused(
        plain,
        "must run a forward pass under anchor_attn, got LlamaForCausalLM, in which it failed with RuntimeError: no t",
    )


@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_a_proof_that_shows_nothing_is_no_proof(plain, value):
    plain.get_input_embeddings().weight.data.fill_(value)
    with pytest.raises(
        ValueError, match=r"^model must answer other tokens with other outputs for the proof, got LlamaForC"
    ):
        wrap(plain)


def test_a_head_that_begins_as_zeros_is_no_obstacle(plain):
    plain.lm_head.weight.data.zero_()

    assert wrapping.is_wrapped(wrap(plain))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pattern": "document"}, "pattern must be one of ('full', 'intra_doc', 'anchor'), got 'document'; pass one"),
        ({"engine": "dense"}, "engine must be one of ('auto', 'reference', 'flex', 'varlen')"),
        ({"rope_precision": "float8"}, "rope_precision must be one of"),
    ],
)
def test_unknown_settings_are_refused_and_leave_a_wrapped_model_wrapped(wrapped, arguments, message):
    before = state_of(wrapped)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        wrap(wrapped, **arguments)

    assert state_of(wrapped) == before


def test_the_proof_runs_without_a_gradient_and_in_eval_mode(plain, monkeypatch):
    seen = []

    def noting(model, input_ids):
        seen.append((model.training, torch.is_grad_enabled()))
        return forward(model, input_ids)

    forward = proof._forward
    monkeypatch.setattr(proof, "_forward", noting)
    wrap(plain.train())

    assert seen == [(False, False)] * 2
    assert plain.training


# --- other models and precisions -------------------------------------------------------------------------------------


def test_a_model_without_a_head_can_be_wrapped():
    model = wrap(AutoModel.from_config(tiny_config("llama")).eval())

    assert model(input_ids=TOKENS, document_ids=LAYOUT).last_hidden_state.shape == (2, 15, SIZES["hidden_size"])


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_bfloat16_models_hand_bfloat16_to_the_attention(monkeypatch, family):
    model = wrap(tiny_model(family, torch.bfloat16))
    seen = set()

    def noting(query, key, value, *args, **kwargs):
        seen.update((query.dtype, key.dtype, value.dtype))
        return anchor_attention(query, key, value, *args, **kwargs)

    monkeypatch.setattr(forward, "anchor_attention", noting)
    logits = logits_of(model, document_ids=LAYOUT)

    assert seen == {torch.bfloat16}
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()


def test_a_rotary_module_in_float32_keeps_the_attention_in_the_models_dtype(monkeypatch):
    model = tiny_model("llama", torch.bfloat16)
    rotary = model.model.rotary_emb
    monkeypatch.setattr(rotary, "forward", lambda x, position_ids, f=rotary.forward: f(x.float(), position_ids))
    wrap(model)
    seen = set()

    def noting(query, key, value, *args, **kwargs):
        seen.update((query.dtype, key.dtype, value.dtype))
        return anchor_attention(query, key, value, *args, **kwargs)

    monkeypatch.setattr(forward, "anchor_attention", noting)
    # A cache would make one tensor of float32 keys and bfloat16 values, and the values float32.
    logits_of(model, document_ids=LAYOUT, use_cache=False)

    assert seen == {torch.bfloat16}


def test_eager_models_still_give_attention_weights_without_document_ids():
    model = tiny_model("llama", torch.float32, attn_implementation="eager")
    before = model(input_ids=TOKENS, output_attentions=True).attentions
    after = wrap(model)(input_ids=TOKENS, output_attentions=True).attentions

    assert len(before) == len(after) == 2
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))
