"""`extend` on every family: a live model computes what a fresh one does, saves for plain transformers, goes back."""

import copy
import json
import logging
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from families import each_family, state_of, tiny_config, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from anchor_attn import PackedLayout, check_isolation, unwrap, wrap
from anchor_attn.configs import configs_of
from anchor_attn.hf import is_wrapped
from anchor_attn.rope import METHODS, chooses_by_length, extend, load, method_frequencies
from anchor_attn.rope.configs import RECORD, read_original
from anchor_attn.rope.methods import LONGROPE_WITH_START
from anchor_attn.rope.rotary import rotaries_of
from anchor_attn.train.run import Arm, RunSpec, run_arm

LENGTH = 128  # of the tiny models
TOKENS = torch.tensor([[1, 7, 9, 20, 4, 11, 3, 8, 2, 5]])
# Without gaps, at which transformers would begin a new document; and beyond the original length.
SHORT = torch.arange(TOKENS.shape[1])[None]
LONG = SHORT + 170
N_HAT = 4

NOT_EXTENDED = ("gpt2", "opt", "gemma4_text", "granite_swa", "granitemoe_swa")
# One pair of numbers has no NTK-aware base.
MORE_PAIRS = {"gpt_neox": {"hidden_size": 64}, "mimo_v2_flash": {"head_dim": 12}}
REFUSED = {"phi3": {"dynamic"}, "phimoe": set(METHODS) - {"default", "ntk"}}
CORE = (
    "llama", "gemma3_text", "olmo3", "gpt_neox", "phi", "glm", "deepseek_v2", "deepseek_v3", "gpt_oss", "phi3",
    "ministral3", "cohere2",
)  # fmt: skip

every_family = each_family(CORE, NOT_EXTENDED)
# One of each make: shared or by kind of layer, born with a method, a class that refuses some, a scale in the layers.
MAKES = ("llama", "gemma3_text", "gpt_oss", "phi3", "deepseek_v3")
a_family_of_each_make = each_family(MAKES, NOT_EXTENDED)
every_method = pytest.mark.parametrize("method", METHODS)
STATIC = [method for method in METHODS if method not in ("default", "dynamic")]


def kind_of(config):
    """The layer type that `extend` changes; None where all layers share."""
    return "full_attention" if any(isinstance(part, dict) for part in config.rope_parameters.values()) else None


def pairs_of(config):
    return read_original(config, kind_of(config)).rotary_dim // 2


def options_of(method, config):
    """What a method needs; factors that differ from pair to pair, and for short inputs."""
    if method == "longrope":
        pairs = pairs_of(config)
        return {
            "factors": [1.5 + pair for pair in range(pairs)],
            "short_factors": [1 + pair / 4 for pair in range(pairs)],
        }
    return {"theta": 3e6} if method == "default" else {}


def small(family, dtype=torch.float32, **options):
    return tiny_model(family, dtype, **{**MORE_PAIRS.get(family, {}), **options})


def small_config(family):
    return tiny_config(family, **MORE_PAIRS.get(family, {}))


def with_weights_of(one, two):
    """The second model with the weights of the first."""
    two.load_state_dict(one.state_dict())
    return two


def extended(model, method, factor=12, **options):
    return extend(model, method, factor, **{**options_of(method, model.config), **options})


@torch.no_grad()
def forward(model, **inputs):
    """Logits; transformers 5.17 cannot run "longrope" by kind of layer twice beyond the original length."""
    try:
        return model(use_cache=False, **inputs).logits
    except UnboundLocalError as error:
        pytest.skip(f"transformers {transformers.__version__}: {error}")


def logits_of(model, *positions, **inputs):
    """At the front and beyond the original length, where nothing else is asked for."""
    asked = positions or (SHORT, LONG)
    return torch.cat([forward(model, input_ids=TOKENS, position_ids=part, **inputs) for part in asked])


def fresh_of(model):
    """A model made anew of the same config and weights."""
    torch.manual_seed(1)
    fresh = AutoModelForCausalLM.from_config(copy.deepcopy(model.config), dtype=model.dtype)
    fresh.set_experts_implementation("eager")
    fresh.load_state_dict(model.state_dict())
    return fresh.eval()


def frequencies_of(model):
    return {found.layer_type: found.frequencies() for found in rotaries_of(model)}


# --- a live model and a fresh one ------------------------------------------------------------------------------------


@every_method
@every_family
def test_an_extended_model_computes_what_a_fresh_model_of_its_config_computes(family, method):
    model = small(family)
    before = logits_of(model)
    if method in REFUSED.get(family, ()):
        with pytest.raises(ValueError, match=rf"^method must be one that Phi\w+Config can hold, got '{method}', which"):
            extended(model, method)
        assert torch.equal(logits_of(model), before)
        return
    assert extended(model, method) is model

    assert not torch.equal(logits_of(model), before)
    assert torch.equal(logits_of(model), logits_of(fresh_of(model)))
    again = type(model.config).from_dict(json.loads(json.dumps(model.config.to_dict())))
    assert again.to_dict() == model.config.to_dict()
    assert model.config.max_position_embeddings == read_original(model.config, kind_of(model.config)).length * (
        1 if method == "dynamic" else 12
    )


