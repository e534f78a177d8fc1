"""`wrap` and `unwrap`: what they change and leave, what they refuse, and what a wrapped model says to bad input."""

import copy
import gc
import logging
import re
import weakref
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import transformers
from families import VOCAB_SIZE, state_of, tiny_config, tiny_model
from refused import refused_model
from transformers import AutoModelForCausalLM, DynamicCache

from anchor_attn import PackedLayout, attention, unwrap, wrap
from anchor_attn.configs import configs_of
from anchor_attn.engines import choice, reference, varlen
from anchor_attn.hf import forward, settings, wrapping

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


# --- wrapping and unwrapping -----------------------------------------------------------------------------------------


def test_models_of_one_config_keep_their_own_patterns_and_the_third_stays_plain():
    config = tiny_config("llama")
    torch.manual_seed(0)
    first = AutoModelForCausalLM.from_config(config).eval()
    second, third = (type(first)(config).eval() for _ in range(2))
    for other in (second, third):
        other.load_state_dict(first.state_dict())
    # From one config object, as transformers hands it on.
    for model in (first, second, third):
        for module in model.modules():
            for name in configs_of(module):
                setattr(module, name, config)
    before = logits_of(third)
    wrap(first, "anchor")
    wrap(second, "intra_doc", "reference")

    assert torch.equal(logits_of(third), before)
    assert config._attn_implementation == third.config._attn_implementation == "sdpa"
    assert not wrapping.is_wrapped(third)
    assert {settings.pattern for settings in settings.holders(first).values()} == {"anchor"}
    assert {settings.pattern for settings in settings.holders(second).values()} == {"intra_doc"}
    assert {settings.engine for settings in settings.holders(second).values()} == {"reference"}
    anchor, intra_doc = (logits_of(model, document_ids=LAYOUT) for model in (first, second))
    second_documents = LAYOUT.document_ids == 2
    assert (anchor - intra_doc)[second_documents].abs().min() > 0
    assert torch.equal(anchor, logits_of(first, document_ids=LAYOUT))


def test_one_config_serves_all_submodules_of_a_wrapped_model(wrapped):
    configs = {id(config) for module in wrapped.modules() for config in configs_of(module).values()}

    assert configs == {id(wrapped.config)}


def test_unwrap_restores_the_model(plain):
    before, outputs = state_of(plain), logits_of(plain)
    unwrap(wrap(plain))

    assert state_of(plain) == before
    assert torch.equal(logits_of(plain), outputs)
    assert not wrapping.is_wrapped(plain)


def test_unwrap_leaves_other_models_alone(plain):
    before = state_of(plain)

    assert unwrap(plain) is plain
    assert state_of(plain) == before


def test_wrap_and_unwrap_return_the_model(plain):
    assert wrap(plain) is plain
    assert wrapping.is_wrapped(plain)
    assert unwrap(plain) is plain


def test_wrapping_again_changes_the_settings_and_nothing_else(plain):
    before = state_of(plain)
    once = state_of(wrap(plain, "anchor"))
    intra_doc = logits_of(wrap(copy.deepcopy(plain), "intra_doc"), document_ids=LAYOUT)
    wrap(plain, "intra_doc")

    assert state_of(plain) == once
    assert torch.equal(logits_of(plain, document_ids=LAYOUT), intra_doc)
    assert {settings.previous for settings in settings.holders(plain).values()} == {"sdpa"}
    assert state_of(unwrap(plain)) == before


def test_a_model_whose_inside_was_wrapped_first_unwraps_whole(plain):
    before = state_of(plain)
    wrap(plain.model)
    wrap(plain)

    assert state_of(unwrap(plain)) == before


