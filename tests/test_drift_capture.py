"""Captured states are the model's: rotated by other code, they are what a run without any capture attends to."""

import sys
from contextlib import contextmanager

import pytest
import torch
from families import each_family, state_of, tiny_config, tiny_model
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM

from anchor_attn import PackedLayout, wrap
from anchor_attn.configs import configs_of
from anchor_attn.drift import capture_states, measure_drift, measure_shifted
from anchor_attn.drift.models.fix import measure_fix
from anchor_attn.drift.policies import POLICIES, rotate
from anchor_attn.hf.forward import attention_before, attention_forward, defer_mask
from anchor_attn.rope import apply_rotary, rotary_table

LAYOUT = PackedLayout.from_lengths([[9, 6, 5], [3, 15, 2]])
# Not in the dtype of their states; of the second, cos and sin are float32 too; the third needs no buffer.
ROTATED_IN_FLOAT32 = ("cohere", "cohere2", "cohere2_moe", "modernbert_decoder")
TABLES_IN_FLOAT32 = ("deepseek_v2", "ernie4_5", "ernie4_5_moe", "flex_olmo", "olmo", "olmo2", "olmo3")
FREQUENCIES_COMPUTED = ("phimoe",)
NO_POSITIONS = ("gpt2", "opt")
NORM_BEHIND = ("hunyuan_v1_dense", "hunyuan_v1_moe", "nanochat")
# Halves and neighbours, whole and partial heads, windows, softcaps, sinks, two thetas, a latent, shared keys, no norm.
CORE = (
    "cohere", "deepseek_v2", "deepseek_v3", "gemma2", "gemma3_text", "gemma4_text", "glm4", "gpt_neox", "gpt_oss",
    "llama", "mistral", "olmo2", "phi", "qwen2", "qwen3", "smollm3",
)  # fmt: skip
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def some_tokens():
    """Tokens [2, 21]; the anchor is token 1 in every row."""
    tokens = torch.randint(3, 67, (2, 21), generator=torch.Generator().manual_seed(1))
    return tokens.masked_fill(LAYOUT.document_ids == 0, 1)


@contextmanager
def recorded(model):
    """The query, key and scale of each attention call, in order, of a model that nobody captures."""
    seen = []
    configs = [config for module in model.modules() for config in configs_of(module).values()]
    before = {id(config): config._attn_implementation for config in configs}

    def attend(module, query, key, value, attention_mask, **kwargs):
        seen.append((query, key, kwargs.get("scaling")))
        name = before[id(module.config)]
        if name == "anchor_attn":
            return attention_forward(module, query, key, value, attention_mask, **kwargs)
        mask = attention_mask.build(name)
        return attention_before(module, name)(module, query, key, value, mask, **kwargs)

    AttentionInterface.register("anchor_attn_test", attend)
    AttentionMaskInterface.register("anchor_attn_test", defer_mask)
    try:
        for config in configs:
            config._attn_implementation = "anchor_attn_test"
        with torch.no_grad():
            yield seen
    finally:
        for config in configs:
            config._attn_implementation = before[id(config)]


def rotated(family, states, x, position_ids):
    """Query or key as a model whose frequencies were cast with its weights rotates it, by `apply_rotary`."""
    inv_freq = states.inv_freq.to(torch.float32 if family in FREQUENCIES_COMPUTED else x.dtype).float()
    table_dtype = torch.float32 if family in TABLES_IN_FLOAT32 else x.dtype
    table = rotary_table(position_ids, inv_freq, "model", table_dtype, states.attention_factor)
    start, stop = states.rotary_start, states.rotary_start + states.rotary_dim
    wide = torch.float32 if family in TABLES_IN_FLOAT32 + ROTATED_IN_FLOAT32 else x.dtype
    cos, sin = (part.to(wide) for part in table)
    turned = apply_rotary(x[..., start:stop].to(wide), cos, sin, "model", states.interleaved).to(x.dtype)
    return torch.cat((x[..., :start], turned, x[..., stop:]), dim=-1)


def scores(query, key, scale):
    """As eager attention multiplies them, in their dtype."""
    return query @ key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).mT * scale


# --- the states are the model's --------------------------------------------------------------------------------------


@DTYPES
@each_family(CORE, without=(*NO_POSITIONS, *NORM_BEHIND))
def test_rotated_states_and_their_scores_are_those_of_a_plain_run_to_the_bit(family, dtype):
    model, tokens = tiny_model(family, dtype), some_tokens()
    states = capture_states(model, tokens)
    with recorded(model) as seen:
        model(input_ids=tokens, use_cache=False)

    position_ids = torch.arange(tokens.shape[1])[None]
    assert states
    for each in states:
        query, key, scale = seen[each.layer]
        ours = [rotated(family, each, x, position_ids) for x in (each.query, each.key)]
        assert each.query.dtype == dtype
        # Complex numbers are multiplied with fused sums, which apply_rotary has not.
        if family == "deepseek_v2" and dtype == torch.float32:
            torch.testing.assert_close(ours, [query, key], rtol=0, atol=1e-6)
            continue
        assert torch.equal(ours[0], query)
        assert torch.equal(ours[1], key)
        assert torch.equal(scores(*ours, each.score_scale), scores(query, key, scale))