@every_method
@a_family_of_each_make
def test_default_brings_back_what_was_before_and_another_method_replaces_it(family, method):
    model, once = small(family), small(family)
    logits, config = logits_of(model), model.config.to_dict()
    if method in REFUSED.get(family, ()):
        pytest.skip(f"{family} refuses {method}, as tested above")
    extended(model, method)
    extended(model, "ntk", 8)
    assert torch.equal(logits_of(model), logits_of(extended(once, "ntk", 8)))
    assert model.config.to_dict() == once.config.to_dict()

    extended(model, method)
    extend(model, "default")
    assert torch.equal(logits_of(model), logits)
    assert model.config.to_dict() == config


@every_method
@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3_text"])
def test_a_config_is_extended_as_its_model_is(family, method):
    if method in REFUSED.get(family, ()):
        pytest.skip(f"{family} refuses {method}, as tested above")
    config, model = tiny_config(family), small(family)
    assert extend(config, method, 12, **options_of(method, config)) is config
    extended(model, method)

    for name in ("rope_parameters", "max_position_embeddings", RECORD):
        assert getattr(config, name) == getattr(model.config, name)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "deepseek_v2", "gpt_oss"])
@pytest.mark.parametrize("way", ["loaded", "cast"])
def test_frequencies_stay_in_float32_in_a_bfloat16_model(family, way):
    model = small(family)
    model = model.to(torch.bfloat16) if way == "cast" else fresh_of(model.to(torch.bfloat16))
    extended(model, "yarn")

    assert torch.equal(logits_of(model), logits_of(fresh_of(model)))


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_model_on_meta_gets_the_frequencies_when_it_is_filled(family):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(family))
    extended(model, "yarn")
    assert all(buffer.is_meta for buffer in model.buffers())
    model.to_empty(device="cpu")
    model.init_weights()
    model.load_state_dict((filled := extended(small(family), "yarn")).state_dict())

    assert torch.equal(logits_of(model.eval()), logits_of(filled))


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "minicpm3", "youtu"])
def test_the_scale_that_deepseeks_layers_take_from_yarn_goes_and_comes_with_it(family):
    published = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 40.0, "original_max_position_embeddings": LENGTH,
                 "mscale": 1.0, "mscale_all_dim": 1.0}  # fmt: skip
    model = small(family, rope_parameters=published)
    born = logits_of(model)
    extended(model, "linear")
    assert torch.equal(logits_of(model), logits_of(fresh_of(model)))

    extended(model, "yarn", 40, mscale=1.0, mscale_all_dim=1.0)
    assert torch.equal(logits_of(model), born)
    extended(model, "yarn_paper")
    extend(model, "default")
    assert torch.equal(logits_of(model), born)


def test_a_model_published_with_a_method_is_extended_from_the_rope_under_it():
    published = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                 "high_freq_factor": 4.0, "original_max_position_embeddings": 16}  # fmt: skip
    model = extended(small("llama", rope_parameters=published), "yarn", 16)
    expected = method_frequencies("yarn", 5e5, 8, 16, 16.0)

    assert torch.equal(model.model.rotary_emb.inv_freq, expected[0])
    assert model.model.rotary_emb.attention_scaling == expected[1]
    assert model.config.max_position_embeddings == 256


def test_a_linear_model_needs_to_be_told_its_original_length():
    linear = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    model = small("llama", rope_parameters=linear)
    with pytest.raises(ValueError, match=r"^original_len must be given for a config of rope_type='linear', which does"):
        extended(model, "yarn")
    extend(model, "yarn", 8, original_len=32)
    extend(model, "ntk", 2)  # said once
    assert model.config.max_position_embeddings == 64

    extend(model, "default")
    assert model.config.rope_parameters == linear
    assert torch.equal(logits_of(model), logits_of(small("llama", rope_parameters=linear)))


def test_a_larger_base_and_a_target_length():
    model = extend(small("llama"), "default", theta=5e6, target_len=65_536)

    assert model.config.rope_parameters == {"rope_type": "default", "rope_theta": 5e6}
    assert model.config.max_position_embeddings == 65_536
    assert torch.equal(model.model.rotary_emb.inv_freq, method_frequencies("default", 5e6, 8, LENGTH, 1.0)[0])


def test_target_len_says_what_factor_says():
    by_factor, by_length = (
        extend(small("llama"), "yarn", factor=8),
        extend(small("llama"), "yarn", target_len=8 * LENGTH),
    )

    assert by_factor.config.to_dict() == by_length.config.to_dict()