@pytest.mark.parametrize("training", [True, False])
def test_wrapping_leaves_training_flags_weights_and_random_state(plain, training):
    plain.train(training)
    plain.model.layers[0].train(not training)
    flags, weights = state_of(plain)["training"], {name: p.clone() for name, p in plain.named_parameters()}
    random_state = torch.get_rng_state()
    wrap(plain)

    assert state_of(plain)["training"] == flags
    assert all(torch.equal(p, weights[name]) and p.grad is None for name, p in plain.named_parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_wrap_that_fails_leaves_the_model_as_it_was():
    model = refused_model("nemotron").train()
    model.model.layers[0].eval()
    before = state_of(model)
    with pytest.raises(ValueError, match="must keep documents apart"):
        wrap(model)

    assert state_of(model) == before


def test_wrapping_keeps_no_model_alive():
    model = wrap(tiny_model("llama", torch.float32))
    layer = weakref.ref(model.model.layers[0].self_attn)
    del model
    gc.collect()

    assert layer() is None


def test_a_deep_copy_is_wrapped_and_unwraps_by_itself(wrapped):
    twin = copy.deepcopy(wrapped)
    packed = logits_of(wrapped, document_ids=LAYOUT)

    assert torch.equal(logits_of(twin, document_ids=LAYOUT), packed)
    unwrap(twin)
    assert not wrapping.is_wrapped(twin)
    assert twin.config._attn_implementation == "sdpa"
    assert torch.equal(logits_of(wrapped, document_ids=LAYOUT), packed)
    assert wrapping.is_wrapped(wrapped)
    with pytest.raises(ValueError, match="must be given to a wrapped"):
        wrapped(input_ids=TOKENS, labels=TOKENS)
    assert state_of(unwrap(wrapped)) == state_of(twin)


def test_a_pickled_model_comes_back_wrapped_and_unwraps(wrapped, tmp_path):
    packed = logits_of(wrapped, document_ids=LAYOUT)
    torch.save(wrapped, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)

    assert wrapping.is_wrapped(loaded)
    assert torch.equal(logits_of(loaded, document_ids=LAYOUT), packed)
    with pytest.raises(ValueError, match="must be given to a wrapped"):
        loaded(input_ids=TOKENS, labels=TOKENS)
    assert state_of(unwrap(loaded)) == state_of(unwrap(wrapped))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_wrapped_model_may_change_its_dtype(plain, dtype):
    expected = logits_of(wrap(copy.deepcopy(plain).to(dtype)), document_ids=LAYOUT)
    logits = logits_of(wrap(plain).to(dtype), document_ids=LAYOUT)

    assert logits.dtype == dtype
    assert torch.equal(logits, expected)


def test_a_saved_wrapped_model_loads_as_a_plain_one(wrapped, tmp_path):
    wrapped.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()

    assert "anchor_attn" not in (tmp_path / "config.json").read_text()
    assert not wrapping.is_wrapped(loaded)
    assert loaded.config._attn_implementation == "sdpa"
    assert torch.equal(logits_of(loaded), logits_of(wrapped))
    assert torch.equal(logits_of(wrap(loaded), document_ids=LAYOUT), logits_of(wrapped, document_ids=LAYOUT))


def test_auto_says_once_what_it_chose_and_not_for_the_proof(plain, caplog):
    choice._say_once.cache_clear()
    with caplog.at_level(logging.INFO, "anchor_attn"):
        wrap(plain, engine="auto")
        assert not caplog.records
        for _ in range(2):
            logits_of(plain, document_ids=LAYOUT.document_ids)

    (record,) = caplog.records
    assert record.getMessage().startswith("engine='auto' chose 'varlen/sdpa/gather' for anchor attention (plain, ")


@pytest.mark.parametrize(
    ("named", "module", "other"), [("reference", reference, varlen), ("varlen", varlen, reference)]
)
def test_every_layer_runs_the_named_engine(plain, monkeypatch, named, module, other):
    wrap(plain, engine=named)  # its proof runs on the reference, whatever the engine
    counted = mock.Mock(wraps=module.attend)
    monkeypatch.setattr(module, "attend", counted)
    monkeypatch.setattr(other, "attend", mock.Mock(side_effect=AssertionError("another engine ran")))
    logits_of(plain, document_ids=LAYOUT)

    assert counted.call_count == plain.config.num_hidden_layers


# --- document_ids ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_document_ids_may_be_a_tensor(wrapped, dtype):
    expected = logits_of(wrapped, document_ids=LAYOUT)

    assert torch.equal(logits_of(wrapped, document_ids=LAYOUT.document_ids.to(dtype)), expected)


def test_a_tensor_is_checked_once_a_forward_and_a_layout_never(monkeypatch):
    model = wrap(tiny_model("llama", num_hidden_layers=3))
    checked = mock.Mock(wraps=PackedLayout.from_document_ids)
    monkeypatch.setattr(PackedLayout, "from_document_ids", checked)
    logits_of(model, document_ids=LAYOUT)
    assert checked.call_count == 0

    logits_of(model, document_ids=LAYOUT.document_ids)
    assert checked.call_count == 1


@pytest.mark.parametrize("as_tensor", [True, False])
def test_all_layers_share_one_plan(monkeypatch, as_tensor):
    model = wrap(tiny_model("llama", num_hidden_layers=3), engine="reference")
    built = mock.Mock(wraps=reference.dense_mask)
    monkeypatch.setattr(reference, "dense_mask", built)
    layout = PackedLayout.from_document_ids(LAYOUT.document_ids)
    logits_of(model, document_ids=layout.document_ids if as_tensor else layout)

    assert built.call_count == 1


def test_a_layout_on_the_host_moves_to_the_tokens_once_a_forward(wrapped):
    tokens = torch.zeros(LAYOUT.document_ids.shape, dtype=torch.long, device="meta")
    for name in ("input_ids", "inputs_embeds"):
        _, kwargs = forward.before_forward(wrapped, (), {name: tokens, "document_ids": LAYOUT})
        assert kwargs["document_ids"].device.type == "meta"
        assert kwargs["document_ids"] == LAYOUT


def test_tokens_may_be_positional_or_embedded(wrapped):
    expected = logits_of(wrapped, document_ids=LAYOUT)
    with torch.no_grad():
        positional = wrapped(TOKENS, document_ids=LAYOUT).logits
        embedded = wrapped(inputs_embeds=wrapped.get_input_embeddings()(TOKENS), document_ids=LAYOUT).logits

    assert torch.equal(positional, expected)
    assert torch.equal(embedded, expected)


def test_a_2d_attention_mask_that_agrees_is_accepted(wrapped):
    mask = (LAYOUT.document_ids != -1).long()
    expected = logits_of(wrapped, document_ids=LAYOUT)

    assert torch.equal(logits_of(wrapped, document_ids=LAYOUT, attention_mask=mask), expected)
    assert torch.equal(logits_of(wrapped, document_ids=LAYOUT, attention_mask=mask.bool()), expected)


def test_an_empty_cache_is_accepted(wrapped):
    cache = DynamicCache(config=wrapped.config)
    expected = logits_of(wrapped, document_ids=LAYOUT)

    assert torch.equal(logits_of(wrapped, document_ids=LAYOUT, past_key_values=cache), expected)


def test_labels_give_the_loss_of_the_logits(wrapped):
    labels = TOKENS.masked_fill(LAYOUT.document_ids < 1, -100)
    out = wrapped(input_ids=TOKENS, labels=labels, document_ids=LAYOUT)
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    torch.testing.assert_close(out.loss, expected)


@pytest.mark.parametrize("positions", [[0, 1, 2, 3, 0, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 1, 2, 3, 4]])
def test_position_ids_never_change_the_mask_of_a_wrapped_model(positions):
    """transformers reads packing out of position ids, and gets `[0 1 2 3 0 5 6 7]` wrong; here they only rotate.

    With all rotary frequencies at zero nothing but the mask is left for position ids to change.
    """
    plain = tiny_model("llama", torch.float32)
    plain.model.rotary_emb.inv_freq.zero_()
    tokens = TOKENS[:1, :8]
    layout = PackedLayout.from_lengths([[3, 4]])
    position_ids = torch.tensor([positions])
    inputs = {"input_ids": tokens, "use_cache": False}
    causal = plain(**inputs).logits
    misread = plain(**inputs, position_ids=position_ids).logits
    model = wrap(copy.deepcopy(plain))
    packed = model(**inputs, document_ids=layout).logits

    assert torch.equal(model(**inputs, position_ids=position_ids, document_ids=layout).logits, packed)
    assert not torch.allclose(packed, causal, atol=1e-3)
    assert torch.allclose(misread, causal, atol=1e-3) == (positions == list(range(8))), "the trap is not there any more"


# --- what a wrapped model refuses ------------------------------------------------------------------------------------


def test_labels_or_training_without_document_ids_raise(wrapped):
    message = (
        r"^document_ids must be given to a wrapped LlamaForCausalLM that trains or gets labels, got none; "
        r"pass the collator's document_ids, or unwrap\(model\) for plain causal attention\.$"
    )
    with pytest.raises(ValueError, match=message):
        wrapped(input_ids=TOKENS, labels=TOKENS)
    with pytest.raises(ValueError, match=message):
        wrapped(TOKENS, None, None, None, None, TOKENS)
    with pytest.raises(ValueError, match=message):
        wrapped.train()(input_ids=TOKENS)


def test_a_layer_that_loses_document_ids_in_training_raises(wrapped):
    layer = wrapped.model.layers[0].self_attn.train()
    states = torch.zeros(1, 4, 3, 8)
    with pytest.raises(
        ValueError, match=r"^document_ids must reach every attention layer of a training model, got none"
    ):
        forward.attention_forward(layer, states, states[:, :2], states[:, :2], None)


BAD_INPUTS = [
    (
        "ids of another batch", {"document_ids": PackedLayout.from_lengths([[14]])}, ValueError,
        "document_ids must have the shape of input_ids [2, 15], got [1, 15]; pass the ids of this batch.",
    ),
    (
        "ids without a batch", {"document_ids": LAYOUT.document_ids[0]}, ValueError,
        "document_ids must have shape [B, S], got [15]; add the batch dimension with document_ids[None].",
    ),
    (
        "ids that are no integers", {"document_ids": LAYOUT.document_ids.float()}, TypeError,
        "document_ids must hold integers, got torch.float32; cast with document_ids.int().",
    ),
    (
        "a mask that disagrees", {"document_ids": LAYOUT, "attention_mask": torch.ones(2, 15)}, ValueError,
        "attention_mask must be 0 exactly where document_ids is -1 (padding), got one that disagrees; "
        "leave attention_mask out.",
    ),
    (
        "a dense mask", {"document_ids": LAYOUT, "attention_mask": torch.ones(2, 1, 15, 15)}, ValueError,
        "attention_mask must have shape [2, 15] beside document_ids, got [2, 1, 15, 15]; leave attention_mask out.",
    ),
    (
        "masks by layer type", {"document_ids": LAYOUT, "attention_mask": {"full_attention": None}}, ValueError,
        "attention_mask must have shape [2, 15] beside document_ids, got dict; leave attention_mask out.",
    ),
    (
        "no anchor for the anchor pattern", {"document_ids": PackedLayout.from_lengths([[15], [15]], 0)}, ValueError,
        "pattern='anchor' must have an anchor to show, got a layout with anchor_tokens=0; "
        "pass pattern='intra_doc', or pack with anchor_tokens=1.",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("inputs", "error", "message"), [pytest.param(*case, id=name) for name, *case in BAD_INPUTS])
def test_bad_inputs_raise_one_clear_line(wrapped, inputs, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        wrapped(input_ids=TOKENS, **inputs)


def test_embeddings_of_another_batch_raise(wrapped):
    with pytest.raises(
        ValueError, match=r"^document_ids must have the shape of inputs_embeds \[2, 14\], got \[2, 15\];"
    ):
        wrapped(inputs_embeds=torch.zeros(2, 14, 32), document_ids=LAYOUT)


def test_a_filled_cache_beside_document_ids_raises(wrapped):
    cache = wrapped(input_ids=TOKENS, use_cache=True).past_key_values
    with pytest.raises(
        ValueError, match=r"^document_ids must come with an empty cache that grows, got one of 15 tokens; lea"
    ):
        wrapped(input_ids=TOKENS, document_ids=LAYOUT, past_key_values=cache)


def test_a_cache_of_fixed_size_beside_document_ids_raises(wrapped):
    cache = transformers.StaticCache(config=wrapped.config, max_cache_len=20)
    with pytest.raises(ValueError, match=r"^document_ids must come with an empty cache that grows, got one of a fixed"):
        wrapped(input_ids=TOKENS, document_ids=LAYOUT, past_key_values=cache)


def test_a_forward_with_document_ids_makes_a_cache_only_when_asked_and_of_one_document(wrapped):
    """A token that came after several would see them all: no document ids would be asked for it."""
    alone = PackedLayout.from_lengths([[14], [12]], seq_len=15)
    assert wrapped(input_ids=TOKENS, document_ids=alone).past_key_values is None
    assert wrapped(input_ids=TOKENS, document_ids=alone, use_cache=True).past_key_values is not None
    assert wrapped(input_ids=TOKENS, document_ids=LAYOUT, use_cache=True).past_key_values is None
    cache = DynamicCache(config=wrapped.config)
    wrapped(input_ids=TOKENS, document_ids=LAYOUT, past_key_values=cache)
    assert cache.get_seq_length() == 0


def test_ids_that_may_count_documents_from_zero_are_remarked_on_once(wrapped, caplog):
    attention._warn_once.cache_clear()
    ids = torch.tensor([[0] * 5 + [1] * 10] * 2)
    with caplog.at_level(logging.WARNING, "anchor_attn"):
        for _ in range(2):
            wrapped(input_ids=TOKENS, document_ids=ids)
        wrapped(input_ids=TOKENS, document_ids=PackedLayout.from_document_ids(ids))
    assert [message.partition(";")[0] for message in caplog.messages] == [
        "document_ids begin with 5 anchor tokens, which every document sees"
    ]


def test_a_bfloat16_model_with_a_float32_rotary_module_trains(plain):
    model = plain.to(torch.bfloat16)
    rotary = model.model.rotary_emb.forward
    model.model.rotary_emb.forward = lambda *a, **k: tuple(part.float() for part in rotary(*a, **k))
    loss = wrap(model).train()(input_ids=TOKENS, labels=TOKENS, document_ids=LAYOUT).loss
    loss.backward()
    assert torch.isfinite(loss)


def test_another_implementation_set_on_a_wrapped_model_raises_and_wrapping_again_helps(wrapped):
    expected = logits_of(wrapped, document_ids=LAYOUT)
    wrapped.set_attn_implementation("sdpa")
    with pytest.raises(
        ValueError, match=r"^LlamaForCausalLM must keep attn_implementation='anchor_attn' while it is wr"
    ):
        wrapped(input_ids=TOKENS, document_ids=LAYOUT)

    assert torch.equal(logits_of(wrap(wrapped), document_ids=LAYOUT), expected)


def test_another_implementation_set_on_a_wrapped_model_serves_without_document_ids_and_stays_when_unwrapped(wrapped):
    wrapped.set_attn_implementation("eager")
    eager = wrapped(input_ids=TOKENS, output_attentions=True)
    assert len(eager.attentions) == 2
    with pytest.raises(ValueError, match=r"^document_ids must be given to a wrapped LlamaForCausalLM that trains"):
        wrapped(input_ids=TOKENS, labels=TOKENS)

    assert unwrap(wrapped).config._attn_implementation == "eager"
    assert torch.equal(logits_of(wrapped), eager.logits)
    assert {settings.previous for settings in settings.holders(wrap(wrapped)).values()} == {"eager"}


def test_the_implementation_asked_for_by_name_alone_says_what_to_do(plain, tmp_path):
    expected = logits_of(wrap(copy.deepcopy(plain)), document_ids=LAYOUT)
    plain.save_pretrained(tmp_path)
    named = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="anchor_attn").eval()
    message = (
        "LlamaAttention must be wrapped to run attn_implementation='anchor_attn', got one that only its config names; "
        "call model.set_attn_implementation('sdpa'), then wrap(model)."
    )
    for inputs in ({}, {"document_ids": LAYOUT}):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            logits_of(named, **inputs)
    with pytest.raises(ValueError, match=r"^model must have an attention of its own beside anchor_attn, got LlamaForC"):
        wrap(named)
    named.set_attn_implementation("sdpa")

    assert torch.equal(logits_of(wrap(named), document_ids=LAYOUT), expected)


def test_a_model_built_from_a_wrapped_models_config_says_what_to_do(wrapped):
    other = AutoModelForCausalLM.from_config(wrapped.config)
    with pytest.raises(
        ValueError, match=r"^LlamaAttention must be wrapped to run attn_implementation='anchor_attn', got"
    ):
        other(input_ids=TOKENS, document_ids=LAYOUT)
    with pytest.raises(
        ValueError, match=r"^model must have an attention of its own beside anchor_attn, got LlamaForCausal"
    ):
        wrap(other)
    other.set_attn_implementation("sdpa")
    logits_of(wrap(other), document_ids=LAYOUT)


def test_a_window_that_only_the_mask_knows_raises(wrapped):
    layer = wrapped.model.layers[0].self_attn
    states = torch.zeros(1, 4, 3, 8)
    layout = PackedLayout.from_lengths([[2]])
    for mask, window in ((forward.DeferredMask({"local_size": 2}), None), (forward.DeferredMask({}), 2)):
        with pytest.raises(
            ValueError, match=r"^LlamaAttention must hand its attention window to the attention function, got s"
        ):
            forward.attention_forward(layer, states, states, states, mask, document_ids=layout, sliding_window=window)