@DTYPES
@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "llama", "cohere2"])
def test_states_of_a_packed_row_are_those_that_its_wrapped_model_attends_to(family, dtype):
    model, tokens = wrap(tiny_model(family, dtype), "intra_doc"), some_tokens()
    position_ids = LAYOUT.position_ids("reset")
    states = capture_states(model, tokens, position_ids=position_ids, document_ids=LAYOUT)
    with recorded(model) as seen:
        model(input_ids=tokens, position_ids=position_ids, document_ids=LAYOUT)

    for each in states:
        for x, theirs in zip((each.query, each.key), seen[each.layer], strict=False):
            assert torch.equal(rotated(family, each, x, position_ids), theirs)


def test_states_of_one_document_know_nothing_of_another():
    model, tokens = wrap(tiny_model("llama"), "anchor"), some_tokens()
    other = tokens.clone()
    other[:, 1:4] = 5
    mine, theirs = (capture_states(model, ids, document_ids=LAYOUT)[1].query for ids in (tokens, other))
    plain = [capture_states(model, ids)[1].query for ids in (tokens, other)]

    changed = (LAYOUT.document_ids == 1)[:, None, :, None]
    assert torch.equal(mine.masked_fill(changed, 0), theirs.masked_fill(changed, 0))
    assert not torch.equal(plain[0].masked_fill(changed, 0), plain[1].masked_fill(changed, 0))


@pytest.mark.parametrize("precision", ["bfloat16", "float32", "exact"])
def test_a_wrapped_model_of_another_rope_precision_has_the_same_states_in_its_own_dtype(precision):
    tokens = some_tokens()
    expected = capture_states(wrap(tiny_model("llama", torch.bfloat16)), tokens, document_ids=LAYOUT)[0]
    model = wrap(tiny_model("llama", torch.bfloat16), rope_precision=precision)
    found = capture_states(model, tokens, document_ids=LAYOUT)[0]

    assert found.query.dtype == torch.bfloat16
    assert torch.equal(found.query, expected.query)
    assert torch.equal(found.key, expected.key)


def test_the_policy_of_transformers_rotates_captured_states_as_the_model_does():
    model, tokens = tiny_model("llama", torch.bfloat16), some_tokens()
    model.model.rotary_emb.inv_freq = tiny_model("llama", torch.float32).model.rotary_emb.inv_freq  # as when loaded
    with recorded(model) as seen:
        model(input_ids=tokens, use_cache=False)

    for each in capture_states(model, tokens):
        for x, theirs in zip((each.query, each.key), seen[each.layer], strict=False):
            ours = rotate(x[1], torch.arange(tokens.shape[1]), each, POLICIES["bf16_cos_sin"])
            assert torch.equal(ours, theirs[1])


def test_one_token_at_position_0_tells_as_much_of_the_rotation_as_many():
    for family in ("cohere", "glm4", "llama", "deepseek_v3", "gemma3_text"):
        model = tiny_model(family, torch.float32)
        for one, many in zip(
            capture_states(model, some_tokens()[:, :1]), capture_states(model, some_tokens()), strict=True
        ):
            assert (one.rotary_start, one.interleaved) == (many.rotary_start, many.interleaved)
            assert torch.equal(one.inv_freq, many.inv_freq)


def test_frequencies_come_from_the_config_where_a_cast_has_rounded_the_buffers():
    cast, plain = (
        capture_states(tiny_model("llama", dtype), some_tokens()) for dtype in (torch.bfloat16, torch.float32)
    )
    assert torch.equal(cast[0].inv_freq, plain[0].inv_freq)
    assert not torch.equal(plain[0].inv_freq, plain[0].inv_freq.bfloat16().float())


def test_what_makes_scores_of_query_and_key_is_captured_with_them():
    gemma2, gpt_oss, gemma3 = (
        capture_states(tiny_model(family, torch.float32), some_tokens())
        for family in ("gemma2", "gpt_oss", "gemma3_text")
    )
    assert [(each.sliding_window, each.softcap, each.scale) for each in gemma2] == [(4, 0.5, 1.0), (None, 0.5, 1.0)]
    assert torch.equal(gpt_oss[1].sinks, tiny_model("gpt_oss", torch.float32).model.layers[1].self_attn.sinks)
    assert gpt_oss[0].attention_factor == pytest.approx(1.1386294, abs=1e-6)
    assert not torch.equal(gemma3[0].inv_freq, gemma3[1].inv_freq)


