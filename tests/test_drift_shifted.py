"""A whole model at two shifts: without rounding rotation leaves nothing of it, and other positions show."""

import pytest
import torch
from families import state_of, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig

from anchor_attn import wrap
from anchor_attn.drift import States, capture_states, measure_drift, measure_shifted, measure_sinks
from anchor_attn.rope import inverse_frequencies

ROTARY_ALONE = ("cohere2", "deepseek_v3", "gemma3_text", "gpt_neox", "gpt_oss", "llama", "phi")


def some_tokens():
    return torch.randint(3, 67, (2, 21), generator=torch.Generator().manual_seed(1))


def with_learned_positions(model):
    """A rotary model that adds a learned vector to each embedding as well, by position."""
    learned = nn.Embedding(200, 32)
    model.model.learned = learned.to(model.dtype)
    with torch.no_grad():
        learned.weight.normal_(std=1e-3, generator=torch.Generator().manual_seed(0))

    def add(module, args, kwargs):
        tokens = module.embed_tokens(kwargs.pop("input_ids")) + module.learned(kwargs["position_ids"])
        return args, {**kwargs, "inputs_embeds": tokens}

    model.model.register_forward_pre_hook(add, with_kwargs=True)
    return model


# --- rounding, and what is none --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ROTARY_ALONE)
def test_of_a_rotary_model_nothing_is_left_of_a_shift_without_rounding(family):
    report = measure_shifted(tiny_model(family, torch.float32), some_tokens(), [64])
    bfloat16, float32 = (report.at(dtype, 64).logits_mean_abs for dtype in ("bfloat16", "float32"))
    angles, exact = (report.at("float64", 64, rope_precision=p).logits_mean_abs for p in ("model", "exact"))

    assert bfloat16 > 1000 * float32 > 0
    assert float32 > angles > 1e3 * exact
    assert report.architectural_share(64) == exact / bfloat16 < 1e-12


def test_angles_in_float32_are_most_of_what_a_float32_model_moves_by_at_a_million():
    report = measure_shifted(tiny_model("llama", torch.float32), some_tokens(), [1_000_000])
    float32, angles = (report.at(dtype, 1_000_000).logits_mean_abs for dtype in ("float32", "float64"))
    assert angles == pytest.approx(float32, rel=0.05)
    assert report.at("float64", 1_000_000, rope_precision="exact").logits_mean_abs < 1e-9 * angles


def test_learned_positions_show_in_every_dtype_from_the_embeddings_on():
    report = measure_shifted(with_learned_positions(tiny_model("llama", torch.float32)), some_tokens(), [64])
    exact = report.at("float64", 64, rope_precision="exact")
    assert report.at("float64", 64, 0, "exact").hidden_rel_rms > 1e-3
    assert exact.logits_mean_abs == pytest.approx(report.at("float32", 64).logits_mean_abs, rel=1e-2)
    assert exact.kl_nats > 0
    assert report.architectural_share(64, "float32") == pytest.approx(1, rel=1e-2)


def test_a_model_of_learned_positions_alone_moves_as_much_in_float64():
    report = measure_shifted(tiny_model("gpt2", torch.float32), some_tokens(), [16])
    assert report.architectural_share(16) == pytest.approx(1, rel=1e-2)
    assert {each.rope_precision for each in report.records} == {"model"}
    assert report.at("float64", 16, 0).hidden_rel_rms > 0.5


# --- the numbers -----------------------------------------------------------------------------------------------------


def test_records_are_what_two_runs_differ_by():
    model, tokens, shift = tiny_model("llama", torch.float32), some_tokens(), 64
    report = measure_shifted(model, tokens, [shift], ["float32"], floor=False)
    position_ids = torch.arange(21).expand(2, 21)
    with torch.no_grad():
        still, moved = (
            model(input_ids=tokens, position_ids=position_ids + by, output_hidden_states=True) for by in (0, shift)
        )
    apart = (moved.logits - still.logits).double().abs()
    likely, likely_after = (torch.distributions.Categorical(logits=each.logits.double()) for each in (still, moved))
    logits, hidden = report.at("float32", shift), report.at("float32", shift, 1)
    before, after = (each.hidden_states[1].double() for each in (still, moved))

    assert len(report.records) == 4  # embeddings, two layers, logits
    assert logits.logits_mean_abs == pytest.approx(float(apart.mean()))
    assert logits.logits_max_abs == float(apart.max())
    assert logits.kl_nats == pytest.approx(float(torch.distributions.kl_divergence(likely, likely_after).mean()))
    assert hidden.hidden_rms == pytest.approx(float((after - before).square().mean().sqrt()))
    assert hidden.hidden_rel_rms == pytest.approx(hidden.hidden_rms / float(before.square().mean().sqrt()))
    assert hidden.hidden_max_abs == float((after - before).abs().max())