def test_ministral_keeps_what_it_reads_beside_the_method():
    model = small("ministral3")
    before = model.config.rope_parameters["llama_4_scaling_beta"]
    trained = model.config.rope_parameters["original_max_position_embeddings"]
    extended(model, "linear")

    assert model.config.rope_parameters["llama_4_scaling_beta"] == before
    assert model.config.rope_parameters["original_max_position_embeddings"] == trained


# --- kinds of layers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gemma3_text", "modernbert_decoder", "mellum", "laguna"])
@pytest.mark.parametrize("method", STATIC)
def test_sliding_layers_of_a_hybrid_model_keep_their_frequencies(family, method):
    model = small(family)
    before = frequencies_of(model)
    after = frequencies_of(extended(model, method))

    assert torch.equal(after["sliding_attention"][0], before["sliding_attention"][0])
    assert not torch.equal(after["full_attention"][0], before["full_attention"][0])


def test_other_kinds_are_extended_on_request_and_then_alone():
    model, once = small("gemma3_text"), small("gemma3_text")
    extend(model, "yarn", 4)
    extend(model, "ntk", 8, layer_types=["sliding_attention"])
    extend(once, "ntk", 8, layer_types=["sliding_attention"])

    assert model.config.to_dict() == once.config.to_dict()
    assert torch.equal(logits_of(model), logits_of(once))


@pytest.mark.parametrize(
    ("family", "layer_types", "names"),
    [
        ("gemma3_text", ["full"], "sliding_attention"),
        ("gemma3_text", [], "full"),
        ("llama", ["sliding_attention"], "full"),
    ],
)
def test_kinds_that_a_model_has_not_are_refused(family, layer_types, names):
    with pytest.raises(ValueError, match=rf"^layer_types must name some of \(.*{names}.*\), got .*; pass kinds"):
        extend(small(family), "yarn", 4, layer_types=layer_types)


# --- around the model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("method", ["yarn", "longrope", "dynamic"])
@pytest.mark.parametrize("precision", ["model", "exact"])
def test_wrapped_before_or_after_is_the_same(family, method, precision):
    layout = PackedLayout.from_lengths([[4, 5]])
    first, last = small(family), small(family)
    extended(wrap(first, rope_precision=precision), method)
    wrap(extended(last, method), rope_precision=precision)
    assert is_wrapped(first)

    assert torch.equal(*(logits_of(model, document_ids=layout) for model in (first, last)))
    assert torch.equal(logits_of(unwrap(first)), logits_of(extended(small(family), method)))


def test_models_of_one_config_stay_as_they_are():
    config = tiny_config("llama")
    first, second = (transformers.LlamaForCausalLM(config).eval() for _ in range(2))
    before = logits_of(second)
    extend(first, "yarn", 8)

    assert torch.equal(logits_of(second), before)
    assert second.config.max_position_embeddings == config.max_position_embeddings == LENGTH
    assert not hasattr(second.config, RECORD)


