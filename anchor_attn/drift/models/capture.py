"""Query and key of a model's own layers, before rotation, with the proof that they are the model's.

    the model runs ── a layer attends, to the query and key that it rotated
                        └─ the same layer again, unturned: query and key before rotation
                             └─ turned by the layer's own cos and sin  ═══ to the bit ═══  what it attended to

Nothing is patched, and nothing is computed in the model's stead: hidden states are its own in every layer.
"""

import inspect
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from anchor_attn.configs import configs_of
from anchor_attn.drift.models.kept import kept_rotaries
from anchor_attn.drift.models.replay import TWICE_TURNED, UNTURNED, Replay, SeenError
from anchor_attn.drift.models.rotation import Call, proven_states
from anchor_attn.drift.states import States
from anchor_attn.hf.forward import DeferredMask, attention_before, attention_forward, defer_mask
from anchor_attn.hf.proof import KNOWN
from anchor_attn.hf.refusals import refuse_unsupported
from anchor_attn.hf.settings import IMPLEMENTATION
from anchor_attn.hf.wrapping import decoder_of
from anchor_attn.masks import PackedLayout
from anchor_attn.masks.layout import checked_int

# A packed forward takes no other name than one that begins so.
CAPTURE = f"{IMPLEMENTATION}_capture"
CAPTURING = threading.Lock()


def capture_states(
    model: nn.Module,
    input_ids: Tensor,
    *,
    position_ids: Tensor | None = None,
    document_ids: Tensor | PackedLayout | None = None,
    layers: Sequence[int] | None = None,
) -> list[States]:
    """Query and key before rotation, of the layers of a transformers decoder, wrapped or not.

        measure_drift(states=capture_states(model, input_ids))

    Every layer is proven: turned by its own cos and sin, in its own arithmetic, these states are to the bit what its
    attention got, and so are their scores. The model is left as it was.

    They lie on the host. At 8,192 tokens a layer of 32 heads of 128 in bfloat16, as in a 7B model, takes 128 MiB and 32
    layers take 4 GiB, beside what the forward takes.

    Args:
        model: a decoder that `wrap` takes, or a PEFT model of one; on one device.
        input_ids: integers [B, S].
        position_ids: integers [B, S] or [1, S]; 0 … S − 1 when None.
        document_ids: as a wrapped model takes it, which then attends by its pattern.
        layers: which, counted as they attend, from 0; all when None. A model that goes through its layers several times
            counts every time.

    Returns:
        One a layer, in order. Layers without rotary positions, every fourth of SmolLM3, are not among all.

    Raises:
        TypeError: not a transformers model, or ids that are no integers.
        ValueError: ids of other shapes or beyond the vocabulary, document_ids for a model that is not wrapped, layers
            that do not exist or have no positions, a model without rotary positions, or a layer that does more to query
            and key than rotate them.
    """
    decoder = check_model(model)
    if len(devices := {str(parameter.device) for parameter in decoder.parameters()}) > 1:
        raise ValueError(
            f"model must be on one device, got {', '.join(sorted(devices))}; move it with model.to(device)."
        )
    ids = checked_ids("input_ids", input_ids)
    _check_vocabulary(decoder, ids)
    inputs: dict[str, Any] = {"input_ids": ids.to(decoder.device)}
    if position_ids is not None:
        inputs["position_ids"] = checked_ids("position_ids", position_ids, ids.shape).to(decoder.device)
    if document_ids is not None:
        inputs["document_ids"] = document_ids
    if layers is not None and not len(layers):
        raise ValueError("layers must name one at least, got none; pass [0], say, or None for all.")
    capture = _Capture(decoder, None if layers is None else frozenset(checked_int(each, "layers") for each in layers))
    if document_ids is not None and not capture.is_wrapped:
        raise ValueError(
            f"document_ids must go to a wrapped model, got {type(decoder).__name__}, which ignores them; call "
            "wrap(model) first."
        )
    with _capturing(decoder, capture), torch.no_grad(), suppress(_DoneError):
        decoder.base_model(**inputs, use_cache=False)
    return capture.found()


def check_model(model: nn.Module) -> PreTrainedModel:
    """The decoder, or the error of one that cannot be captured whatever it reads.

    Raises:
        TypeError: not a transformers model.
        ValueError: one that `wrap` does not take, or without rotary positions.
    """
    decoder: PreTrainedModel = decoder_of(model)
    refuse_unsupported(decoder)
    Replay(decoder)
    return decoder


def checked_ids(name: str, ids: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """Integers [B, S]; of another tensor's shape where one is given, or one row for all.

    Raises:
        TypeError: no integers.
        ValueError: another shape.
    """
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"{name} must be a tensor of integers, got {got}; pass torch.tensor of token ids or positions.")
    if ids.ndim != 2 or 0 in ids.shape:
        raise ValueError(
            f"{name} must have shape [B, S], got {list(ids.shape)}; add the batch dimension with {name}[None]."
        )
    if shape is not None and (ids.shape[0] not in (1, shape[0]) or ids.shape[1] != shape[1]):
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(ids.shape)}; pass one for every token.")
    return ids


def _check_vocabulary(model: PreTrainedModel, ids: Tensor) -> None:
    embeddings: Any = model.get_input_embeddings()
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= embeddings.num_embeddings:
        raise ValueError(
            f"input_ids must lie in 0 … {embeddings.num_embeddings - 1:,}, the vocabulary of {type(model).__name__}, "
            f"got {low if low < 0 else high:,}; pass ids of its own tokenizer."
        )


