"""Tiny random decoders of the families that `wrap` is proven on, each in a configuration in which its features bite."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from anchor_attn.configs import configs_of

VOCAB_SIZE = 67
# Some go by other names in some families; a config keeps aside what it does not know.
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS = {"head_dim": 8}  # where the default is not hidden size / heads
SLIDING = {"sliding_window": 4}
SLIDING_AND_FULL = {**SLIDING, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
# Multi-head latent attention: queries and keys of 8 + 4, values of 6.
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}


@dataclass(frozen=True)
class Family:
    """How to build a tiny model of a family.

    Attributes:
        config: the name of its class in transformers.
        options: what differs from `SIZES`.
        bites: the keywords of `anchor_attention` whose loss must show in the logits.
        without: options that take away what the model itself does to positions or scores (a rotary part, layers without
            positions, norms of queries and keys); its loss must show as well.
        unequal_heads: whether its values have another size than its queries.
        weights_times: how much larger than freshly drawn its weights are, so that scores leave the linear range.
        float32: whether a softmax, norm or router of its own rounds to float32 in a way that packing moves.
        checkpoints: whether its own code can be trained with checkpointing.
    """

    config: str
    options: dict[str, Any] = field(default_factory=dict)
    bites: tuple[str, ...] = ()
    without: dict[str, Any] = field(default_factory=dict)
    unequal_heads: bool = False
    weights_times: float = 4.0
    float32: bool = False
    checkpoints: bool = True


WINDOW = ("sliding_window",)
FAMILIES = {
    "afmoe": Family("AfmoeConfig", {**HEADS, **EXPERTS, **SLIDING_AND_FULL, "num_dense_layers": 1}, WINDOW),
    "apertus": Family("ApertusConfig", HEADS),
    "arcee": Family("ArceeConfig", HEADS),
    "axk1": Family("AXK1Config", {**LATENT, **EXPERTS}, unequal_heads=True, float32=True),
    "bitnet": Family("BitNetConfig", HEADS),
    "cohere": Family("CohereConfig", {"use_qk_norm": True}, without={"use_qk_norm": False}),
    "cohere2": Family("Cohere2Config", {**SLIDING_AND_FULL, "logit_scale": 1.0}, WINDOW),
    "cohere2_moe": Family("Cohere2MoeConfig", {**HEADS, **EXPERTS, **SLIDING_AND_FULL, "logit_scale": 1.0}, WINDOW),
    "cwm": Family("CwmConfig", {**HEADS, **SLIDING_AND_FULL}, WINDOW),
    "dbrx": Family(
        "DbrxConfig",
        {
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
            "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
    "deepseek_v2": Family("DeepseekV2Config", {**LATENT, **EXPERTS}, unequal_heads=True, float32=True),
    "deepseek_v3": Family("DeepseekV3Config", {**LATENT, **EXPERTS}, unequal_heads=True, float32=True),
    "diffllama": Family("DiffLlamaConfig", HEADS, float32=True),
    "dots1": Family("Dots1Config", {**HEADS, **EXPERTS, **SLIDING_AND_FULL}, WINDOW, float32=True),
    "ernie4_5": Family("Ernie4_5Config", HEADS),
    "ernie4_5_moe": Family("Ernie4_5_MoeConfig", {**HEADS, **EXPERTS, "moe_num_experts": 4, "moe_k": 2}, float32=True),
    "exaone4": Family("Exaone4Config", {**HEADS, **SLIDING_AND_FULL}, WINDOW),
    "exaone_moe": Family(
        "ExaoneMoeConfig",
        {**HEADS, **EXPERTS, **SLIDING_AND_FULL, "first_last_k_dense_replace": 1},
        WINDOW,
        float32=True,
    ),
    "flex_olmo": Family("FlexOlmoConfig", EXPERTS),
    "flint": Family("FlintConfig", {**HEADS, **EXPERTS, **SLIDING_AND_FULL}, ("sliding_window", "sinks"), float32=True),
    "gemma": Family("GemmaConfig", HEADS),
    "gemma2": Family(
        "Gemma2Config",
        {
            **HEADS,
            **SLIDING,
            "attn_logit_softcapping": 0.5,
            "final_logit_softcapping": None,
            "query_pre_attn_scalar": 1,
        },
        ("sliding_window", "softcap", "scale"),
        weights_times=8.0,
        float32=True,
    ),
    "gemma3_text": Family(
        "Gemma3TextConfig",
        {**HEADS, **SLIDING_AND_FULL, "sliding_window": 5, "query_pre_attn_scalar": 1},
        ("sliding_window", "scale"),
    ),
    "gemma3n_text": Family(
        "Gemma3nTextConfig",
        {
            **HEADS,
            **SLIDING_AND_FULL,
            "intermediate_size": [48, 48],
            "activation_sparsity_pattern": [0.0, 0.0],
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB_SIZE,
            "laurel_rank": 4,
        },
        ("sliding_window", "scale"),
    ),
    "gemma4_text": Family(
        "Gemma4TextConfig",
        {
            **HEADS,
            **SLIDING,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "global_head_dim": 8,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB_SIZE,
        },
        ("sliding_window", "scale"),
    ),
    "glm": Family("GlmConfig", {**HEADS, "partial_rotary_factor": 0.5}),
    "glm4": Family("Glm4Config", {**HEADS, "partial_rotary_factor": 0.5}),
    "glm4_moe": Family(
        "Glm4MoeConfig", {**HEADS, **EXPERTS, "use_qk_norm": True}, without={"use_qk_norm": False}, float32=True
    ),
    "glm4_moe_lite": Family("Glm4MoeLiteConfig", {**LATENT, **EXPERTS}, unequal_heads=True, float32=True),
    "gpt2": Family(
        "GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "scale_attn_by_inverse_layer_idx": True}, ("scale",)
    ),
    "gpt_neox": Family("GPTNeoXConfig"),
    "gpt_oss": Family(
        "GptOssConfig",
        {
            **HEADS,
            **EXPERTS,
            **SLIDING_AND_FULL,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
            },
        },
        ("sliding_window", "sinks"),
    ),
    "granite": Family("GraniteConfig", {"attention_multiplier": 1.0}, ("scale",)),
    "granite_swa": Family(
        "GraniteSWAConfig",
        {**SLIDING_AND_FULL, "attention_multiplier": 1.0},
        ("sliding_window", "sinks", "scale"),
        float32=True,
    ),
    "granitemoe": Family("GraniteMoeConfig", {**EXPERTS, "attention_multiplier": 1.0}, ("scale",)),
    "granitemoe_swa": Family(
        "GraniteMoeSWAConfig",
        {**EXPERTS, **SLIDING_AND_FULL, "attention_multiplier": 1.0},
        ("sliding_window", "sinks", "scale"),
        float32=True,
    ),
    "granitemoeshared": Family(
        "GraniteMoeSharedConfig", {**EXPERTS, "shared_intermediate_size": 16, "attention_multiplier": 1.0}, ("scale",)
    ),
    "helium": Family("HeliumConfig", HEADS),
    "hrm_text": Family("HrmTextConfig", HEADS),
    "hunyuan_v1_dense": Family("HunYuanDenseV1Config", HEADS),
    "hunyuan_v1_moe": Family("HunYuanMoEV1Config", {**HEADS, "num_experts": 4, "moe_topk": 2}),
    "hy_v3": Family("HYV3Config", {**HEADS, **EXPERTS}, float32=True),
    "hyperclovax": Family("HyperCLOVAXConfig", {**HEADS, "attention_multiplier": 1.0}, ("scale",)),
    "internlm3": Family("InternLM3Config", HEADS),
    "iquestcoder": Family("IQuestCoderConfig", HEADS),
    "jais2": Family("Jais2Config", HEADS),
    "jetmoe": Family(
        "JetMoeConfig", {"kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2}, checkpoints=False
    ),
    "kolibri1": Family("Kolibri1Config", {**HEADS, **EXPERTS, **SLIDING_AND_FULL}, WINDOW, float32=True),
    "laguna": Family("LagunaConfig", {**HEADS, **EXPERTS, **SLIDING_AND_FULL}, WINDOW, float32=True),
    "llama": Family("LlamaConfig"),
    "longcat_flash": Family(
        "LongcatFlashConfig",
        {
            **LATENT,
            **EXPERTS,
            "head_dim": 4,
            "num_layers": 2,
            "num_hidden_layers": 4,
            "ffn_hidden_size": 32,
            "expert_ffn_hidden_size": 16,
            "zero_expert_num": 2,
            "moe_topk": 2,
        },
        unequal_heads=True,
        float32=True,
    ),
    "mellum": Family("MellumConfig", {**HEADS, **EXPERTS, **SLIDING_AND_FULL}, WINDOW),
    "mimo_v2_flash": Family(
        "MiMoV2FlashConfig",
        {**HEADS, **EXPERTS, **SLIDING_AND_FULL},
        ("sliding_window", "sinks"),
        unequal_heads=True,
        float32=True,
    ),
    "minicpm3": Family("MiniCPM3Config", LATENT, unequal_heads=True),
    "minimax_m2": Family("MiniMaxM2Config", {**HEADS, **EXPERTS}, float32=True),
    "ministral": Family("MinistralConfig", {**HEADS, **SLIDING_AND_FULL}, WINDOW),
    "ministral3": Family("Ministral3Config", {**HEADS, **SLIDING}, WINDOW),
    "mistral": Family("MistralConfig", SLIDING, WINDOW),
    "mixtral": Family("MixtralConfig", {**EXPERTS, **SLIDING}, WINDOW),
    "modernbert_decoder": Family(
        "ModernBertDecoderConfig",
        {"local_attention": 8, "layer_types": ["sliding_attention", "full_attention"]},
        WINDOW,
    ),
    "nanochat": Family("NanoChatConfig", HEADS),
    "olmo": Family("OlmoConfig", {"clip_qkv": 0.5}, without={"clip_qkv": None}),
    "olmo2": Family("Olmo2Config"),
    "olmo3": Family("Olmo3Config", SLIDING_AND_FULL, WINDOW),
    "olmoe": Family("OlmoeConfig", {**EXPERTS, "clip_qkv": 0.5}, without={"clip_qkv": None}),
    "opt": Family("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32}, ("scale",)),
    "persimmon": Family("PersimmonConfig", {"qk_layernorm": True}, without={"qk_layernorm": False}),
    "phi": Family("PhiConfig", {"qk_layernorm": True}, without={"qk_layernorm": False}),
    "phi3": Family("Phi3Config", SLIDING, WINDOW),
    "phimoe": Family("PhimoeConfig", EXPERTS),
    "qwen2": Family("Qwen2Config", {**SLIDING, "use_sliding_window": True, "max_window_layers": 1}, WINDOW),
    "qwen2_moe": Family("Qwen2MoeConfig", EXPERTS),
    "qwen3": Family("Qwen3Config", {**HEADS, **SLIDING, "use_sliding_window": True, "max_window_layers": 1}, WINDOW),
    "qwen3_moe": Family("Qwen3MoeConfig", {**HEADS, **EXPERTS, **SLIDING, "use_sliding_window": True}, WINDOW),
    "seed_oss": Family("SeedOssConfig", HEADS),
    "smollm3": Family("SmolLM3Config", {"no_rope_layers": [1, 0]}, without={"no_rope_layers": [1, 1]}),
    "solar_open": Family("SolarOpenConfig", {**HEADS, **EXPERTS}, float32=True),
    "starcoder2": Family("Starcoder2Config", SLIDING, WINDOW),
    "vaultgemma": Family(
        "VaultGemmaConfig",
        {
            **HEADS,
            **SLIDING_AND_FULL,
            "attn_logit_softcapping": 0.5,
            "final_logit_softcapping": None,
            "query_pre_attn_scalar": 1,
        },
        ("sliding_window", "softcap", "scale"),
        weights_times=8.0,
        float32=True,
    ),
    "youtu": Family("YoutuConfig", LATENT, unequal_heads=True),
}


def tiny_config(name: str, **options: Any) -> PreTrainedConfig:
    """The config of a family, in transformers' own class; the test skips itself where transformers has none."""
    family = FAMILIES[name]
    build: Callable[..., PreTrainedConfig] | None = getattr(transformers, family.config, None)
    if build is None:
        pytest.skip(f"transformers {transformers.__version__} has no {family.config}")
    return build(**{**SIZES, **family.options, **options})


