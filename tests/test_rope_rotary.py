"""Rotary modules of every family: recognised, computed anew from their config, and rotating in the stated precision."""

import copy

import pytest
import torch
from families import each_family, tiny_config, tiny_model
from torch import nn
from transformers import AttentionInterface

from anchor_attn.rope import extend, method_frequencies, rotary
from anchor_attn.rope.configs import read_original
from anchor_attn.rope.precision import RotaryTable, rotary_table
from anchor_attn.rope.rotary import Rotary, in_form, override_tables, recognise, rotaries_of

TOKENS = torch.tensor([[1, 7, 9, 20, 4, 11]])
# float32 angles lose a digit for every tenfold position; exact ones lose none.
POSITIONS = {"float32": [0, 1, 2, 10, 100, 1000], "exact": [0, 1, 2, 4095, 100_003, 4_000_001]}
CORE = ("llama", "gemma3_text", "gpt_neox", "gpt_oss", "cohere2", "deepseek_v2", "deepseek_v3", "phi", "olmo2", "glm4")
WITHOUT_ROTARY = ("gpt2", "opt")

every_rotary_family = each_family(CORE, WITHOUT_ROTARY)


def first_query_and_key(model, positions):
    """What the first layer hands to its attention, rotated."""
    seen = []

    def record(module, query, key, value, *args, **kwargs):
        seen.append((query, key))
        return torch.zeros(*query.shape[:1], query.shape[2], query.shape[1], value.shape[-1], dtype=value.dtype), None

    AttentionInterface.register("recording", record)
    model.config._attn_implementation = "recording"
    with torch.no_grad():
        model(input_ids=TOKENS, position_ids=torch.tensor([positions]), use_cache=False)
    return seen[0]


@every_rotary_family
@pytest.mark.parametrize("precision", POSITIONS)
def test_queries_and_keys_are_within_a_unit_of_the_same_states_rotated_in_float64(family, precision, monkeypatch):
    """A unit in the last place of bfloat16, in which the model computes and to which they are cast at the end."""
    model = tiny_model(family, torch.bfloat16)
    stated, oracle = copy.deepcopy(model), copy.deepcopy(model)
    override_tables(stated, precision)
    override_tables(oracle, precision)
    rotated = first_query_and_key(stated, POSITIONS[precision])

    def in_float64(position_ids, inv_freq, precision, dtype, attention_factor):
        angles = position_ids[..., None].double() * inv_freq.double()
        return RotaryTable(angles.cos() * attention_factor, angles.sin() * attention_factor)

    monkeypatch.setattr(rotary, "rotary_table", in_float64)
    for ours, exact in zip(rotated, first_query_and_key(oracle, POSITIONS[precision]), strict=True):
        exact = exact.bfloat16().float()
        unit = torch.finfo(torch.bfloat16).eps * exact.abs().clamp(min=1e-3)
        assert ((ours.bfloat16().float() - exact).abs() <= unit).all()
        assert (ours.bfloat16().float() != exact).float().mean() < 0.03


def test_llamas_own_rotation_is_not_as_exact():
    """What the test above would see, were nothing overridden."""
    model = tiny_model("llama", torch.bfloat16)
    ours = copy.deepcopy(model)
    override_tables(ours, "exact")
    for one, two in zip(*(first_query_and_key(part, POSITIONS["exact"]) for part in (model, ours)), strict=True):
        assert (one != two.bfloat16()).float().mean() > 0.2


def test_bfloat16_tables_hold_bfloat16_numbers_in_a_float32_model():
    model = tiny_model("llama", torch.float32)
    override_tables(model, "bfloat16")
    cos, sin = model.model.rotary_emb(torch.zeros(1), torch.tensor([[0, 3, 1001]]))

    assert torch.equal(cos.float(), cos.float().bfloat16().float())
    assert torch.equal(sin.float(), sin.float().bfloat16().float())


def test_frequencies_come_from_the_config_and_not_from_a_rounded_buffer():
    model = tiny_model("llama", torch.float32)
    (before,) = rotaries_of(model)
    expected, _ = before.frequencies()
    model.to(torch.bfloat16)
    (after,) = rotaries_of(model)

    assert not torch.equal(model.model.rotary_emb.inv_freq.float(), expected)
    assert torch.equal(after.frequencies()[0], expected)


def test_a_config_that_changes_after_the_override_changes_the_table():
    model = tiny_model("llama", torch.float32)
    override_tables(model, "exact")
    x, position_ids = torch.zeros(1), torch.tensor([[5]])
    before = model.model.rotary_emb(x, position_ids)[0]
    model.config.rope_parameters["rope_theta"] = 7.0

    assert not torch.equal(model.model.rotary_emb(x, position_ids)[0], before)


