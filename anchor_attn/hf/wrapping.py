"""Putting a transformers decoder under anchor attention, and taking it off again; nothing is patched.

    wrap(model) ─ own config per model ─ registers "anchor_attn" ─ proof.py runs one tiny forward
    model(..., document_ids=…) ─ before_forward: ids become a layout ─ every layer: attention_forward ─ anchor_attention

transformers hands keywords of the model to its attention function, so `document_ids` travels by itself.
"""

import sys
from typing import Any, TypeVar

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from anchor_attn.configs import configs_of, own_configs
from anchor_attn.engines.choice import check_engine
from anchor_attn.hf.forward import attention_forward, before_forward, defer_mask
from anchor_attn.hf.proof import prove
from anchor_attn.hf.refusals import refuse_unsupported
from anchor_attn.hf.settings import IMPLEMENTATION, SETTINGS, Settings, change_settings, holders, set_implementation
from anchor_attn.masks.patterns import Pattern, check_pattern_name
from anchor_attn.rope.precision import RopePrecision, check_rope_precision
from anchor_attn.rope.rotary import override_tables

HANDLES = "_anchor_attn_handles"

M = TypeVar("M", bound=nn.Module)


def wrap(model: M, pattern: Pattern = "anchor", engine: str = "auto", rope_precision: RopePrecision = "model") -> M:
    """Give a transformers decoder document-aware attention.

        wrap(model, pattern="anchor")
        model(input_ids=…, labels=…, position_ids=…, document_ids=…)

    `document_ids` is a `PackedLayout`, or an int tensor [B, S] in its convention, which is then checked once a forward.
    Without `document_ids` the model computes what it computed before, and raises if it is training or gets labels.
    Sliding layers count the anchor as an ordinary token before each document, so that one document behind the anchor
    equals the unwrapped model. The model gets a config of its own; others built from the same config stay as they are.
    Wrapping a wrapped model changes its settings. The same model may be compiled, and put under DDP, FSDP2 or PEFT,
    before or after; attention itself is left out of torch.compile's graphs, so that new documents compile nothing. A
    checkpoint of a wrapped model is a plain one: load it and wrap it again. One thread at a time may run a model with a
    rope_precision of its own.

    Args:
        model: a transformers decoder with causal softmax attention in every layer, or a PEFT model of one.
        pattern: "full", "intra_doc" or "anchor".
        engine: as `anchor_attention`.
        rope_precision: of the rotation in packed forwards, from frequencies computed anew from the config: "model"
            (what the model does), "bfloat16" (cos, sin, query and key rounded to it), "float32" or "exact" (angles in
            float64: position ten million is as good as 0). Without `document_ids` it is the model's own. Under dynamic
            NTK "model" keeps transformers' memory of longer inputs; the others depend on this input alone.

    Returns:
        The same model.

    Raises:
        TypeError: not a transformers model.
        ValueError: an unknown setting, or a model that ignores the attention interface, leaks between documents
            through other layers, or cannot be proven; the model is then as it was.
    """
    check_pattern_name(pattern)
    check_rope_precision(rope_precision)
    check_engine(engine)
    decoder = decoder_of(model)
    refuse_unsupported(decoder)
    unwrap(model)
    if any(c._attn_implementation == IMPLEMENTATION for m in model.modules() for c in configs_of(m).values()):
        raise ValueError(
            f"model must have an attention of its own beside anchor_attn, got {type(decoder).__name__} whose "
            "config names nothing else; call model.set_attn_implementation('sdpa') first."
        )
    register()
    own_configs(model)
    for module in model.modules():
        for config in configs_of(module).values():
            setattr(module, SETTINGS, Settings(pattern, engine, config._attn_implementation, rope_precision))
    set_implementation(model, IMPLEMENTATION)
    submodels = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    handles = [module.register_forward_pre_hook(before_forward, with_kwargs=True) for module in submodels]
    setattr(decoder, HANDLES, handles)
    try:
        if rope_precision != "model":
            hooks = override_tables(decoder, rope_precision)
            handles += hooks.values()  # of the list that the decoder holds: unwrap finds them there
            change_settings(model, table_hooks=tuple(hooks))
        prove(decoder)
    except BaseException:
        unwrap(model)
        raise
    return model


def unwrap(model: M) -> M:
    """Give a wrapped model the attention back that it had before; other models are left as they are.

    An implementation that was set on it since it was wrapped stays.

    Returns:
        The same model, on the config of its own that `wrap` gave it.
    """
    for module in model.modules():  # a submodel may have been wrapped by itself before
        for handle in module.__dict__.pop(HANDLES, ()):
            handle.remove()
    for module, settings in holders(model).items():
        for config in configs_of(module).values():
            if config._attn_implementation == IMPLEMENTATION:
                config._attn_implementation = settings.previous
        delattr(module, SETTINGS)
    return model


def is_wrapped(model: nn.Module) -> bool:
    """Whether `wrap` was called on this model and not undone."""
    return HANDLES in vars(decoder_of(model))


def decoder_of(model: nn.Module) -> Any:
    """The transformers model that a PEFT model adapts; any other model itself."""
    peft = sys.modules.get("peft")  # no PEFT model is here without it
    return model.get_base_model() if peft is not None and isinstance(model, peft.PeftModel) else model


def register() -> None:
    """Make the implementation known to transformers; again and again does no harm."""
    AttentionInterface.register(IMPLEMENTATION, attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, defer_mask)
