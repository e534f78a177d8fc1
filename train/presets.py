"""Models to train: sizes that a laptop holds, config files, and names of pretrained checkpoints."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import Embedding

from anchor_attn.masks.layout import PositionPolicy
from anchor_attn.train.items import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "laptop": {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "small": {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
}


def check_model(name: str) -> None:
    """Raise for what cannot be a model before anything is read; a checkpoint's name is only known when it loads.

    Raises:
        ValueError: a config file that does not exist or does not read.
    """
    if name not in SIZES and name.endswith(".json"):
        _read_config(name)


def own_tokenizer(name: str) -> str:
    """The name of the tokenizer that belongs to a model, as `load_tokenizer`: a checkpoint's own, else "bytes"."""
    return "bytes" if name in SIZES or name.endswith(".json") else name


def create_model(
    name: str,
    vocab_size: int,
    max_positions: int,
    anchor_token_id: int,
    *,
    scratch: bool = False,
    dtype: torch.dtype | None = None,
) -> "PreTrainedModel":
    """A causal language model, freshly initialised from torch's seed or read from a checkpoint.

    Args:
        name: a size ("tiny", "laptop", "small": Llama of that size), a config file (*.json) that is trained from
            scratch, or the name or folder of a pretrained checkpoint.
        vocab_size: of the tokenizer. A size and a config file take it over; a checkpoint must be at least as large.
        max_positions: longest row in tokens; a size is made for it, a learned table of positions must reach it.
        anchor_token_id: becomes the BOS id of a size.
        scratch: take a checkpoint's config alone, and draw its weights.
        dtype: of the weights; float32, and of a checkpoint what it was saved in, when None.

    Raises:
        ValueError: an unknown name, a config that does not read or build, a checkpoint with a smaller vocabulary, or
            too few learned positions.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

    from anchor_attn.rope.extension import load

    drawn = {} if dtype is None else {"dtype": dtype}
    if name in SIZES:
        size = LlamaConfig(
            **SIZES[name],
            vocab_size=vocab_size,
            max_position_embeddings=max_positions,
            bos_token_id=anchor_token_id,
            eos_token_id=None,
            pad_token_id=None,
        )
        return AutoModelForCausalLM.from_config(size, **drawn)
    if name.endswith(".json"):
        config = _read_config(name)
        config.vocab_size = vocab_size
        # Those of the file belong to its own vocabulary.
        config.bos_token_id, config.eos_token_id, config.pad_token_id = anchor_token_id, None, None
        try:
            model = AutoModelForCausalLM.from_config(config, **drawn)
        except Exception as error:  # whatever another library's model makes of a config
            raise ValueError(
                f"model must be a config that a causal language model can be built from, got {name!r} "
                f"({one_line(error)[:200]}); mend the file."
            ) from error
        _check_positions(model, name, max_positions)
        return model
    try:
        if scratch:
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name), **drawn)
        else:
            model = load(name, **drawn)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model must be one of {', '.join(SIZES)}, a config file (*.json), or a checkpoint's name or folder, "
            f"got {name!r} ({one_line(error)}); check the name, its files and the network."
        ) from error
    if model.config.vocab_size < vocab_size:
        raise ValueError(
            f"model must have a vocabulary of at least the tokenizer's {vocab_size}, got {name!r} with "
            f"{model.config.vocab_size}; pass the tokenizer that belongs to it."
        )
    _check_positions(model, name, max_positions)
    return model


def check_rope(model: "PreTrainedModel", position_policy: PositionPolicy) -> None:
    """Raise a ValueError where a document would be rotated by what it is packed with."""
    from anchor_attn.rope import chooses_by_length

    if position_policy == "continuous" and chooses_by_length(model):
        raise ValueError(
            f"position_policy must be 'reset' for RoPE that is chosen by the input's length, got 'continuous' for "
            f"{type(model).__name__}; let positions begin again with every document (+reset in an "
            "arm's name, positions: reset in a config), or extend the model by a method that is not."
        )


def _check_positions(model: "PreTrainedModel", name: str, max_positions: int) -> None:
    """Learned positions end where their table ends; RoPE does not."""
    for module_name, module in model.named_modules():
        learned = isinstance(module, Embedding) and re.search(r"wpe|position", module_name)
        if learned and module.num_embeddings < max_positions:
            raise ValueError(
                f"model must have positions for rows of {max_positions} tokens, got {name!r} with "
                f"{module.num_embeddings}; lower seq_len."
            )


def _read_config(path: str) -> "PreTrainedConfig":
    from transformers import AutoConfig

    if not Path(path).is_file():
        raise ValueError(f"model must be a config file that exists, got {path!r}; check the path.")
    try:
        return AutoConfig.from_pretrained(path)
    except Exception as error:  # the file's, json's, and whatever a config class makes of its values
        raise ValueError(
            f"model must be a readable transformers config with a known model_type, got {path!r} "
            f"({one_line(error)}); mend the file."
        ) from error