# PEFT asks by a name that transformers 5.23 has replaced.
@pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in v6:FutureWarning")
def test_a_peft_model_is_extended_as_its_base_is():
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(small("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    extended(adapted, "yarn")

    assert torch.equal(logits_of(adapted.eval()), logits_of(extended(small("llama"), "yarn")))


def test_a_model_extended_twice_by_a_method_that_grows_starts_from_the_front():
    model = extended(small("gemma3_text"), "dynamic", 2)
    logits_of(model, LONG)  # leaves frequencies of a long input in the module, and its length
    extended(model, "dynamic", 8)

    assert torch.equal(logits_of(model, LONG), logits_of(extended(small("gemma3_text"), "dynamic", 8), LONG))


# --- methods that choose by length -----------------------------------------------------------------------------------


def test_dynamic_follows_the_length_of_the_input_and_keeps_the_length_it_starts_from():
    model = extend(small("llama"), "dynamic", 4)
    plain, rotary = small("llama"), model.model.rotary_emb
    assert torch.equal(logits_of(model, SHORT), logits_of(plain, SHORT))
    for longest in (200, 400):
        rotary(torch.zeros(1), torch.tensor([[0, longest - 1]]))
        expected, _ = method_frequencies("dynamic", 1e4, 8, LENGTH, 4.0, seq_len=torch.tensor(longest))
        assert torch.equal(rotary.inv_freq, expected)
    assert model.config.max_position_embeddings == LENGTH
    assert torch.equal(logits_of(model, SHORT), logits_of(plain, SHORT))


def test_longrope_takes_its_short_set_up_to_the_original_length():
    model = small("llama")
    extend(model, "longrope", 4, factors=[2.0, 3, 4, 5], short_factors=[1.0] * 4, attention_factor=1.0)
    at = {length: model.model.rotary_emb(torch.zeros(1), torch.arange(length)[None])[0] for length in (128, 129)}
    plain = small("llama").model.rotary_emb(torch.zeros(1), torch.arange(129)[None])[0]

    assert torch.equal(at[128], plain[:, :128])
    assert not torch.equal(at[129][:, 1:], plain[:, 1:])


@pytest.mark.parametrize(
    ("method", "options", "by_length"),
    [
        ("dynamic", {}, True),
        ("longrope", {"factors": [2.0] * 4, "short_factors": [1.0] * 4}, True),
        ("longrope", {"factors": [2.0] * 4, "short_factors": [1.0] * 4, "n_hat": 4}, True),
        ("longrope", {"factors": [2.0] * 4}, False),
        ("longrope", {"factors": [2.0] * 4, "n_hat": 4}, False),
        *[(method, {}, False) for method in METHODS if method not in ("dynamic", "longrope")],
    ],
)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_document_depends_on_what_it_is_packed_with_where_the_method_chooses_by_length(
    family, method, options, by_length
):
    """`check_isolation` changes tokens, and sees no leak: what leaks is the length of the row."""
    model = wrap(extend(small(family), method, 4, **options))
    first = torch.arange(3, 63)
    alone, packed = (PackedLayout.from_lengths([lengths]) for lengths in ([60], [60, 90]))

    def logits(layout):
        ids = torch.cat((torch.tensor([1]), first, first[:30].repeat(3)))[None, : layout.seq_len]
        inputs = {"input_ids": ids, "position_ids": layout.position_ids(), "document_ids": layout}
        return torch.cat([forward(model, **inputs) for _ in range(2)])[:, :61]

    assert torch.allclose(logits(alone), logits(packed), atol=1e-5) != by_length
    assert chooses_by_length(model) == chooses_by_length(model.config) == by_length
    assert check_isolation(model, packed).passed


def test_a_model_without_rotary_positions_chooses_nothing():
    assert not chooses_by_length(tiny_config("gpt2"))


@pytest.mark.parametrize("arm", ["anchor", "anchor+reset"])
def test_training_refuses_such_a_method_for_continuous_positions(arm, tmp_path):
    config = extend(tiny_config("llama"), "dynamic", 4)
    config.save_pretrained(tmp_path)
    spec = RunSpec(
        arm=Arm.parse(arm), seed=0, model=str(tmp_path / "config.json"), vocab_size=67, anchor_token_id=1, seq_len=32,
        steps=1, batch_size=1, learning_rate=1e-3, engine="auto", device="cpu", dtype="float32", out=tmp_path,
    )  # fmt: skip
    refused = (
        r"^position_policy must be 'reset' for RoPE that is chosen by the input's length, got 'continuous' for Llama"
    )
    goes_on = "requires a train_dataset"  # of which there is none
    with pytest.raises(ValueError, match=refused if arm == "anchor" else goes_on):
        run_arm(spec, None, None, None)


# --- the first n̂ positions -------------------------------------------------------------------------------------------


def with_start(family="llama", dtype=torch.float32, **options):
    """A model whose first positions keep the original angles."""
    model = small(family, dtype)
    pairs = pairs_of(model.config)
    factors = [2.0 + pair for pair in range(pairs)]
    return extend(model, "longrope", 4, **{"factors": factors, "n_hat": N_HAT, "attention_factor": 1.0, **options})


START_FAMILIES = ("llama", "cohere2", "gemma3_text", "deepseek_v2", "glm", "gpt_oss")


@pytest.mark.parametrize("family", START_FAMILIES)
def test_positions_below_n_hat_keep_the_original_angles_and_others_do_not(family):
    def table(model):
        given = next(rotaries_of(model)).module(torch.zeros(1), torch.arange(300)[None], *kind)
        return torch.view_as_real(given).unbind(-1) if isinstance(given, torch.Tensor) else given

    model = small(family)
    kind = [] if kind_of(model.config) is None else ["full_attention"]
    extend(model, "default", theta=read_original(model.config, kind_of(model.config)).theta, factor=1)
    for plain, rescaled, ours in zip(
        *map(table, (model, with_start(family, n_hat=0), with_start(family))), strict=True
    ):
        torch.testing.assert_close(ours[:, :N_HAT], plain[:, :N_HAT], rtol=0, atol=1e-6)
        assert torch.equal(ours[:, N_HAT:], rescaled[:, N_HAT:])
        assert not torch.allclose(ours[:, N_HAT:], plain[:, N_HAT:], atol=1e-2)
        assert not torch.allclose(ours[:, :N_HAT], rescaled[:, :N_HAT], atol=1e-2)


def test_sliding_layers_have_no_start_of_their_own():
    model, plain = with_start("gemma3_text"), small("gemma3_text")
    tables = [m.model.rotary_emb(torch.zeros(1), SHORT, "sliding_attention") for m in (model, plain)]

    assert torch.equal(tables[0][0], tables[1][0])


def test_n_hat_belongs_to_the_long_set():
    model = with_start(short_factors=[1.5, 2, 3, 4])
    short = small("llama")
    extend(short, "longrope", 4, factors=[1.5, 2, 3, 4], attention_factor=1.0)
    plain, zeros = small("llama").model.rotary_emb, torch.zeros(1)
    for length, first in ((LENGTH, short.model.rotary_emb), (LENGTH + 1, plain)):
        positions = torch.arange(length)[None]
        ours, expected = (rotary(zeros, positions)[0][:, :N_HAT] for rotary in (model.model.rotary_emb, first))
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", START_FAMILIES)
def test_n_hat_is_kept_by_load_and_refused_by_plain_transformers(family, tmp_path):
    model = with_start(family)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    loaded.set_experts_implementation("eager")

    assert torch.equal(logits_of(loaded), logits_of(model))
    assert loaded.config.rope_parameters == model.config.rope_parameters
    assert getattr(loaded.config, RECORD) == getattr(model.config, RECORD)
    with pytest.raises(ValueError, match="needs_anchor_attn_longrope"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@every_family
def test_no_model_is_built_from_a_config_that_frequencies_do_not_say(family, monkeypatch):
    """Its first positions would be wrong, and nothing would say so. What raises says how to, where we were used."""
    config = small_config(family)
    factors = [1.5] * pairs_of(config)
    if family in ("phi3", "phimoe"):
        with pytest.raises(ValueError, match=r"^method must be one that Phi\w+Config can hold, got 'longrope', which"):
            extend(config, "longrope", 4, factors=factors, n_hat=4)
        return
    extend(config, "longrope", 4, factors=factors, n_hat=4)

    def build():
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)

    with pytest.raises(ValueError, match=rf"^config must have RoPE .* got {type(config).__name__} with 'needs_anchor"):
        build()
    monkeypatch.delitem(ROPE_INIT_FUNCTIONS, LONGROPE_WITH_START)
    with pytest.raises(KeyError, match=LONGROPE_WITH_START):
        build()


def test_the_way_that_such_a_config_names_leads_to_its_model():
    config = extend(tiny_config("llama"), "longrope", 4, factors=[2.0, 3, 4, 5], n_hat=N_HAT, attention_factor=1.0)
    with pytest.raises(ValueError, match=r"; extend\(config, 'default'\) first and extend the model, or read a checkp"):
        AutoModelForCausalLM.from_config(config)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(extend(copy.deepcopy(config), "default")).eval()
    extend(model, "longrope", 4, factors=[2.0, 3, 4, 5], n_hat=N_HAT, attention_factor=1.0)

    assert model.config.rope_parameters == config.rope_parameters
    assert torch.equal(logits_of(model), logits_of(with_weights_of(model, with_start())))


def test_transformers_notes_nothing_of_our_type_and_all_of_others(tmp_path):
    notes = []
    log = logging.getLogger("transformers.modeling_rope_utils")
    handler = logging.Handler()
    handler.emit = lambda record: notes.append(record.getMessage())
    log.addHandler(handler)
    try:
        with_start().save_pretrained(tmp_path)
        config = load(tmp_path).config
        config.validate()
        assert notes == []
        config.rope_parameters["rope_type"] = "of_others"
        config.validate()
    finally:
        log.removeHandler(handler)

    assert notes == ["Missing validation function in 'RotaryEmbeddingConfigMixin' for 'rope_type'='of_others'"]


def test_load_reads_other_checkpoints_as_transformers_does(tmp_path):
    for name, model in (("plain", small("llama")), ("yarn", extend(small("llama"), "yarn", 4))):
        model.save_pretrained(tmp_path / name)
        assert torch.equal(logits_of(load(tmp_path / name, dtype=torch.float32)), logits_of(model))


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_copy_has_a_start_of_its_own(family):
    model, plain = with_start(family), logits_of(small(family))
    before = logits_of(model)
    copied = copy.deepcopy(model)
    assert torch.equal(logits_of(copied), before)

    extend(copied, "default")
    assert torch.equal(logits_of(copied), plain)
    assert torch.equal(logits_of(model), before)
    assert not any(module._forward_hooks for module in copied.modules())


def test_another_method_takes_the_start_away():
    model = extend(with_start(), "yarn", 4)

    assert torch.equal(logits_of(model), logits_of(extend(small("llama"), "yarn", 4)))
    assert torch.equal(logits_of(extend(with_start(), "longrope", 4, factors=[2.0, 3, 4, 5], attention_factor=1.0)),
                       logits_of(with_start(n_hat=0)))  # fmt: skip


@pytest.mark.slow
def test_a_start_survives_torch_compile():
    model = with_start()
    expected = logits_of(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

    torch.testing.assert_close(logits_of(compiled), expected, rtol=0, atol=1e-5)


def test_generation_with_a_cache_rotates_each_token_as_the_whole_row_does():
    model = with_start(dtype=torch.float64)
    asked = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "output_logits": True,
             "return_dict_in_generate": True, "pad_token_id": 0}  # fmt: skip
    with_cache, without = (model.generate(TOKENS[:, :2], use_cache=cache, **asked) for cache in (True, False))

    assert torch.equal(with_cache.sequences, without.sequences)
    for one, two in zip(with_cache.logits, without.logits, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-9)


def test_a_wrapped_model_keeps_its_start():
    layout = PackedLayout.from_lengths([[9]])
    packed = logits_of(wrap(with_start(), pattern="full"), document_ids=layout)

    torch.testing.assert_close(packed, logits_of(with_start()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("order", ["extended first", "wrapped first"])
def test_a_start_and_an_exact_table_go_together(order):
    layout = PackedLayout.from_lengths([[9]])
    if order == "extended first":
        model = wrap(with_start(), pattern="full", rope_precision="exact")
    else:
        model = wrap(small("llama"), pattern="full", rope_precision="exact")
        extend(model, "longrope", 4, factors=[2.0, 3, 4, 5], n_hat=N_HAT, attention_factor=1.0)

    packed = logits_of(model, document_ids=layout)
    torch.testing.assert_close(packed, logits_of(with_start()), rtol=0, atol=1e-5)


# --- in a process without this package -------------------------------------------------------------------------------

ELSEWHERE = """
import sys
sys.modules["anchor_attn"] = None
import pathlib, torch
from transformers import AutoModelForCausalLM
folder = pathlib.Path(sys.argv[1])
found = {}
for path in sorted(part for part in folder.iterdir() if part.is_dir()):
    rotary = AutoModelForCausalLM.from_pretrained(path).model.rotary_emb
    found[path.name] = {name: buffer.clone() for name, buffer in rotary.named_buffers()}, {
        name: value for name, value in vars(rotary).items() if name.endswith("attention_scaling")}
    rotary(torch.zeros(1), torch.arange(500)[None], *(["full_attention"] if path.name.startswith("gemma3") else []))
    found[path.name][0].update({"long " + name: buffer.clone() for name, buffer in rotary.named_buffers()})
torch.save(found, folder / "found.pt")
assert sys.modules["anchor_attn"] is None
"""


@pytest.mark.slow
def test_every_method_loads_in_plain_transformers_with_equal_frequencies(tmp_path):
    kept = {}
    for family in ("llama", "gemma3_text", "phi3", "deepseek_v2", "glm"):
        for method in METHODS:
            if method in REFUSED.get(family, ()):
                continue
            model = extended(small(family), method)
            model.save_pretrained(tmp_path / f"{family}-{method}")
            rotary = model.model.rotary_emb
            buffers = {name: buffer.clone() for name, buffer in rotary.named_buffers()}
            attention_factors = {
                name: value for name, value in vars(rotary).items() if name.endswith("attention_scaling")
            }
            rotary(torch.zeros(1), torch.arange(500)[None], *(["full_attention"] if family == "gemma3_text" else []))
            buffers |= {f"long {name}": buffer for name, buffer in rotary.named_buffers()}
            kept[f"{family}-{method}"] = buffers, attention_factors
    subprocess.run([sys.executable, "-I", "-c", ELSEWHERE, str(tmp_path)], check=True)
    found = torch.load(tmp_path / "found.pt")

    assert found.keys() == kept.keys()
    for name, (buffers, attention_factors) in kept.items():
        assert found[name][1] == attention_factors
        assert found[name][0].keys() == buffers.keys()
        for buffer, expected in buffers.items():
            assert torch.equal(found[name][0][buffer], expected), (name, buffer)


# --- bad input -------------------------------------------------------------------------------------------------------


def assert_refused(model, error, message, method="yarn", **asked):
    """One line, and the model is as it was."""
    config = model if isinstance(model, PreTrainedConfig) else model.config
    before = copy.deepcopy(config.to_dict())
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    state, logits = (state_of(model), logits_of(model)) if modules else ({}, torch.zeros(1))
    configs = [id(held) for module in modules for held in configs_of(module).values()]
    with pytest.raises(error, match=message) as refused:
        extend(model, method, **asked)

    assert "\n" not in str(refused.value)
    assert config.to_dict() == before
    if modules:
        assert state_of(model) == state
        assert [id(held) for module in modules for held in configs_of(module).values()] == configs
        assert torch.equal(logits_of(model), logits)


@pytest.mark.parametrize("subject", ["model", "config"])
@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"method": "yarnn", "factor": 4}, r"^method must be one of \('default', .*\), got 'yarnn'; pass one of them"),
        ({"factor": 1}, r"^factor must be above 1 and finite, got 1; pass 8, say"),
        ({"factor": float("nan")}, r"^factor must be above 1 and finite, got nan; "),
        ({"factor": float("inf")}, r"^factor must be above 1 and finite, got inf; "),
        ({"target_len": 64}, r"^target_len must be above the original length of 128 tokens, got 64; raise it, or say"),
        ({"factor": 1e308}, r"^factor must be at most 1,000,000, got 1e\+308; pass 8, say"),
        ({"target_len": 10**400}, r"^target_len must be at most 1,000,000 times the original length of 128"),
        ({"target_len": 128}, r"^target_len must be above the original length of 128 tokens, got 128; "),
        ({"factor": 4, "target_len": 512}, r"^factor or target_len must be given, got both \(4 and 512\); pass one"),
        ({}, r"^factor or target_len must be given for method='yarn', got none; pass factor=8"),
        ({"factor": 4, "original_len": 0}, r"^original_len must be at least one token, got 0; "),
        ({"factor": 4, "theta": 1e6}, r"^options of method='yarn' must be of \('beta_fast', .*, got theta; "),
        ({"method": "default", "theta": 0.0}, r"^theta must be above 1 and finite, got 0.0; "),
        ({"method": "longrope", "factor": 4}, r"^factors must be given for method='longrope', got none; "),
        ({"method": "longrope", "factor": 4, "factors": [1.0] * 3}, r"^factors must hold a factor for each of 4 pairs"),
        ({"method": "longrope", "factor": 4, "factors": [1.0, 3, 2, 4]}, r"^factors must not fall from pair to pair, "),
        ({"method": "longrope", "factor": 4, "factors": [0.0, 1, 2, 4]}, r"^factors\[0\] must be above 0 and finite"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused_and_nothing_changes(subject, asked, message):
    model = small("llama") if subject == "model" else tiny_config("llama")
    assert_refused(model, ValueError, message, **asked)


@pytest.mark.parametrize("subject", ["model", "config"])
@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"layer_types": None}, r"^layer_types must be a list of names, got None; pass \['full_attention'\], say"),
        ({"layer_types": "full_attention"}, r"^layer_types must be a list of names, got 'full_attention'; "),
        ({"layer_types": [["full_attention"]]}, r"^layer_types must be a list of names, got \[\['full_att"),
        ({"truncate": "no"}, r"^truncate must be True or False, got 'no'; "),
        ({"factor": "4"}, r"^factor must be a number, got '4'; pass one above 1\."),
        ({"factor": None, "target_len": 4096.0}, r"^target_len must be an integer, got 4096.0; "),
        ({"original_len": "128"}, r"^original_len must be an integer, got '128'; "),
        ({"beta_fast": [32]}, r"^beta_fast must be a number, got \[32\]; "),
        ({"method": "default", "theta": "1e6"}, r"^theta must be a number, got '1e6'; pass one above 1\."),
        ({"method": "longrope", "factors": torch.ones(4, 2)}, r"^factors\[0\] must be a number, got \[1.0, 1.0\]; "),
        ({"method": "longrope", "factors": [1.0] * 4, "n_hat": "4"}, r"^n_hat must be an integer, got '4'; "),
    ],
)  # fmt: skip
def test_arguments_of_another_type_are_refused_and_nothing_changes(subject, asked, message):
    model = small("llama") if subject == "model" else tiny_config("llama")
    assert_refused(model, TypeError, message, **{"factor": 4, **asked})


