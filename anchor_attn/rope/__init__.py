"""Rotary position embeddings: longer contexts by every method of the literature, and a precision that is kept.

frequencies   the formulas that transformers has not
methods       what each method writes into a config
extension     `extend` and `load`: a method on a model or a config
rotary        a transformers model's own rotary modules
precision     tables and rotation at a stated precision; needs torch alone
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from anchor_attn.rope.precision import ROPE_PRECISIONS as ROPE_PRECISIONS
from anchor_attn.rope.precision import RopePrecision as RopePrecision
from anchor_attn.rope.precision import RotaryTable as RotaryTable
from anchor_attn.rope.precision import apply_rotary as apply_rotary
from anchor_attn.rope.precision import inverse_frequencies as inverse_frequencies
from anchor_attn.rope.precision import packed_rotary_table as packed_rotary_table
from anchor_attn.rope.precision import rotary_table as rotary_table

if TYPE_CHECKING:
    from anchor_attn.rope.extension import extend as extend
    from anchor_attn.rope.extension import load as load
    from anchor_attn.rope.methods import METHODS as METHODS
    from anchor_attn.rope.methods import method_frequencies as method_frequencies

# What needs transformers is imported when it is asked for.
LAZY = {
    "METHODS": "anchor_attn.rope.methods",
    "extend": "anchor_attn.rope.extension",
    "load": "anchor_attn.rope.extension",
    "method_frequencies": "anchor_attn.rope.methods",
}


def __getattr__(name: str) -> Any:
    if name in LAZY:
        return getattr(import_module(LAZY[name]), name)
    raise AttributeError(f"module 'anchor_attn.rope' has no attribute {name!r}")
