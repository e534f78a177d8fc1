"""The sizes of a model that its cost follows from, read off a config without a single weight."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from anchor_attn.bench.step import ONE_BILLION, VOCAB_SIZE
from anchor_attn.train.items import one_line
from anchor_attn.train.presets import SIZES

# Sizes of published checkpoints, for machines that cannot ask the hub.
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    # https://huggingface.co/meta-llama/Llama-2-7b-hf
    "llama-2-7b": ("llama", {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                             "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32_000}),
    # https://huggingface.co/meta-llama/Meta-Llama-3-8B
    "llama-3-8b": ("llama", {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                             "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256}),
    # https://huggingface.co/meta-llama/Meta-Llama-3-70B
    "llama-3-70b": ("llama", {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                              "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128_256}),
    # https://huggingface.co/mistralai/Mistral-7B-v0.3
    "mistral-7b-v0.3": ("mistral", {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                                    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32_768,
                                    "sliding_window": None}),
    # https://huggingface.co/Qwen/Qwen1.5-1.8B
    "qwen1.5-1.8b": ("qwen2", {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 24,
                               "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 151_936}),
}  # fmt: skip
OWN_SIZES = {**SIZES, "1b": ONE_BILLION}
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class ModelShape:
    """A decoder, as far as cost goes.

    Attributes:
        name: what it was asked for by.
        layers: decoder layers.
        hidden_size: numbers a token between layers.
        mlp_size: numbers a token inside a layer's gated MLP, those of all experts that see it together.
        num_heads: query heads.
        num_kv_heads: key heads.
        head_dim: of a query and of a key.
        value_dim: of a value.
        vocab_size: logits a token.
        parameters: all of them, each once.
        outer_parameters: of them, those outside the layers: tables of tokens, and the head.
        layer_weights: weights of all layers that one token is multiplied with; of experts, those that see it.
        head_weights: weights between the last state and the logits.
        windows: a layer's sliding window in tokens, or None; one a layer.
    """

    name: str
    layers: int
    hidden_size: int
    mlp_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    vocab_size: int
    parameters: int
    outer_parameters: int
    layer_weights: int
    head_weights: int
    windows: tuple[int | None, ...]


def describe_model(name: str) -> ModelShape:
    """The sizes of a model.

        describe_model("llama-2-7b").parameters    6_738_415_616

    Args:
        name: one of `PUBLISHED`, a size that trains from scratch ("tiny", "laptop", "small", "1b"), a config file, or
            the folder or hub name of a checkpoint, of which the config alone is read.

    Raises:
        ValueError: none of these, or a config that no causal decoder can be built from.
    """
    from transformers import AutoConfig

    if name in PUBLISHED or name in OWN_SIZES:
        kind, fields = PUBLISHED.get(name) or ("llama", {"vocab_size": VOCAB_SIZE, **OWN_SIZES[name]})
        return describe_config(AutoConfig.for_model(kind, **fields), name)
    if name.endswith(".json") and not Path(name).is_file():
        raise ValueError(f"model must be a config file that exists, got {name!r}; check the path.")
    try:
        config = AutoConfig.from_pretrained(name)
    except Exception as error:  # the hub's, the file's, json's, and whatever a config class makes of its values
        known = ", ".join((*PUBLISHED, *OWN_SIZES))
        raise ValueError(
            f"model must be one of {known}, a config file (*.json), or a checkpoint's name or folder, got {name!r} "
            f"({one_line(error)[:200]}); check the name and the network."
        ) from error
    return describe_config(config, name)


def describe_config(config: Any, name: str = "") -> ModelShape:
    """The sizes of a transformers config, counted on a model without memory for its weights.

    Raises:
        ValueError: a config that no causal decoder with attention can be built from.
    """
    from transformers import AutoModelForCausalLM

    text = config.get_text_config()
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        heads = int(text.num_attention_heads)
        head_dim = _head_dim(text)
        layers = int(text.num_hidden_layers)
    except Exception as error:  # whatever another library's model makes of a config
        raise ValueError(
            f"model must be a decoder that transformers can build, got {name or type(config).__name__!r} "
            f"({one_line(error)[:200]}); pass another."
        ) from error
    head: Any = model.get_output_embeddings()
    outer = {id(part.weight): part.weight for part in model.modules() if isinstance(part, nn.Embedding)}
    outer[id(head.weight)] = head.weight  # tied to a table, it is counted once
    return ModelShape(
        name=name,
        layers=layers,
        hidden_size=int(text.hidden_size),
        mlp_size=_mlp_size(model, text),
        num_heads=heads,
        num_kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
        head_dim=head_dim,
        value_dim=int(getattr(text, "v_head_dim", None) or head_dim),
        vocab_size=int(text.vocab_size),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        outer_parameters=sum(weight.numel() for weight in outer.values()),
        layer_weights=_layer_weights(model, set(outer), text),
        head_weights=head.weight.numel(),
        windows=_windows(text, layers),
    )


def _layer_weights(model: nn.Module, outer: set[int], text: Any) -> int:
    """Weights of matrix products inside the layers."""
    count = 0.0
    for name, weight in model.named_parameters():
        if weight.ndim < 2 or id(weight) in outer:
            continue
        # transformers 5 stacks experts into one tensor [E, …]; remote code keeps them in lists.
        share = _expert_share(text) if weight.ndim == 3 or ".experts." in name else 1.0
        count += share * weight.numel()
    return round(count)


def _expert_share(text: Any) -> float:
    total = next((getattr(text, name) for name in EXPERT_COUNTS if getattr(text, name, None)), None)
    return 1.0 if total is None else getattr(text, "num_experts_per_tok", total) / total


def _mlp_size(model: nn.Module, text: Any) -> int:
    """Of dense layers `intermediate_size`; of experts that of all experts a token goes to, as their weights have it."""
    for name, weight in model.named_parameters():
        if weight.ndim == 3 and name.endswith("down_proj"):  # [E, hidden, own] or [E, own, hidden]
            return weight[0].numel() // text.hidden_size * int(getattr(text, "num_experts_per_tok", 1))
    return int(getattr(text, "intermediate_size", None) or 4 * text.hidden_size)


def _head_dim(text: Any) -> int:
    latent = getattr(text, "qk_head_dim", None)
    return int(latent or getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def _windows(text: Any, layers: int) -> tuple[int | None, ...]:
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None)
    if window is None or getattr(text, "use_sliding_window", True) is False:
        return (None,) * layers
    return tuple(window if "sliding" in kind else None for kind in kinds) if kinds else (window,) * layers


def size_fields(name: str) -> Mapping[str, Any] | None:
    """Fields of a LlamaConfig of a size that trains from scratch; None for any other model."""
    return OWN_SIZES.get(name)