@pytest.mark.parametrize("method", [["yarn"], None, torch.ones(2)])
def test_a_method_that_is_no_name_is_refused_and_nothing_changes(method):
    assert_refused(small("llama"), ValueError, r"^method must be one of \(.*\), got .*; pass one", method, factor=4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("theta", "error", "message"),
    [
        (1.0, ValueError, r"^theta must be above 1 and finite, got 1.0; "),
        (-1e4, ValueError, r"^theta must be above 1 and finite, got -10000.0; "),
        (0, ValueError, r"^theta must be above 1 and finite, got 0; "),
        ("1e4", TypeError, r"^theta must be a number, got '1e4'; "),
    ],
)
def test_a_config_whose_base_is_none_is_refused(method, theta, error, message):
    config = tiny_config("llama")
    config.rope_parameters["rope_theta"] = theta
    factors = {"factors": [2.0] * 4} if method == "longrope" else {}
    assert_refused(config, error, message, method, factor=4, **factors)


@pytest.mark.parametrize("kind", [tuple, np.array, torch.tensor])
def test_factors_of_any_kind_write_the_same_config(kind, tmp_path):
    by_list = extend(tiny_config("llama"), "longrope", 4, factors=[1.0, 1.5, 2.0, 4.0], n_hat=4)
    given = extend(tiny_config("llama"), "longrope", 4, factors=kind([1.0, 1.5, 2.0, 4.0]), n_hat=kind([4])[0])
    given.save_pretrained(tmp_path)

    assert given.to_dict() == by_list.to_dict()
    assert json.loads((tmp_path / "config.json").read_text())[RECORD] == getattr(by_list, RECORD)


