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
    model = AutoModelForCausalLM.from_config(tiny_config(name, **options))
    if family.experts is not None:
        model.set_experts_implementation(family.experts)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "sinks" in parameter_name:
                parameter.normal_()
            elif parameter.ndim > 1 and "embed" not in parameter_name:
                parameter.mul_(family.weights_times)
    return model.to(family.dtype if dtype is None else dtype).eval()
