"""Hugging Face decoders under anchor attention, through transformers' own registries; nothing is patched.

    wrap(model) ─ own config per model ─ registers "anchor_attn" ─ proof.py runs one tiny forward
    model(..., document_ids=…) ─ before_forward: ids become a layout ─ every layer: attention_forward ─ anchor_attention

transformers hands keywords of the model to its attention function, so `document_ids` travels by itself. Its mask
function knows nothing of them; it returns a `DeferredMask`, which is only built when a forward without `document_ids`
asks for the attention that the model had before.
"""

import copy
import inspect
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

from anchor_attn.attention import Engine, anchor_attention, choose_engine
from anchor_attn.masks import PackedLayout
from anchor_attn.masks.layout import PADDING_ID
from anchor_attn.masks.patterns import PATTERNS, Pattern

# Not a word with "flash" in it: transformers treats such names as FlashAttention and drops the mask.
IMPLEMENTATION = "anchor_attn"
SETTINGS = "_anchor_attn"
HANDLES = "_anchor_attn_handles"
ROPE_PRECISIONS = ("model",)

logger = logging.getLogger("anchor_attn")


@dataclass(frozen=True)
class Settings:
    """What `wrap` was asked for, held by every module that holds the model's config.

    Attributes:
        pattern: as `anchor_attention`.
        engine: as `anchor_attention`.
        rope_precision: "model", whatever the model does.
        previous: the attention implementation before, which a forward without `document_ids` uses.
    """

    pattern: Pattern
    engine: Engine
    rope_precision: str
    previous: str


def wrap(
    model: PreTrainedModel, pattern: Pattern = "anchor", engine: Engine = "auto", rope_precision: str = "model"
) -> PreTrainedModel:
    """Give a transformers decoder document-aware attention.

        wrap(model, pattern="anchor")
        model(input_ids=…, labels=…, position_ids=…, document_ids=…)

    `document_ids` is a `PackedLayout`, or an int tensor [B, S] in its convention, which is then checked once a forward.
    Without `document_ids` the model computes what it computed before, and raises if it is training or gets labels.
    Sliding layers count the anchor as an ordinary token before each document, so that one document behind the anchor
    equals the unwrapped model. The model gets a config of its own; others built from the same config stay as they are.
    Wrapping a wrapped model changes its settings.

    Args:
        model: a decoder with causal softmax attention in every layer.
        pattern: "full", "intra_doc" or "anchor".
        engine: as `anchor_attention`.
        rope_precision: "model".

    Returns:
        The same model.

    Raises:
        TypeError: not a transformers model.
        ValueError: an unknown setting, or a model that ignores the attention interface, leaks between documents
            through other layers, or cannot be proven; the model is then as it was.
    """
    from anchor_attn.proof import prove, refuse_unsupported

    if pattern not in PATTERNS:
        raise ValueError(f"pattern must be one of {PATTERNS}, got {pattern!r}; pass one of them.")
    if rope_precision not in ROPE_PRECISIONS:
        raise ValueError(f"rope_precision must be one of {ROPE_PRECISIONS}, got {rope_precision!r}; pass 'model'.")
    chosen = choose_engine(engine)
    refuse_unsupported(model)
    unwrap(model)
    if any(c._attn_implementation == IMPLEMENTATION for m in model.modules() for c in _configs_of(m).values()):
        raise ValueError(
            f"model must have an attention of its own beside anchor_attn, got {_name(model)} built from a wrapped "
            "model's config; call model.set_attn_implementation('sdpa') first."
        )
    if engine == "auto":
        logger.info("engine='auto' chose %r for %s: exact on every device, a document at a time", chosen, _name(model))
    register()
    _own_configs(model)
    for module in model.modules():
        for config in _configs_of(module).values():
            setattr(module, SETTINGS, Settings(pattern, engine, rope_precision, config._attn_implementation))
    set_implementation(model, IMPLEMENTATION)
    submodels = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    handles = [module.register_forward_pre_hook(before_forward, with_kwargs=True) for module in submodels]
    setattr(model, HANDLES, handles)
    try:
        prove(model)
    except BaseException:
        unwrap(model)
        raise
    return model


def unwrap(model: PreTrainedModel) -> PreTrainedModel:
    """Give a wrapped model the attention back that it had before; other models are left as they are.

    Returns:
        The same model, on the config of its own that `wrap` gave it.
    """
    for module in model.modules():  # a submodel may have been wrapped by itself before
        for handle in module.__dict__.pop(HANDLES, ()):
            handle.remove()
    for module, settings in holders(model).items():
        for config in _configs_of(module).values():
            config._attn_implementation = settings.previous
        delattr(module, SETTINGS)
    return model


def is_wrapped(model: nn.Module) -> bool:
    """Whether `wrap` was called on this model and not undone."""
    return HANDLES in model.__dict__


def register() -> None:
    """Make the implementation known to transformers; again and again does no harm."""
    AttentionInterface.register(IMPLEMENTATION, attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, defer_mask)


