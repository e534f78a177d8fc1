"""Rows over several processes: whole documents to ranks, which needs no communication in attention, and Ulysses."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anchor_attn.parallel.balance import SHARED as SHARED
    from anchor_attn.parallel.balance import Assignment as Assignment
    from anchor_attn.parallel.balance import balance_documents as balance_documents
    from anchor_attn.parallel.communication import CommunicationBytes as CommunicationBytes
    from anchor_attn.parallel.communication import communication_bytes as communication_bytes
    from anchor_attn.parallel.layout import ShardedLayout as ShardedLayout
    from anchor_attn.parallel.layout import shard_layout as shard_layout
    from anchor_attn.parallel.split import split_batch as split_batch
    from anchor_attn.parallel.ulysses import ulysses_attention as ulysses_attention
    from anchor_attn.parallel.wrapping import parallelize as parallelize

# Imported when asked for: attention.py reads the layout of this package, and other modules here read attention.py.
LAZY = {
    "SHARED": "balance",
    "Assignment": "balance",
    "CommunicationBytes": "communication",
    "ShardedLayout": "layout",
    "balance_documents": "balance",
    "communication_bytes": "communication",
    "parallelize": "wrapping",
    "shard_layout": "layout",
    "split_batch": "split",
    "ulysses_attention": "ulysses",
}
__all__ = sorted(LAZY)


def __getattr__(name: str) -> Any:
    if name in LAZY:
        return getattr(import_module(f"anchor_attn.parallel.{LAZY[name]}"), name)
    raise AttributeError(f"module 'anchor_attn.parallel' has no attribute {name!r}")