def test_a_changed_likeliest_token_is_counted():
    report = measure_shifted(tiny_model("gpt2", torch.float32), some_tokens(), [16], ["float32"], floor=False)
    model, position_ids = tiny_model("gpt2", torch.float32), torch.arange(21).expand(2, 21)
    with torch.no_grad():
        still, moved = (model(some_tokens(), position_ids=position_ids + by).logits.argmax(-1) for by in (0, 16))
    assert 0 < report.at("float32", 16).top1_changed == float((still != moved).double().mean())


def test_long_texts_are_compared_in_blocks(monkeypatch):
    model = tiny_model("llama", torch.float32)
    whole = measure_shifted(model, some_tokens(), [1000], ["bfloat16"], floor=False).at("bfloat16", 1000)
    monkeypatch.setattr("anchor_attn.drift.models.shifted.BLOCK_TOKENS", 5)
    blocks = measure_shifted(model, some_tokens(), [1000], ["bfloat16"], floor=False).at("bfloat16", 1000)
    for name, value in whole.record().items():
        assert blocks.record()[name] == (pytest.approx(value, rel=1e-9) if isinstance(value, float) else value)


def test_frequencies_are_the_config_s_in_every_dtype():
    loaded, cast = tiny_model("llama", torch.float32), tiny_model("llama", torch.float32)
    cast.model.rotary_emb.bfloat16()
    one, two = (measure_shifted(model, some_tokens(), [1000]).records for model in (loaded, cast))
    assert one == two


# --- the model comes out as it went in -------------------------------------------------------------------------------


@pytest.mark.parametrize("is_wrapped", [False, True], ids=["plain", "wrapped"])
def test_the_model_is_left_as_it_was(is_wrapped):
    model, tokens = tiny_model("llama", torch.float32), some_tokens()
    if is_wrapped:
        wrap(model, rope_precision="exact")
    expected, before = model(input_ids=tokens).logits, state_of(model)
    plain = measure_shifted(tiny_model("llama", torch.float32), tokens, [64])
    model.model.layers[0].train()
    assert measure_shifted(model, tokens, [64]).records == plain.records
    assert model.model.layers[0].training
    model.eval()
    assert state_of(model) == before
    assert model.dtype == torch.float32
    assert torch.equal(model(input_ids=tokens).logits, expected)


def test_experts_whose_default_has_no_float64_are_measured_in_it():
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = MixtralConfig(vocab_size=67, num_key_value_heads=2, num_local_experts=4, **sizes)
    model = AutoModelForCausalLM.from_config(config).eval()
    report = measure_shifted(model, some_tokens(), [16], ["float32"])
    assert report.at("float64", 16, rope_precision="exact").logits_mean_abs < 1e-12


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input_ids": torch.ones(1, 4)}, TypeError, "input_ids must be a tensor of integers, got torch.float32"),
        ({"input_ids": torch.arange(4)}, ValueError, r"input_ids must have shape \[B, S\], got \[4\]"),
        ({"shifts": [0, 16]}, ValueError, r"shifts must be at least 1 each, got \[0, 16\]"),
        ({"shifts": [2**29]}, ValueError, r"shifts must stay below 536,870,892 for 21 tokens, got 536,870,912"),
        ({"shifts": []}, ValueError, r"shifts must be at least 1 each, got \[\]"),
        ({"shifts": [1.5]}, TypeError, "shifts must be"),
        ({"dtypes": ["int8"]}, ValueError, r"dtypes must be among float16, .* got \['int8'\]"),
        ({"dtypes": []}, ValueError, r"dtypes must be among float16, .* got \[\]"),
        ({"model": nn.Linear(2, 2)}, TypeError, "model must be a transformers PreTrainedModel, got Linear"),
        (
            {"model": tiny_model("llama", torch.float32).model},
            ValueError,
            "must have a language model's head, got Llama",
        ),
        (
            {"model": tiny_model("gpt2", torch.float32), "shifts": [1000]},
            ValueError,
            "model must run in bfloat16 at positions up to 1,020, got GPT2LMHeadModel, which failed with IndexError",
        ),
    ],
)
def test_bad_input_is_one_line(arguments, error, message):
    given = {"model": tiny_model("llama", torch.float32), "input_ids": some_tokens(), **arguments}
    with pytest.raises(error, match=message) as raised:
        measure_shifted(**given)
    assert "\n" not in str(raised.value)