def _configs_of(module: nn.Module) -> dict[str, PreTrainedConfig]:
    return {name: value for name, value in vars(module).items() if isinstance(value, PreTrainedConfig)}


def _own_configs(model: PreTrainedModel) -> None:
    """Replace the config on every submodule that holds it: models built from one config share its implementation."""
    copies: dict[int, Any] = {}
    for module in model.modules():
        for name, config in _configs_of(module).items():
            setattr(module, name, copy.deepcopy(config, copies))


def holders(model: nn.Module) -> dict[nn.Module, Settings]:
    """The modules that hold the model's config, each with its settings."""
    return {module: vars(module)[SETTINGS] for module in model.modules() if SETTINGS in vars(module)}


def set_implementation(model: PreTrainedModel, implementation: str) -> None:
    """Point the configs of a wrapped model to an attention implementation."""
    for module in holders(model):
        for config in _configs_of(module).values():
            config._attn_implementation = implementation


def before_forward(module: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Check a wrapped model's inputs, and turn a tensor of document ids into the layout that all layers share."""
    given = {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}
    document_ids = given.get("document_ids")
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
    return args, {**kwargs, "document_ids": layout}


def as_layout(document_ids: PackedLayout | Tensor) -> PackedLayout:
    """The layout itself, or the checked layout of a tensor of ids."""
    return document_ids if isinstance(document_ids, PackedLayout) else PackedLayout.from_document_ids(document_ids)


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
    if cache is not None and cache.get_seq_length() > 0:
        raise ValueError(
            f"document_ids must come with an empty cache, got one of {cache.get_seq_length()} tokens; "
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
        query: [B, H, S, D]; key: [B, K, S, D]; value: [B, K, S, V].
        attention_mask: what `defer_mask` returned, or a mask that the caller made.
        document_ids: the layout of the batch; None asks for the attention before `wrap`.
        kwargs: scaling, sliding_window, softcap, s_aux and dropout are read; with no `document_ids` all are passed on.

    Returns:
        [B, S, H, V], and the attention weights where the attention before `wrap` gives them.
    """
    settings: Settings | None = getattr(module, SETTINGS, None)
    if settings is None:
        raise ValueError(
            f"{_name(module)} must be wrapped to run attn_implementation={IMPLEMENTATION!r}, got a model built from a "
            "wrapped model's config; call model.set_attn_implementation('sdpa'), then wrap(model)."
        )
    if document_ids is None:
        if module.training:
            raise ValueError(
                "document_ids must reach every attention layer of a training model, got none; "
                "pass document_ids to the model by keyword."
            )
        mask = attention_mask.build(settings.previous) if isinstance(attention_mask, DeferredMask) else attention_mask
        return _attention_before(module, settings.previous)(module, query, key, value, mask, **kwargs)
    if kwargs.get("dropout"):
        raise ValueError(
            f"attention dropout must be 0 under anchor_attn, got {kwargs['dropout']}; set config.attention_dropout = 0."
        )
    window = kwargs.get("sliding_window")
    if isinstance(attention_mask, DeferredMask) and attention_mask.local_size != window:
        raise ValueError(
            f"{_name(module)} must hand its attention window to the attention function, got sliding_window={window} "
            f"beside a mask of local size {attention_mask.local_size}; this layer's window cannot be kept."
        )
    out = anchor_attention(
        # A rotary module that keeps cos and sin in float32 makes query and key float32.
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
    )
    return out.transpose(1, 2).contiguous(), None


@dataclass
class DeferredMask:
    """A mask that transformers asked for, built only if the attention before `wrap` is called.

    Attributes:
        arguments: what transformers gave to the mask function.
    """

    arguments: dict[str, Any]
    _built: Any = None

    @property
    def local_size(self) -> int | None:
        """The layer type's sliding window or chunk, in tokens."""
        return self.arguments.get("local_size")

    def build(self, implementation: str) -> Any:
        """The mask as the given implementation has it; None where it takes none."""
        masks = AttentionMaskInterface()
        if self._built is None and implementation in masks:
            self._built = masks[implementation](**self.arguments)
        return self._built

    def contiguous(self) -> "DeferredMask":
        """The mask itself; `generate` asks for it before it hands a mask to the model."""
        return self

    def to(self, device: torch.device | str, **kwargs: Any) -> "DeferredMask":
        """The same mask for layers on another device."""
        return DeferredMask({**self.arguments, "device": torch.device(device)})


def as_before(mask: Any, implementation: str) -> Any:
    """A mask, or one a layer type, that `generate` made ahead for a static cache, as the plain model would get it."""
    if isinstance(mask, dict):
        return {layer_type: as_before(part, implementation) for layer_type, part in mask.items()}
    built = mask.build(implementation) if isinstance(mask, DeferredMask) else mask
    return built.contiguous() if isinstance(built, Tensor) else built


def defer_mask(**arguments: Any) -> DeferredMask:
    """The mask function of a wrapped model."""
    return DeferredMask(arguments)


def _attention_before(module: nn.Module, implementation: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
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
