"""AnchorAttention for packed long-context training: wrap a decoder, measure RoPE, compare attentions."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from anchor_attn.attention import anchor_attention as anchor_attention
from anchor_attn.masks import PackedLayout as PackedLayout

if TYPE_CHECKING:
    from anchor_attn.hf import unwrap as unwrap
    from anchor_attn.hf import wrap as wrap
    from anchor_attn.isolation import assert_isolated as assert_isolated
    from anchor_attn.isolation import check_isolation as check_isolation
    from anchor_attn.module import AnchorAttention as AnchorAttention

__version__ = "0.1.0"
__all__ = [
    "AnchorAttention",
    "PackedLayout",
    "anchor_attention",
    "assert_isolated",
    "check_isolation",
    "unwrap",
    "wrap",
]

# What needs transformers, or half of torch's compiler, is imported when it is asked for.
LAZY = {
    "AnchorAttention": "anchor_attn.module",
    "assert_isolated": "anchor_attn.isolation",
    "check_isolation": "anchor_attn.isolation",
    "unwrap": "anchor_attn.hf",
    "wrap": "anchor_attn.hf",
}


def __getattr__(name: str) -> Any:
    if name in LAZY:
        return getattr(import_module(LAZY[name]), name)
    raise AttributeError(f"module 'anchor_attn' has no attribute {name!r}")