def test_layer_types_keep_their_own_frequencies():
    model = tiny_model("gemma3_text", torch.float32)
    full, sliding = sorted(rotaries_of(model), key=lambda found: found.layer_type)

    assert (full.layer_type, sliding.layer_type) == ("full_attention", "sliding_attention")
    assert not torch.equal(full.frequencies()[0], sliding.frequencies()[0])


@pytest.mark.parametrize("length", [20, 65])
def test_methods_that_choose_by_length_choose_as_transformers_does(length):
    long, short = [2.0, 3.0, 4.0, 5.0], [1.0, 1.0, 1.5, 2.0]
    parameters = {
        "rope_type": "longrope", "rope_theta": 10_000.0, "long_factor": long, "short_factor": short, "factor": 2.0,
        "original_max_position_embeddings": 32,
    }  # fmt: skip
    model = tiny_model("llama", torch.float32, rope_parameters=parameters)
    x, position_ids = torch.zeros(1), torch.arange(length)[None]
    theirs = model.model.rotary_emb(x, position_ids)
    for handle in override_tables(model, "float32").values():
        ours = model.model.rotary_emb(x, position_ids)
        handle.remove()
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("precision", ["bfloat16", "float32", "exact"])
def test_dynamic_frequencies_are_those_of_this_input_alone_where_transformers_keeps_a_longer_ones(family, precision):
    """Up to the original length those of the model as it was; the last two lengths are where transformers differs."""
    model = extend(tiny_model(family, torch.float32), "dynamic", 4)
    own, stated = model, copy.deepcopy(model)
    override_tables(stated, precision)
    kind = () if family == "llama" else ("full_attention",)
    original = read_original(model.config, *kind)

    def cos(model, length):
        (module,) = {found.module for found in rotaries_of(model)}
        return module(torch.zeros(1), torch.arange(length)[None], *kind)[0]

    kept = {}
    for length in (20, 400, 300, original.length):
        inv_freq, _ = method_frequencies(
            "dynamic", original.theta, original.rotary_dim, original.length, 4.0, seq_len=length
        )
        table = rotary_table(torch.arange(length)[None], inv_freq, precision, torch.float32)
        assert torch.equal(cos(stated, length), in_form(table, "halves")[0])
        kept[length] = torch.allclose(cos(own, length), in_form(table, "halves")[0].float(), atol=1e-2)
    assert kept == {20: True, 400: True, 300: False, original.length: False}


def test_tables_of_many_lengths_keep_the_frequencies_of_one():
    model = extend(tiny_model("llama", torch.float32), "dynamic", 4)
    (hook,) = override_tables(model, "exact")
    for length in range(200, 230):
        model.model.rotary_emb(torch.zeros(1), torch.arange(length)[None])

    assert len(hook._frequencies) == 1


def test_two_kinds_of_layers_compute_their_frequencies_once(monkeypatch):
    model = tiny_model("gemma3_text", torch.float32)
    override_tables(model, "exact")
    computed, frequencies = [], Rotary.frequencies
    monkeypatch.setattr(Rotary, "frequencies", lambda self, *args: computed.append(self) or frequencies(self, *args))
    for _ in range(3):
        model(input_ids=TOKENS)

    assert sorted(found.layer_type for found in computed) == ["full_attention", "sliding_attention"]


# --- what is not recognised ------------------------------------------------------------------------------------------


def test_a_rotary_module_of_another_make_is_refused_and_nothing_changes():
    model = tiny_model("llama", torch.float32)

    class OwnRotaryEmbedding(type(model.model.rotary_emb)):
        def forward(self, x, position_ids):
            cos, sin = super().forward(x, position_ids)
            return cos, -sin

    model.model.rotary_emb = OwnRotaryEmbedding(tiny_config("llama"))
    with pytest.raises(
        ValueError,
        match=r"^model must have rotary modules as transformers writes them, got 'model.rotary_emb' "
        r"\(OwnRotaryEmbedding\), one that gives another table than its config's frequencies; pass",
    ):
        override_tables(model, "exact")
    assert not any(module._forward_hooks for module in model.modules())


def test_a_model_without_rotary_positions_is_refused():
    with pytest.raises(
        ValueError, match=r"^model must have rotary position embeddings for rope_precision='exact', got"
    ):
        override_tables(nn.Linear(2, 2), "exact")


def test_every_form_is_recognised_in_some_family():
    forms = {recognise(found) for name in CORE for found in rotaries_of(tiny_model(name, torch.float32))}

    assert forms == set(rotary.ROTARY_FORMS)
