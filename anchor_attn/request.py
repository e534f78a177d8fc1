"""What is asked of an engine besides the tensors and the layout, and what the choice between engines depends on."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from anchor_attn.masks import PackedLayout
from anchor_attn.masks.patterns import Pattern, reach


@dataclass(frozen=True)
class Request:
    """One call's settings, checked; the arguments of `anchor_attention` of the same names."""

    pattern: Pattern
    scale: float
    softcap: float | None = None
    sliding_window: int | None = None
    keep_anchor: bool = True
    sinks: Tensor | None = None
    dropout: float = 0.0

    @property
    def mask_key(self) -> tuple[Pattern, int | None, bool]:
        """All that the mask depends on besides the layout, in the order of `dense_mask`."""
        return self.pattern, self.sliding_window, self.keep_anchor

    @property
    def keeps_anchor_outside(self) -> bool:
        """Whether queries see the anchor although it lies outside their window."""
        return self.pattern == "anchor" and self.sliding_window is not None and self.keep_anchor

    def window(self, layout: PackedLayout) -> int | None:
        """The window as a kernel takes it, in tokens of the layout's longest row at most."""
        return None if self.sliding_window is None else reach(layout, self.sliding_window)


class Call(NamedTuple):
    """All that the choice of a route depends on, hashable; `create_call` makes it.

    Attributes:
        device: of the tensors.
        dtype: in which the attention is computed, autocast's where that is on.
        head_dim: the wider of head size and value size.
        needs_grad: whether a backward will follow.
        pattern: who attends to whom.
        window: tokens, or None.
        keeps_anchor_outside: whether queries see the anchor although it lies outside their window.
        softcap: c, or None.
        has_sinks: whether learned sinks join the softmax.
        dropout: the share of weights that is dropped.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    needs_grad: bool
    pattern: Pattern
    window: int | None = None
    keeps_anchor_outside: bool = False
    softcap: float | None = None
    has_sinks: bool = False
    dropout: float = 0.0

    @property
    def features(self) -> str:
        """What is asked for beyond plain attention, as measurements are kept by: "window+sinks", or "plain"."""
        asked = {
            "window": self.window is not None and not self.keeps_anchor_outside,
            "kept_anchor": self.keeps_anchor_outside,
            "softcap": self.softcap is not None,
            "sinks": self.has_sinks,
            "dropout": self.dropout > 0,
        }
        return "+".join(name for name, is_asked in asked.items() if is_asked) or "plain"


def create_call(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, request: Request) -> Call:
    """What a route is chosen by, from the arguments of `anchor_attention`."""
    return Call(
        device=query.device,
        dtype=autocast_dtype(query),
        head_dim=max(query.shape[-1], value.shape[-1]),
        needs_grad=needs_grad(query, key, value, request.sinks),
        pattern=request.pattern,
        window=request.window(layout),
        keeps_anchor_outside=request.keeps_anchor_outside,
        softcap=request.softcap,
        has_sinks=request.sinks is not None,
        dropout=request.dropout,
    )


def autocast_dtype(states: Tensor) -> torch.dtype:
    """The dtype that autocast computes an attention over `states` in; their own where it is off."""
    device_type = states.device.type
    known = torch.amp.is_autocast_available(device_type)
    if not known or not torch.is_autocast_enabled(device_type) or states.dtype == torch.float64:
        return states.dtype
    return torch.get_autocast_dtype(device_type)


def needs_grad(*states: Tensor | None) -> bool:
    """Whether a backward will follow an attention over these tensors."""
    return torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in states)