@pytest.mark.parametrize(
    ("content", "got"),
    [
        (None, "FileNotFoundError"),
        ("{", "JSONDecodeError"),
        ("[1.0]", "AttributeError"),
        ('{"factor": 4}', "KeyError: 'factors'"),
        ('{"factors": [1, 2, 3, 4]}', "KeyError: 'factor'"),
        ('{"factors": 3, "factor": 4}', "TypeError"),
    ],
)
def test_a_file_of_factors_that_is_none_is_refused(content, got, tmp_path):
    path = tmp_path / "factors.json"
    if content is not None:
        path.write_text(content)
    message = rf"^factors must be the result of a search, got '.*factors.json' \({got}.*\); pass the file"
    assert_refused(small("llama"), ValueError, message, "longrope", factors=path)


def test_the_file_of_a_search_says_all_and_an_argument_beside_it_more(tmp_path):
    path = tmp_path / "factors.json"
    found = {"factors": [1.0, 2, 3, 4], "short_factors": [1.0, 1, 1, 2], "n_hat": 4, "attention_factor": 1.5,
             "factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
    path.write_text(json.dumps({**found, "meta": {"seed": 0}}))
    named = {name: found[name] for name in ("factors", "short_factors", "n_hat", "attention_factor")}
    from_file = extend(small("llama"), "longrope", factors=path)
    by_hand = extend(small("llama"), "longrope", 4, original_len=64, **named)
    assert from_file.config.to_dict() == by_hand.config.to_dict()
    assert torch.equal(logits_of(from_file), logits_of(by_hand))

    without_start = extend(small("llama"), "longrope", 8, factors=str(path), n_hat=0)
    assert without_start.config.rope_parameters["rope_type"] == "longrope"
    assert without_start.config.max_position_embeddings == 512


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("gpt2", {}, r"^config must have rotary positions of one theta to be extended, got GPT2Config without; extend"),
        ("granite_swa", {}, r"^config must have rotary .* got GraniteSWAConfig with a theta for every layer; extend"),
        ("gemma4_text", {}, r"^rope_type must be one of \(.*\) to be extended, got 'proportional'; choose other layer"),
        ("glm", {"head_dim": 6}, r"^rotary_dim must be even and at least 2, got 3; "),
    ],
)
def test_rope_that_cannot_be_extended_is_refused(family, options, message):
    assert_refused(tiny_config(family, **options), ValueError, message, factor=4)


