"""What is asked of an engine besides the tensors and the layout."""

from dataclasses import dataclass

from torch import Tensor

from anchor_attn.masks.patterns import Pattern


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
