"""Proof that `wrap` took: refusals by name, and one tiny forward pair in which nothing may leak.

Some decoders accept the setting and ignore it; others carry state past attention, in a convolution or a recurrence.
Both would train on leaking documents without a word.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from anchor_attn.hf.forward import attention_forward, defer_mask
from anchor_attn.hf.settings import IMPLEMENTATION, SETTINGS, holders, set_implementation, set_pattern
from anchor_attn.masks import PackedLayout

SOFTMAX_LAYERS = {"full_attention", "sliding_attention"}
LEAK_RATIO = 1e-3
PROOF = "anchor_attn_proof"


def refuse_unsupported(model: PreTrainedModel) -> None:
    """Raise for models whose config already says that documents cannot be kept apart.

    Raises:
        TypeError: not a transformers model.
        ValueError: a model with an encoder, images or sound, layers that are not softmax attention, bidirectional
            attention, or weights that are not here.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model must be a transformers PreTrainedModel, got {type(model).__name__}; "
            "wrap the decoder itself, before PEFT, DDP or FSDP."
        )
    name, config = type(model).__name__, model.config
    if config.is_encoder_decoder:
        raise ValueError(f"model must be a decoder, got {name} with an encoder; wrap a decoder-only model.")
    if config.get_text_config() is not config:
        raise ValueError(f"model must be a text decoder, got {name} with other inputs; wrap a text-only checkpoint.")
    if not getattr(config, "is_causal", True) or getattr(config, "use_bidirectional_attention", False):
        raise ValueError(f"model must attend causally, got {name} set to bidirectional; change its config.")
    if others := sorted(set(getattr(config, "layer_types", None) or ()) - SOFTMAX_LAYERS):
        raise ValueError(
            f"model must have only softmax attention layers, got {name} with {', '.join(others)}, which no document "
            "mask reaches; wrap a model of full and sliding attention."
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(f"model must have its weights for the proof, got {name} on meta; wrap after loading.")


def prove(model: PreTrainedModel) -> None:
    """Run a wrapped model on two packed documents, twice, the first document changed in between.

    Raises:
        ValueError: a layer did not call our attention function or is not causal, the second document moved, or the
            forward failed.
    """
    name = type(model).__name__
    first = _proof_tokens(model)
    second = first.clone()
    second[:, 1:5] = (second[:, 1:5] + 1) % model.config.vocab_size
    failure = None
    with _proving(model) as callers, torch.no_grad():
        try:
            moved = (_forward(model, second) - _forward(model, first)).abs().amax(dim=(0, 2))
        except Exception as error:  # whatever another library's model raises becomes one line, with its cause kept
            failure = error
    if not callers:
        raise ValueError(
            f"model must take its attention from transformers' AttentionInterface, got {name}, which ignores it; "
            "use a model that supports attn_implementation."
        ) from failure
    if failure is not None:
        raise ValueError(
            f"model must run a forward pass under anchor_attn, got {name}, in which it failed with "
            f"{type(failure).__name__}: {failure}"
        ) from failure
    if bidirectional := {type(layer).__name__ for layer in callers if getattr(layer, "is_causal", True) is False}:
        raise ValueError(f"model must attend causally, got {name} with {', '.join(bidirectional)}; wrap a decoder.")
    if len(callers) < model.config.num_hidden_layers:
        raise ValueError(
            f"model must have softmax attention in all of its {model.config.num_hidden_layers} layers, got {name} with "
            f"{len(callers)}; the others carry state that no document mask reaches."
        )
    touched, untouched = float(moved[1:5].max()), float(moved[5:].max())
    if not touched > 0:  # NaN too
        raise ValueError(
            f"model must answer other tokens with other outputs for the proof, got {name}, whose outputs moved by "
            f"{touched}; initialise or load its weights first."
        )
    if not untouched <= LEAK_RATIO * touched:
        raise ValueError(
            f"model must keep documents apart, got {name} in which changing one moved another by "
            f"{untouched / touched:.1e} of its own movement; a layer carries state past attention, or hands "
            "document_ids no further."
        )


def _proof_tokens(model: PreTrainedModel) -> Tensor:
    """One row: the anchor and two documents of four tokens."""
    return (torch.arange(9, device=model.device) * 7 + 1)[None] % model.config.vocab_size


def _forward(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    layout = PackedLayout.from_lengths([[4, 4]]).to(model.device)
    states: list[Tensor] = []
    # The states beneath the head as well: a head that begins as zeros answers everything alike.
    handle = model.base_model.register_forward_hook(lambda module, args, output: states.append(output[0]))
    try:
        output = model(input_ids=input_ids, document_ids=layout, use_cache=False)
    finally:
        handle.remove()
    return torch.cat([output[0], *states], dim=-1).double()


@contextmanager
def _proving(model: PreTrainedModel) -> Iterator[set[nn.Module]]:
    """The model in eval mode, intra-document, on an implementation that notes which layers call it."""
    callers: set[nn.Module] = set()

    def noting_forward(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        callers.add(module)
        return attention_forward(module, *args, **kwargs)

    AttentionInterface.register(PROOF, noting_forward)
    AttentionMaskInterface.register(PROOF, defer_mask)
    training = {module: module.training for module in model.modules()}
    held = holders(model)
    model.eval()
    set_pattern(model, "intra_doc")
    set_implementation(model, PROOF)
    try:
        yield callers
    finally:
        AttentionInterface.register(PROOF, attention_forward)  # nothing global may hold the model
        set_implementation(model, IMPLEMENTATION)
        for module, settings in held.items():
            setattr(module, SETTINGS, settings)
        for module, was_training in training.items():
            module.training = was_training