class Stubborn(nn.Module):
    """A rotary module that takes a config and does not follow it."""

    def __init__(self, config):
        super().__init__()
        self.rotary_emb = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(tiny_config("llama"))
        self.rope_type, self.config = config.rope_parameters["rope_type"], config
        self.compute_default_rope_parameters = self.rotary_emb.compute_default_rope_parameters

    def forward(self, x, position_ids):
        return self.rotary_emb(x, position_ids)


class Picky(transformers.models.llama.modeling_llama.LlamaRotaryEmbedding):
    """A rotary module that wants more than a config."""

    def __init__(self, config, size):
        super().__init__(config)


@pytest.mark.parametrize(
    ("replacement", "message"),
    [
        (lambda config: Picky(config, 8), r"^model must have rotary modules that are made from a config, got Picky, "),
        (Stubborn, r"^model must have one rotary module to be extended, got LlamaForCausalLM with 2; "),
        (
            lambda config: nn.Identity(),
            r"^model must have one rotary module to be extended, got LlamaForCausalLM with 0",
        ),
    ],
)
def test_rotary_modules_that_cannot_follow_are_refused_and_nothing_changes(replacement, message):
    model = small("llama")
    config = copy.deepcopy(model.config.to_dict())
    model.model.rotary_emb = replacement(model.config)
    with pytest.raises(ValueError, match=message):
        extend(model, "yarn", 4)
    assert model.config.to_dict() == config