def test_captured_states_can_be_measured():
    report = measure_drift(
        states=capture_states(tiny_model("llama", torch.bfloat16), some_tokens()),
        shifts=[1000],
        policies=["exact"],
        stages=False,
    )
    assert [record.layer for record in report.select(policy="exact")] == [0, 1]
    assert all(record.mean_abs > record.floor for record in report.select(policy="exact"))


# --- which layers ----------------------------------------------------------------------------------------------------


def test_layers_that_are_asked_for_come_as_they_do_with_all_others():
    for family in ("llama", "gemma4_text"):
        model = tiny_model(family, torch.float32)
        everything = capture_states(model, some_tokens())
        last = len(everything) - 1
        found = capture_states(model, some_tokens(), layers=[last])
        assert [each.layer for each in found] == [last]
        assert torch.equal(found[0].query, everything[last].query)
        assert torch.equal(found[0].key, everything[last].key)


def test_a_key_that_layers_share_is_unrotated_in_each_of_them():
    first, second, third, fourth = capture_states(tiny_model("gemma4_text", torch.float32), some_tokens())
    assert torch.equal(first.key, third.key)
    assert torch.equal(second.key, fourth.key)
    assert not torch.equal(first.query, third.query)


def test_layers_without_positions_are_left_out():
    model = tiny_model("smollm3", torch.float32)
    assert [each.layer for each in capture_states(model, some_tokens())] == [0]
    with pytest.raises(ValueError, match=r"layers must be those with rotary positions, got 1, which has none"):
        capture_states(model, some_tokens(), layers=[0, 1])


def test_a_model_whose_layers_rotate_nothing_is_refused():
    model = tiny_model("smollm3", torch.float32, no_rope_layers=[0, 0])
    with pytest.raises(ValueError, match="must have rotary position embeddings, got SmolLM3ForCausalLM, whose layers"):
        capture_states(model, some_tokens())


def test_layers_after_the_last_that_is_asked_for_do_not_run():
    model = tiny_model("llama", torch.float32)
    ran = []
    model.model.layers[1].register_forward_hook(lambda *_: ran.append(1))
    capture_states(model, some_tokens(), layers=[0])
    assert not ran


# --- the model comes out as it went in -------------------------------------------------------------------------------


@pytest.mark.parametrize("is_wrapped", [False, True], ids=["plain", "wrapped"])
def test_the_model_and_the_random_numbers_are_left_as_they_were(is_wrapped):
    model, tokens = tiny_model("gemma3_text", torch.float32), some_tokens()
    if is_wrapped:
        wrap(model)
    expected, before = model(input_ids=tokens).logits, state_of(model)
    model.model.layers[0].train()
    modes, random = [module.training for module in model.modules()], torch.get_rng_state()
    capture_states(model, tokens)

    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    model.eval()
    assert state_of(model) == before
    assert torch.equal(model(input_ids=tokens).logits, expected)