def tiny_model(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> PreTrainedModel:
    """A model of a family in eval mode, the same weights each time; `options` go to the config."""
    family = FAMILIES[name]
    torch.manual_seed(0)
    # Older transformers run softcapped models on SDPA by default, which has no softcap and says nothing.
    attention = {"attn_implementation": "eager"} if "softcap" in family.bites else {}
    model = AutoModelForCausalLM.from_config(tiny_config(name, **options), **attention)
    model.set_experts_implementation("eager")  # the default has no float64
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "sinks" in parameter_name:
                parameter.normal_()
            elif parameter.ndim > 1 and "embed" not in parameter_name:
                parameter.mul_(family.weights_times)
    return model.to(dtype).eval()


def state_of(model: PreTrainedModel) -> dict[str, Any]:
    """All that `wrap` touches: implementations, module attributes, hooks, training flags and weights' names."""
    return {
        "implementations": [config._attn_implementation for m in model.modules() for config in configs_of(m).values()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "hooks": [
            len(module._forward_pre_hooks) + len(module._forward_hooks) + len(module._forward_pre_hooks_with_kwargs)
            for module in model.modules()
        ],
        "training": [module.training for module in model.modules()],
        "weights": list(model.state_dict()),
    }


def each_family(quick: Collection[str], without: Collection[str] = ()) -> pytest.MarkDecorator:
    """Parametrize a test by family; those that are not quick are slow."""
    names = [name for name in FAMILIES if name not in without]
    return pytest.mark.parametrize(
        "family", [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]
    )