def test_a_rotary_module_that_computes_other_frequencies_than_its_config_is_refused(monkeypatch):
    model = small("llama")
    of_class = type(model.model.rotary_emb)

    class OwnRotaryEmbedding(of_class):
        def __init__(self, config):
            super().__init__(tiny_config("llama"))
            self.config = config

    model.model.rotary_emb = OwnRotaryEmbedding(model.config)
    assert_refused(
        model, ValueError, r"^model must have a rotary module that computes what its config says, got Own", factor=4
    )


@pytest.mark.parametrize("subject", [nn.Linear(2, 2), "llama", nn.DataParallel(nn.Linear(2, 2))])
def test_what_is_no_model_of_transformers_is_refused(subject):
    with pytest.raises(TypeError, match=r"^model_or_config must be a model or a config of transformers, got \w+; pass"):
        extend(subject, "yarn", 4)


def test_truncate_is_refused_where_transformers_does_not_read_it():
    message = r"^truncate must be left out for a model with frequencies for each kind of layer, got False, which"
    assert_refused(small("gemma3_text"), ValueError, message, factor=4, truncate=False)


def test_a_start_is_refused_where_the_config_class_cannot_hold_it():
    message = r"^method must be one that Phi3Config can hold, got 'longrope', which its validation refuses; choose"
    assert_refused(small("phi3"), ValueError, message, "longrope", factor=4, factors=[2.0] * 4, n_hat=4)
