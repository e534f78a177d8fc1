"""One forward pass of a wrapped decoder: its inputs are checked, and every layer calls our attention.

transformers' mask function knows nothing of `document_ids`; ours returns a `DeferredMask`, which is only built when a
forward without them asks for the attention that the model had before.

Under torch.compile two functions stay outside the graphs: the one that checks the inputs, and the attention itself. A
layout is host data, and every new one would be a graph of its own. Without `document_ids` all is traced, as it would be
in the plain model.
"""

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from anchor_attn.attention import anchor_attention, as_layout
from anchor_attn.hf.settings import IMPLEMENTATION, SETTINGS, Settings
from anchor_attn.masks import PackedLayout
from anchor_attn.masks.layout import PADDING_ID

OFFSETS = ("q_offset", "kv_offset")


def before_forward(module: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Check a wrapped model's inputs, and turn a tensor of document ids into the layout that all layers share."""
    given = {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}
    document_ids = given.get("document_ids")
    for hook in vars(module)[SETTINGS].table_hooks:
        hook.is_on = document_ids is not None
    if document_ids is None:
        if module.training or given.get("labels") is not None:
            raise ValueError(
                f"document_ids must be given to a wrapped {_name(module)} that trains or gets labels, got none; "
                "pass the collator's document_ids, or unwrap(model) for plain causal attention."
            )
        if isinstance(given.get("attention_mask"), DeferredMask | dict):
            mask = as_before(given["attention_mask"], vars(module)[SETTINGS].previous)
            return args, {**kwargs, "attention_mask": mask}
        return None
    positional = list(given)[: len(args)]
    packed = {name: value for name, value in _packed_inputs(module, given).items() if name not in positional}
    return args, {**kwargs, **packed}


@torch.compiler.disable(reason="anchor_attn checks document_ids on the host, once a forward")
def _packed_inputs(module: PreTrainedModel, given: dict[str, Any]) -> dict[str, Any]:
    """The keywords that make a forward packed, after all checks: the layout, and no cache of several documents."""
    document_ids = given["document_ids"]
    if not module.config._attn_implementation.startswith(IMPLEMENTATION):  # the proof's own name begins so too
        raise ValueError(
            f"{_name(module)} must keep attn_implementation={IMPLEMENTATION!r} while it is wrapped, got "
            f"{module.config._attn_implementation!r}, which ignores document_ids; wrap the model again."
        )
    layout = as_layout(document_ids)
    _check_inputs(given, layout)
    tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
    if tokens is not None:  # here, not in every layer: a moved layout makes its plans anew
        layout = layout.to(tokens.device)
    if max(map(len, layout.document_lengths)) > 1:  # a later token, for which nobody asks for documents, would see all
        none = {"past_key_values": None} if "past_key_values" in given else {}
        return {"use_cache": False, **none, "document_ids": layout}
    # A training step has no use for a cache, and a DynamicCache promotes the values to the keys' dtype.
    no_cache = {} if "use_cache" in given or "past_key_values" in given else {"use_cache": False}
    return {**no_cache, "document_ids": layout}


def _check_inputs(given: dict[str, Any], layout: PackedLayout) -> None:
    shape = [layout.batch_size, layout.seq_len]
    for name in ("input_ids", "inputs_embeds"):
        tokens = given.get(name)
        if tokens is not None and list(tokens.shape[:2]) != shape:
            raise ValueError(
                f"document_ids must have the shape of {name} {list(tokens.shape[:2])}, got {shape}; "
                "pass the ids of this batch."
            )
    cache = given.get("past_key_values")
    if cache is not None and (cache.get_seq_length() > 0 or cache.is_compileable):
        held = f"{cache.get_seq_length()} tokens" if cache.get_seq_length() else "a fixed size"
        raise ValueError(
            f"document_ids must come with an empty cache that grows, got one of {held}; "
            "leave document_ids out when generating."
        )
    mask = given.get("attention_mask")
    if mask is None:
        return
    if not isinstance(mask, Tensor) or list(mask.shape) != shape:
        got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask must have shape {shape} beside document_ids, got {got}; leave attention_mask out."
        )
    if not torch.equal(mask.to(layout.device).bool(), layout.document_ids != PADDING_ID):
        raise ValueError(
            "attention_mask must be 0 exactly where document_ids is -1 (padding), got one that disagrees; "
            "leave attention_mask out."
        )


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: "DeferredMask | Tensor | None",
    *,
    document_ids: PackedLayout | Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function of a wrapped model, as transformers calls it.

    Args:
        module: the attention layer.
        query: [B, H, S, D].
        key: [B, K, S, D].
        value: [B, K, S, V].
        attention_mask: what `defer_mask` returned, or a mask that the caller made.
        document_ids: the layout of the batch; None asks for the attention before `wrap`.
        kwargs: scaling, sliding_window, softcap, s_aux and dropout are read; with no `document_ids` all are passed on.

    Returns:
        [B, S, H, V], and the attention weights where the attention before `wrap` gives them.
    """
    settings: Settings | None = getattr(module, SETTINGS, None)
    if settings is None:
        raise ValueError(
            f"{_name(module)} must be wrapped to run attn_implementation={IMPLEMENTATION!r}, got one that only its "
            "config names; call model.set_attn_implementation('sdpa'), then wrap(model)."
        )
    if document_ids is None:
        if module.training:
            raise ValueError(
                "document_ids must reach every attention layer of a training model, got none; "
                "pass document_ids to the model by keyword."
            )
        mask = attention_mask.build(settings.previous) if isinstance(attention_mask, DeferredMask) else attention_mask
        return attention_before(module, settings.previous)(module, query, key, value, mask, **kwargs)
    return _attend_packed(module, query, key, value, attention_mask, document_ids, kwargs), None


@torch.compiler.disable(reason="anchor_attn attends eagerly: new documents would be new graphs")
def _attend_packed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: "DeferredMask | Tensor | None",
    document_ids: PackedLayout | Tensor,
    kwargs: dict[str, Any],
) -> Tensor:
    """The attention of one layer over packed documents; [B, S, H, V]."""
    settings: Settings = getattr(module, SETTINGS)
    window = kwargs.get("sliding_window")
    if isinstance(attention_mask, DeferredMask) and attention_mask.local_size != window:
        raise ValueError(
            f"{_name(module)} must hand its attention window to the attention function, got sliding_window={window} "
            f"beside a mask of local size {attention_mask.local_size}; pass sliding_window in the layer's own code."
        )
    if settings.rope_precision == "bfloat16":
        query, key = query.to(torch.bfloat16), key.to(torch.bfloat16)
    out = anchor_attention(
        # A table of cos and sin in float32 makes query and key float32.
        query.to(value.dtype),
        key.to(value.dtype),
        value,
        as_layout(document_ids).to(value.device),
        pattern=settings.pattern,
        engine=settings.engine,
        scale=kwargs.get("scaling"),
        softcap=kwargs.get("softcap"),
        sliding_window=window,
        keep_anchor=False,
        sinks=kwargs.get("s_aux"),
        dropout=kwargs.get("dropout") or 0.0,
    )
    return out.transpose(1, 2).contiguous()


@dataclass
class DeferredMask:
    """A mask that transformers asked for, built only if the attention before `wrap` is called.

    Attributes:
        arguments: what transformers gave to the mask function.
        index: what is taken of the mask once it is built; None for all.
    """

    arguments: dict[str, Any]
    index: Any = None
    _built: dict[str, Any] = field(default_factory=dict)

    @property
    def local_size(self) -> int | None:
        """The layer type's sliding window or chunk, in tokens."""
        return self.arguments.get("local_size")

    def build(self, implementation: str) -> Any:
        """The mask as the given implementation has it; None where it takes none."""
        masks = AttentionMaskInterface()
        if implementation not in masks:
            return None
        if implementation not in self._built:
            built = masks[implementation](**self.arguments)
            self._built[implementation] = built if built is None or self.index is None else built[self.index]
        return self._built[implementation]

    def __getitem__(self, index: Any) -> "DeferredMask":
        """A part of the mask, built as late; Gemma 4 cuts it to the queries of layers that share keys."""
        return DeferredMask(self.arguments, index)

    def contiguous(self) -> "DeferredMask":
        """The mask itself; `generate` asks for it before it hands a mask to the model."""
        return self

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "DeferredMask":
        """The same mask for layers on another device, where it will be built."""
        return DeferredMask({**self.arguments, "device": torch.device(device)}, self.index)


