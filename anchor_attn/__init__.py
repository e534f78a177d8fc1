"""AnchorAttention for packed long-context training: wrap a decoder, measure RoPE, compare attentions."""

from typing import TYPE_CHECKING, Any

from anchor_attn.attention import anchor_attention as anchor_attention
from anchor_attn.masks import PackedLayout as PackedLayout

if TYPE_CHECKING:
    from anchor_attn.hf import unwrap as unwrap
    from anchor_attn.hf import wrap as wrap

__version__ = "0.1.0"
__all__ = ["PackedLayout", "anchor_attention", "unwrap", "wrap"]


def __getattr__(name: str) -> Any:
    """Import what needs transformers only when it is asked for."""
    if name in {"wrap", "unwrap"}:
        from anchor_attn import hf

        return getattr(hf, name)
    raise AttributeError(f"module 'anchor_attn' has no attribute {name!r}")