def test_a_record_that_was_not_measured_is_no_record():
    report = measure_shifted(tiny_model("llama", torch.float32), some_tokens(), [16], ["float32"], floor=False)
    with pytest.raises(KeyError, match="no record of bfloat16, rope 'model', at shift 16"):
        report.at("bfloat16", 16)


# --- the first token -------------------------------------------------------------------------------------------------


def drawn_states(first_key=0.0, heads=2):
    """States of a random normal; the key of token 0 stands out for head 0 at every distance, in a slow pair."""
    draw = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, heads, 64, 8, generator=draw).double() for _ in range(2))
    query[..., 3] = 4.0  # pair 3 turns by 0.001 a position
    key[:, 0, 0, 3] = first_key
    return States(query, key, inverse_frequencies(8, 10_000.0), layer=5)


def test_a_head_that_rests_on_the_first_token_is_told_from_others():
    resting, other = measure_sinks(drawn_states(first_key=40.0), "bf16_cos_sin", 1000)
    assert (resting.layer, resting.head, other.head) == (5, 0, 1)
    assert resting.attention > 0.99
    assert other.attention < 0.2
    without, _ = measure_sinks(drawn_states(first_key=0.0), "bf16_cos_sin", 1000)
    assert without.attention < 0.2


def test_where_all_attention_goes_between_two_tokens_the_first_has_half_of_the_drift():
    states = drawn_states(first_key=0.0, heads=1)
    key = states.key.clone()
    key[:, :, 2:, 3] = -100.0  # tokens 0 and 1 alone draw attention, and what one gains the other loses
    states = States(states.query, key, states.inv_freq)
    only = measure_sinks(states, "bf16_cos_sin", 1000)[0]
    assert only.drift_share == pytest.approx(0.5, abs=1e-3)
    assert 0 < only.attention < 1


@pytest.mark.parametrize("queries", [None, 16])
def test_of_all_heads_together_it_is_what_the_records_by_key_say(queries):
    states = capture_states(tiny_model("gpt_oss", torch.bfloat16), some_tokens())
    sinks = measure_sinks(states, "bf16_cos_sin", 1000, queries=queries)
    report = measure_drift(states=states, policies=["bf16_cos_sin"], shifts=[1000], queries=queries, stages=False)
    for layer in (0, 1):
        first = report.at("bf16_cos_sin", 1000, by="key", level="attention", low=0, layer=layer)
        whole = report.at("bf16_cos_sin", 1000, level="attention", layer=layer)
        mine = [each for each in sinks if each.layer == layer]
        assert sum(each.attention for each in mine) / len(mine) == pytest.approx(first.mean_value)
        assert sum(each.mean_abs for each in mine) / len(mine) == pytest.approx(first.mean_abs)
        drift = sum(each.mean_abs / each.drift_share for each in mine) / len(mine)
        assert first.mean_abs / drift == pytest.approx(first.share)
        assert whole.mean_abs * whole.pairs == pytest.approx(drift * first.pairs)


def test_nothing_drifts_is_no_share_of_it():
    states = States(torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 8), inverse_frequencies(8, 10_000.0))
    record = measure_sinks(states, "exact", 16)[0]
    assert record.drift_share is None
    assert record.attention == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)


def test_sinks_of_no_states_and_of_queries_that_see_no_first_token_are_refused():
    with pytest.raises(ValueError, match="states must hold one layer at least, got none"):
        measure_sinks([])
    states = States(torch.ones(1, 1, 8, 8), torch.ones(1, 1, 8, 8), inverse_frequencies(8, 10_000.0), sliding_window=2)
    with pytest.raises(ValueError, match="queries must include one that sees the first token, got none"):
        measure_sinks(states, queries=2)