def as_before(mask: Any, implementation: str) -> Any:
    """A mask, or one a layer type, that `generate` made ahead for a static cache, as the plain model would get it."""
    if isinstance(mask, dict):
        return {layer_type: as_before(part, implementation) for layer_type, part in mask.items()}
    built = mask.build(implementation) if isinstance(mask, DeferredMask) else mask
    return built.contiguous() if isinstance(built, Tensor) else built


def defer_mask(**arguments: Any) -> DeferredMask:
    """The mask function of a wrapped model."""
    # A static cache counts its tokens in place, and has counted on by the time the mask is built.
    now = {name: arguments[name].clone() for name in OFFSETS if isinstance(arguments.get(name), Tensor)}
    return DeferredMask({**arguments, **now})


def attention_before(module: nn.Module, implementation: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention function that this layer's own code would have chosen."""
    for base in type(module).__mro__:
        code = sys.modules[base.__module__]
        eager = getattr(code, "eager_attention_forward", None)
        if eager is not None:
            interface = getattr(code, "ALL_ATTENTION_FUNCTIONS", AttentionInterface())
            return interface.get_interface(implementation, eager)
    raise ValueError(f"{_name(module)} must define eager_attention_forward beside itself, got none; unwrap the model.")


def _name(module: nn.Module) -> str:
    return type(module).__name__
