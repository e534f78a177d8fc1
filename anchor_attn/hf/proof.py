"""Proof that `wrap` took: one tiny forward pair, in which every layer must call us and nothing may leak.

Some decoders accept the setting and ignore it; others carry state past attention, in a convolution or a recurrence;
others again give their scores a term that ours does not know. All would train on something else without a word.
"""

import inspect
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from anchor_attn.configs import configs_of
from anchor_attn.hf.forward import attention_before, attention_forward, defer_mask
from anchor_attn.hf.settings import (
    IMPLEMENTATION,
    SETTINGS,
    change_settings,
    holders,
    set_implementation,
)
from anchor_attn.masks import PackedLayout

# The arguments of a layer's own attention that `attention_forward` reads too.
KNOWN = {"module", "query", "key", "value", "attention_mask", "scaling", "dropout"}
KNOWN |= {"sliding_window", "softcap", "s_aux"}
LEAK_RATIO = 1e-3
PROOF = "anchor_attn_proof"
PROVING = threading.Lock()


def prove(model: PreTrainedModel) -> None:
    """Run a wrapped model on two packed documents, twice, the first document changed in between.

    Raises:
        ValueError: a layer did not call our attention function, gave it what it does not know or is not causal, the
            model takes no positions, the second document moved, or the forward failed.
    """
    name = type(model).__name__
    first = _proof_tokens(model)
    second = first.clone()
    second[:, 1:5] = (second[:, 1:5] + 1) % model.config.vocab_size
    failure = None
    with _proving(model) as seen, torch.no_grad():
        try:
            moved = (_forward(model, second) - _forward(model, first)).abs().amax(dim=(0, 2))
            ignored = not seen.calls
        except Exception as error:  # whatever another library's model raises becomes one line, with its cause kept
            failure, ignored = error, not seen.calls and _runs_by_itself(model)
    if ignored:
        raise ValueError(
            f"model must take its attention from transformers' AttentionInterface, got {name}, which ignores it; "
            "use a model that supports attn_implementation."
        ) from failure
    if bidirectional := {type(layer).__name__ for layer in seen.calls if getattr(layer, "is_causal", True) is False}:
        raise ValueError(
            f"model must attend causally, got {name} with {', '.join(sorted(bidirectional))}; wrap a decoder."
        ) from failure
    if failure is not None:
        reason = str(failure).partition("\n")[0]
        raise ValueError(
            f"model must run a forward pass under anchor_attn, got {name}, in which it failed with "
            f"{type(failure).__name__}: {reason}; run it unwrapped to see the cause."
        ) from failure
    _check_calls(model, seen)
    _check_movement(name, moved)


@dataclass
class _Seen:
    """What our attention was asked for in the proof's two forwards.

    Attributes:
        calls: how often each layer called.
        unknown: arguments that a layer's own attention names and was given, and ours does not read.
    """

    calls: Counter[nn.Module] = field(default_factory=Counter)
    unknown: set[str] = field(default_factory=set)

    def note(self, layer: nn.Module, arguments: dict[str, Any]) -> None:
        """Count one call of a layer."""
        self.calls[layer] += 1
        names = set(inspect.signature(attention_before(layer, "eager")).parameters) - KNOWN
        self.unknown |= {name for name in names if arguments.get(name) is not None}


def _check_calls(model: PreTrainedModel, seen: _Seen) -> None:
    """Raise unless every layer called, with arguments that we know, and positions can be given."""
    name, layers = type(model).__name__, model.config.num_hidden_layers
    if seen.unknown:
        raise ValueError(
            f"model must ask for attention that the engines know, got {name} with {', '.join(sorted(seen.unknown))}; "
            "wrap a model without it."
        )
    if seen.calls.total() < 2 * layers:  # in two forwards; a model that loops over its layers calls one many times
        raise ValueError(
            f"model must have softmax attention in all of its {layers} layers, got {name} with {len(seen.calls)}; "
            "wrap a model without recurrent or convolutional layers."
        )
    forwards = [inspect.signature(part.forward) for part in model.modules() if isinstance(part, PreTrainedModel)]
    if not any("position_ids" in forward.parameters for forward in forwards):
        raise ValueError(
            f"model must take position_ids, got {name}, which counts positions over the row by itself; "
            "wrap a decoder that takes them."
        )


def _check_movement(name: str, moved: Tensor) -> None:
    """Raise unless the first document moved and the second did not; `moved` [S] is how far each token's output did."""
    touched, untouched = float(moved[1:5].max()), float(moved[5:].max())
    if not touched > 0:  # NaN too
        raise ValueError(
            f"model must answer other tokens with other outputs for the proof, got {name}, whose outputs moved by "
            f"{touched}; initialise or load its weights first."
        )
    if not untouched <= LEAK_RATIO * touched:
        raise ValueError(
            f"model must keep documents apart, got {name} in which changing one moved another by "
            f"{untouched / touched:.1e} of its own movement; wrap a model whose layers pass document_ids on and carry "
            "no state past attention."
        )


def _runs_by_itself(model: PreTrainedModel) -> bool:
    """Whether the proof's tokens pass through the attention that the model had before."""
    for module, settings in holders(model).items():
        for config in configs_of(module).values():
            config._attn_implementation = settings.previous
    try:
        model(input_ids=_proof_tokens(model), use_cache=False)
    except Exception:  # the proof failed in the same way and is reported
        return False
    return True


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
    # A mixture of experts that is asked for its router's loss answers with that first.
    answer = output["logits"] if "logits" in output else output[0]
    if answer.shape[:2] != input_ids.shape:
        raise ValueError("its head answers once a row, and rows hold several documents")
    return torch.cat([answer, *states], dim=-1).double()


@contextmanager
def _proving(model: PreTrainedModel) -> Iterator[_Seen]:
    """The model in eval mode, intra-document, on an implementation that notes which layers call it."""
    seen = _Seen()

    def noting_forward(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        seen.note(module, kwargs)
        return attention_forward(module, *args, **kwargs)

    PROVING.acquire()  # the name is one for all models
    AttentionInterface.register(PROOF, noting_forward)
    AttentionMaskInterface.register(PROOF, defer_mask)
    training = {module: module.training for module in model.modules()}
    held = holders(model)
    model.eval()
    # What is proven – every layer calls us, nothing leaks past us – lies in the model and holds for all engines, which
    # are tested by themselves. The reference runs in any dtype on any device, and compiles nothing.
    change_settings(model, pattern="intra_doc", engine="reference")
    set_implementation(model, PROOF)
    try:
        # Where the model was compiled in place, two tiny forwards are no reason to compile it.
        with torch.compiler.set_stance("force_eager"):
            yield seen
    finally:
        AttentionInterface.register(PROOF, attention_forward)  # nothing global may hold the model
        set_implementation(model, IMPLEMENTATION)
        for module, settings in held.items():
            setattr(module, SETTINGS, settings)
        for module, was_training in training.items():
            module.training = was_training
        PROVING.release()