ROPES = {
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "longrope": {
        "rope_type": "longrope", "short_factor": [1.0], "long_factor": [3.0], "factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}  # fmt: skip


def length_choosing(rope):
    config = tiny_config("llama")
    size = config.head_dim // 2
    changed = {name: value * size if isinstance(value, list) else value for name, value in rope.items()}
    config.max_position_embeddings = 16
    config.rope_parameters = {"rope_theta": 10_000.0, **changed}
    return AutoModelForCausalLM.from_config(config).eval()


def rotary_state(model):
    rotary = model.model.rotary_emb
    held = {name: value for name, value in vars(rotary).items() if not name.startswith("_")}
    held |= {name: buffer.clone() for name, buffer in rotary.named_buffers()}
    return {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in held.items()}


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_frequencies_that_a_forward_rewrites_are_put_back(rope):
    model, tokens = length_choosing(rope), some_tokens()
    assert tokens.shape[1] > 16
    before, short = rotary_state(model), tokens[:, :16]
    capture_states(model, tokens)
    assert rotary_state(model) == before
    measure_shifted(model, short, [1_000], ["float32"], floor=False)
    assert rotary_state(model) == before
    measure_fix(capture_states(model, short), [1_000], queries=4, model=model, input_ids=short)
    assert rotary_state(model) == before
    model(input_ids=tokens)
    assert rotary_state(model) != before  # so that there was something to put back


def test_so_it_is_after_a_refusal():
    model = tiny_model("nanochat", torch.float32)
    before = state_of(model)
    with pytest.raises(ValueError, match="layer 0 of NanoChatForCausalLM"):
        capture_states(model, some_tokens())
    assert state_of(model) == before


def test_another_model_of_the_same_config_is_not_captured():
    config = tiny_config("llama")
    model, other = (AutoModelForCausalLM.from_config(config).eval() for _ in range(2))
    expected = other(input_ids=some_tokens()).logits
    capture_states(model, some_tokens())
    assert torch.equal(other(input_ids=some_tokens()).logits, expected)


# PEFT asks by a name that transformers 5.23 has replaced.
@pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in v6:FutureWarning")
def test_an_adapted_model_is_captured_with_its_adapter():
    peft = pytest.importorskip("peft")
    plain = tiny_model("llama", torch.float32)
    expected = capture_states(plain, some_tokens())[0]
    adapted = peft.get_peft_model(plain, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False, r=2))
    found = capture_states(adapted, some_tokens())[0]
    assert torch.equal(found.key, expected.key)
    assert not torch.equal(found.query, expected.query)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", NO_POSITIONS)
def test_a_model_without_rotary_positions_is_refused(family):
    with pytest.raises(ValueError, match=r"model must have rotary position embeddings, got \w+ without; pass a model"):
        capture_states(tiny_model(family, torch.float32), some_tokens())


@pytest.mark.parametrize("family", NORM_BEHIND)
def test_a_norm_behind_the_rotation_is_refused_with_the_layer_named(family):
    with pytest.raises(ValueError, match=r"got layer 0 of \w+ with more than a rotation before its attention"):
        capture_states(tiny_model(family, torch.float32), some_tokens())


def test_frequencies_that_are_not_the_config_s_are_refused():
    model = tiny_model("llama", torch.float32)
    model.model.rotary_emb.register_forward_hook(lambda module, args, output: (output[0], output[1] * 0.9))
    with pytest.raises(ValueError, match=r"layer 0 of LlamaForCausalLM with cos and sin that are 1\.0e-01 from those"):
        capture_states(model, some_tokens())


def test_a_rotation_in_an_arithmetic_of_its_own_is_refused(monkeypatch):
    model = tiny_model("llama", torch.float32)
    code = sys.modules[type(model).__module__]
    own = code.apply_rotary_pos_emb

    def scaled(q, k, cos, sin, **kwargs):
        return tuple(x.float() for x in own(q.double(), k.double(), cos.double(), sin.double(), **kwargs))

    monkeypatch.setattr(code, "apply_rotary_pos_emb", scaled)
    with pytest.raises(ValueError, match=r"layer 0 of LlamaForCausalLM with a rotation of its own \(by \d"):
        capture_states(model, some_tokens())


def test_a_model_that_ignores_the_attention_interface_is_refused():
    class Ignoring(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner
            self.config = inner.config

        def forward(self, hidden_states, **kwargs):
            return hidden_states, None

    model = tiny_model("llama", torch.float32)
    for layer in model.model.layers:
        layer.self_attn = Ignoring(layer.self_attn)
    with pytest.raises(ValueError, match="AttentionInterface, got LlamaForCausalLM, which ignores it"):
        capture_states(model, some_tokens())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input_ids": torch.ones(4, dtype=torch.long)}, ValueError, r"must have shape \[B, S\], got \[4\]; add"),
        ({"input_ids": torch.ones(1, 4)}, TypeError, "input_ids must be a tensor of integers, got torch.float32"),
        ({"input_ids": [[1, 2]]}, TypeError, "input_ids must be a tensor of integers, got list"),
        ({"input_ids": torch.ones(1, 0, dtype=torch.long)}, ValueError, r"input_ids must have .* got \[1, 0\]"),
        ({"position_ids": torch.arange(4)[None]}, ValueError, r"position_ids must have shape \[2, 21\], got \[1, 4\]"),
        ({"input_ids": torch.full((1, 4), 10**6)}, ValueError, "input_ids must lie in 0 … .*LlamaForC.*got 1,000,000;"),
        ({"input_ids": torch.full((1, 4), -1)}, ValueError, "input_ids must lie in 0 … .*LlamaForCausalLM, got -1;"),
        ({"layers": [0, 2]}, ValueError, "layers must be among 0 … 1, got 2"),
        ({"layers": []}, ValueError, "layers must name one at least, got none"),
        ({"layers": [-1]}, ValueError, "layers must be among 0 … 1, got -1"),
        ({"layers": ["0"]}, TypeError, "layers must be"),
        ({"document_ids": LAYOUT}, ValueError, "document_ids must go to a wrapped model, got LlamaForCausalLM"),
        ({"model": nn.Linear(2, 2)}, TypeError, "model must be a transformers PreTrainedModel, got Linear"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(arguments, error, message):
    given = {"model": tiny_model("llama", torch.float32), "input_ids": some_tokens(), **arguments}
    with pytest.raises(error, match=message) as raised:
        capture_states(given.pop("model"), given.pop("input_ids"), **given)
    assert "\n" not in str(raised.value)
