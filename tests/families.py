"""Tiny random decoders of the families that `wrap` is proven on, each in a configuration in which its features bite."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

VOCAB_SIZE = 67
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
SLIDING_AND_FULL = ["sliding_attention", "full_attention"]


@dataclass(frozen=True)
class Family:
    """How to build a tiny model of a family.

    Attributes:
        config: the name of its class in transformers.
        options: what differs from `SIZES`.
        bites: the keywords of `anchor_attention` whose loss must show in the logits.
        weights_times: how much larger than freshly drawn its weights are, so that scores leave the linear range.
        dtype: float64 where the model can.
        experts: the implementation of its experts, where it has a choice.
    """

    config: str
    options: dict[str, Any]
    bites: tuple[str, ...] = ()
    weights_times: float = 4.0
    dtype: torch.dtype = torch.float64
    experts: str | None = None


FAMILIES = {
    "llama": Family("LlamaConfig", {}),
    "mistral": Family("MistralConfig", {"sliding_window": 4}, ("sliding_window",)),
    "qwen2": Family(
        "Qwen2Config", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, ("sliding_window",)
    ),
    "qwen3": Family("Qwen3Config", {"head_dim": 8}),
    "gemma2": Family(
        "Gemma2Config",
        {
            "head_dim": 8, "attn_logit_softcapping": 0.5, "final_logit_softcapping": None, "query_pre_attn_scalar": 1,
            "sliding_window": 4,
        },
        ("sliding_window", "softcap"),
        weights_times=8.0,
    ),
    "gemma3_text": Family(
        "Gemma3TextConfig",
        {"head_dim": 8, "query_pre_attn_scalar": 1, "sliding_window": 5, "layer_types": SLIDING_AND_FULL},
        ("sliding_window",),
    ),
    "olmo2": Family("Olmo2Config", {}),
    "phi3": Family("Phi3Config", {"sliding_window": 4}, ("sliding_window",)),
    "gpt_oss": Family(
        "GptOssConfig",
        {
            "head_dim": 8, "sliding_window": 4, "layer_types": SLIDING_AND_FULL, "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 150000.0, "factor": 4.0, "original_max_position_embeddings": 32,
                "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
            },
        },
        ("sliding_window", "sinks"),
        experts="eager",
    ),
    "mixtral": Family(
        "MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}, experts="eager"
    ),
    "cohere2": Family(
        "Cohere2Config", {"sliding_window": 4, "layer_types": SLIDING_AND_FULL, "logit_scale": 1.0}, ("sliding_window",)
    ),
    "qwen3_moe": Family(
        "Qwen3MoeConfig",
        {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        experts="eager",
    ),
    "gpt_neox": Family("GPTNeoXConfig", {}),
    "starcoder2": Family("Starcoder2Config", {"sliding_window": 4}, ("sliding_window",)),
    "phi": Family("PhiConfig", {}),
}  # fmt: skip


def tiny_config(name: str, **options: Any) -> PreTrainedConfig:
    """The config of a family, in transformers' own class."""
    family = FAMILIES[name]
    build: Callable[..., PreTrainedConfig] = getattr(transformers, family.config)
    return build(**{**SIZES, **family.options, **options})


def tiny_model(name: str, dtype: torch.dtype | None = None, **options: Any) -> PreTrainedModel:
    """A model of a family in eval mode, the same weights each time; `options` go to the config."""
    family = FAMILIES[name]
    torch.manual_seed(0)
    # Older transformers run softcapped models on SDPA by default, which has no softcap and says nothing.
    attention = {"attn_implementation": "eager"} if "softcap" in family.bites else {}
    model = AutoModelForCausalLM.from_config(tiny_config(name, **options), **attention)
    if family.experts is not None:
        model.set_experts_implementation(family.experts)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "sinks" in parameter_name:
                parameter.normal_()
            elif parameter.ndim > 1 and "embed" not in parameter_name:
                parameter.mul_(family.weights_times)
    return model.to(family.dtype if dtype is None else dtype).eval()


# Decoders that `wrap` must refuse: config, its options, and what the message says.
IGNORES = "which ignores it; use a model that supports attn_implementation"
OLD_SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
REFUSED = {
    "gptj": ("GPTJConfig", {**OLD_SIZES, "rotary_dim": 4}, IGNORES),
    "codegen": ("CodeGenConfig", {**OLD_SIZES, "rotary_dim": 4}, IGNORES),
    "falcon": ("FalconConfig", {}, IGNORES),
    "mpt": ("MptConfig", {"d_model": 32, "n_heads": 4, "n_layers": 2}, IGNORES),
    "bloom": ("BloomConfig", {"n_layer": 2, "n_head": 4}, IGNORES),
    "jamba": (
        "JambaConfig",
        {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4},
        "with linear_attention, which no document mask reaches",
    ),
    "bamba": (
        "BambaConfig",
        {
            "attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_state": 4, "mamba_d_head": 16, "mamba_n_groups": 1,
        },
        "with linear_attention, which no document mask reaches",
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        {
            "num_experts": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8,
            "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
            "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
        },
        "with linear_attention, which no document mask reaches",
    ),
    "falcon_h1": (
        "FalconH1Config",
        {"mamba_n_heads": 4, "mamba_d_ssm": 32, "mamba_d_state": 4, "mamba_d_head": 8, "mamba_n_groups": 1},
        "with hybrid, which no document mask reaches",
    ),
    "lfm2": ("Lfm2Config", {"layer_types": ["conv", "full_attention"]}, "with conv, which no document mask reaches"),
    "llama4_text": (
        "Llama4TextConfig",
        {"head_dim": 8, "num_local_experts": 2, "attention_chunk_size": 4, "intermediate_size_mlp": 32},
        "with chunked_attention, which no document mask reaches",
    ),
    # Its layers keep the model's keywords to themselves: every document id would be lost on the way.
    "nemotron": ("NemotronConfig", {}, "must keep documents apart"),
    # Windows that only its mask knows.
    "phimoe": (
        "PhimoeConfig",
        {"num_local_experts": 2, "num_experts_per_tok": 2, "sliding_window": 4},
        "must hand its attention window to the attention function, got sliding_window=None beside a mask of local size",
    ),
    "bert": ("BertConfig", {"is_decoder": False}, "must attend causally, got BertLMHeadModel with BertSelfAttention"),
}  # fmt: skip


def refused_model(name: str) -> PreTrainedModel:
    """A tiny model of a family that `wrap` refuses."""
    config, options, _ = REFUSED[name]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(getattr(transformers, config)(**{**SIZES, **options})).eval()
