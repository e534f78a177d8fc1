"""A LongRoPE search's model and sequences: checked, and known again by a checkpoint."""

import hashlib
import json
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig


def checked_sequences(sequences: Sequence[Tensor] | Tensor, length: int, vocab_size: int) -> list[Tensor]:
    """Token ids int64 [length] on the host, the first ones of every sequence.

    Raises:
        TypeError: no integers.
        ValueError: none, another shape, a sequence that is too short, or a token beyond the model's vocabulary.
    """
    checked = []
    for i, sequence in enumerate(sequences):
        tokens = torch.as_tensor(sequence, device="cpu")
        if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
            raise TypeError(f"sequences must hold integers, got {tokens.dtype}; pass token ids.")
        if tokens.ndim != 1:
            raise ValueError(
                f"sequences must have shape [S] each, got {list(tokens.shape)}; pass one tensor a document."
            )
        if len(tokens) < length:
            raise ValueError(
                f"sequences must have at least the {length} tokens that are searched for, got {len(tokens)} in "
                f"sequence {i}; leave short documents out, or join them."
            )
        checked.append(tokens[:length].long().clone())
        low, high = int(checked[-1].min()), int(checked[-1].max())
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"sequences must hold tokens of the model's {vocab_size}, got {low if low < 0 else high}; tokenize "
                "with the model's own tokenizer."
            )
    if not checked:
        raise ValueError("sequences must be at least one, got none; pass five, as the paper.")
    return checked


def hash_tokens(sequences: Sequence[Tensor]) -> str:
    """16 hex digits over all tokens in order."""
    digest = hashlib.sha256()
    for tokens in sequences:
        digest.update(len(tokens).to_bytes(8, "little") + tokens.numpy().tobytes())
    return digest.hexdigest()[:16]


def hash_model(model: nn.Module) -> str:
    """16 hex digits over the config, every weight and every buffer: one number changed, and it is another model.

    All are read once, a tensor at a time on the host: 8 seconds for the 14 GB of 7B parameters in bfloat16, on one core
    at 1.75 GB/s.
    """
    digest = hashlib.sha256()
    said = text_config(model).to_dict().items()
    config = {name: value for name, value in said if name not in ("_name_or_path", "transformers_version")}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    # After an input they may be one tensor under two names.
    buffers = dict(model.named_buffers(remove_duplicate=False))
    for name, tensor in [*model.named_parameters(), *buffers.items()]:
        # A rotary module that chooses by length keeps here what it chose last, and beside it what that came from.
        if name.endswith("inv_freq") and f"{name.removesuffix('inv_freq')}original_inv_freq" in buffers:
            continue
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def text_config(model: nn.Module) -> PreTrainedConfig:
    """The config that holds rope parameters.

    Raises:
        TypeError: a model that is not of transformers.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        raise TypeError(f"model must be a causal model of transformers, got {type(model).__name__}; pass one.")
    return config.get_text_config()