class _DoneError(Exception):
    """All layers that were asked for are captured; the rest of the model need not run."""


class _Capture:
    """What the layers of one forward leave behind.

    Args:
        model: that runs.
        layers: which are asked for; None for all.
    """

    def __init__(self, model: PreTrainedModel, layers: frozenset[int] | None) -> None:
        self.configs = {id(c): c for module in model.modules() for c in configs_of(module).values()}
        self.implementations = {name: config._attn_implementation for name, config in self.configs.items()}
        self.replay = Replay(model)
        self._model = type(model).__name__
        self._layers = layers
        self._states: dict[int, States | None] = {}
        self._calls = 0

    @property
    def is_wrapped(self) -> bool:
        """Whether packed forwards attend by documents."""
        return set(self.implementations.values()) == {IMPLEMENTATION}

    def attend(
        self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """The model's own attention, after a look at query and key."""
        if self.replay.is_on:
            raise SeenError(query, key)
        place, self._calls = self._calls, self._calls + 1
        is_asked = self._layers is None or place in self._layers
        is_shared = self.replay.is_shared(layer, key)
        if is_asked or is_shared:
            plain_query, plain_key, tables = self.replay.run(layer, UNTURNED)
            turned_query, turned_key, _ = self.replay.run(layer, TWICE_TURNED)
        if is_shared:
            self.replay.share(key, {UNTURNED: plain_key, TWICE_TURNED: turned_key})
        if is_asked:
            self._check_arguments(layer, place, attention_mask, kwargs)
            call = Call(
                f"layer {place} of {self._model}", place, (query, key), (plain_query, plain_key),
                (turned_query, turned_key), tables, value.dtype, kwargs,
            )  # fmt: skip
            self._states[place] = proven_states(call)
        if self._layers is not None and self._layers <= self._states.keys():
            raise _DoneError
        return self._attend(layer, query, key, value, attention_mask, kwargs)

    def found(self) -> list[States]:
        """The states of all layers that were asked for.

        Raises:
            ValueError: a model that calls no attention function, a layer that does not exist, or none that rotates.
        """
        if not self._calls:
            raise ValueError(
                f"model must take its attention from transformers' AttentionInterface, got {self._model}, which "
                "ignores it; use a model that supports attn_implementation."
            )
        if absent := sorted((self._layers or frozenset()) - self._states.keys()):
            raise ValueError(
                f"layers must be among 0 … {self._calls - 1}, got {absent[0]}; pass places of {self._model}."
            )
        unturned = [place for place, states in self._states.items() if states is None]
        if self._layers is not None and unturned:
            raise ValueError(
                f"layers must be those with rotary positions, got {unturned[0]}, which has none in {self._model}; "
                "leave it out."
            )
        states = [self._states[place] for place in sorted(self._states)]
        rotated = [each for each in states if each is not None]
        if not rotated:
            raise ValueError(
                f"model must have rotary position embeddings, got {self._model}, whose layers rotate nothing; pass a "
                "model that rotates query and key."
            )
        return rotated

    def _attend(
        self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        implementation = self._implementation(layer)
        if implementation == IMPLEMENTATION:
            return attention_forward(layer, query, key, value, mask, **kwargs)
        built = mask.build(implementation) if isinstance(mask, DeferredMask) else mask
        return attention_before(layer, implementation)(layer, query, key, value, built, **kwargs)

    def _implementation(self, layer: nn.Module) -> str:
        return self.implementations[id(next(iter(configs_of(layer).values())))]

    def _check_arguments(self, layer: nn.Module, place: int, mask: Any, kwargs: dict[str, Any]) -> None:
        """Raise where scores are made of more than `States` holds."""
        known = set(inspect.signature(attention_before(layer, "eager")).parameters) - KNOWN
        more = sorted(name for name in known if kwargs.get(name) is not None)
        if isinstance(mask, DeferredMask) and mask.local_size != kwargs.get("sliding_window"):
            more.append("a window that its mask alone knows")
        if more:
            raise ValueError(
                f"layers must make scores of query and key alone, got layer {place} of {self._model} with "
                f"{', '.join(more)}; choose others with layers=[…]."
            )


@contextmanager
def _capturing(model: PreTrainedModel, capture: _Capture) -> Iterator[None]:
    """The model in eval mode under the capture's attention; everything is put back behind it."""
    CAPTURING.acquire()  # the name is one for all models
    training = {module: module.training for module in model.modules()}
    handles = []
    try:
        AttentionInterface.register(CAPTURE, capture.attend)
        AttentionMaskInterface.register(CAPTURE, defer_mask)
        handles = capture.replay.watch()
        model.eval()
        for config in capture.configs.values():
            config._attn_implementation = CAPTURE
        # What was compiled in place would compile anew for hooks.
        with (
            kept_rotaries(model),
            torch.random.fork_rng(_cuda_devices(model)),
            torch.compiler.set_stance("force_eager"),
        ):
            yield
    finally:
        AttentionInterface.register(CAPTURE, attention_forward)  # nothing global may hold the model
        for handle in handles:
            handle.remove()
        for name, config in capture.configs.items():
            config._attn_implementation = capture.implementations[name]
        for module, was_training in training.items():
            module.training = was_training
        CAPTURING.release()


def _cuda_devices(model: PreTrainedModel) -> list[torch.device]:
    return [model.device] if model.device.type == "cuda" else []
