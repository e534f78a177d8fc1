"""What a wrapped model was asked for, kept beside every config that the model holds."""

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from anchor_attn.configs import configs_of
from anchor_attn.masks.patterns import Pattern
from anchor_attn.rope.precision import RopePrecision
from anchor_attn.rope.rotary import TableHook

# Not a word with "flash" in it: transformers treats such names as FlashAttention and drops the mask.
IMPLEMENTATION = "anchor_attn"
SETTINGS = "_anchor_attn"


@dataclass(frozen=True)
class Settings:
    """What `wrap` was asked for, held by every module that holds the model's config.

    Attributes:
        pattern: as `anchor_attention`.
        engine: as `anchor_attention`.
        previous: the attention implementation before, which a forward without `document_ids` uses.
        rope_precision: as `anchor_attn.rope`.
        table_hooks: what gives packed forwards their rotary tables; none for "model".
    """

    pattern: Pattern
    engine: str
    previous: str
    rope_precision: RopePrecision = "model"
    table_hooks: tuple[TableHook, ...] = ()


def holders(model: nn.Module) -> dict[nn.Module, Settings]:
    """The modules that hold the model's config, each with its settings."""
    return {module: vars(module)[SETTINGS] for module in model.modules() if SETTINGS in vars(module)}


def set_implementation(model: nn.Module, implementation: str) -> None:
    """Point the configs of a wrapped model to an attention implementation."""
    for module in holders(model):
        for config in configs_of(module).values():
            config._attn_implementation = implementation


def change_settings(model: nn.Module, **changes: Any) -> None:
    """Give every holder of a wrapped model its settings with some of the fields changed."""
    for module, settings in holders(model).items():
        setattr(module, SETTINGS, replace(settings, **changes))


def set_pattern(model: nn.Module, pattern: Pattern) -> None:
    """Give a wrapped model, proven already, another pattern."""
    change_settings(model, pattern=pattern)
