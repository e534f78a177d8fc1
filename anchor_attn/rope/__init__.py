"""Rotary position embeddings: longer contexts by every method of the literature, and a precision that is kept.

frequencies   the formulas that transformers lacks
checks        what `extend` was asked for, and the numbers that methods take
methods       what each method writes into a config
configs       what a config said before a method, and says after it
own_types     rope types of ours, made known to transformers
extension     `extend` and `load`: a method on a model or a config
search        LongRoPE's search for factors
rotary        a transformers model's own rotary modules
precision     tables and rotation at a stated precision; needs torch alone
casts         in what precision a model rotates by itself
inspection    what a config does now, and what each method would do to it
draw          the picture of that
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
    from anchor_attn.rope.configs import chooses_by_length as chooses_by_length
    from anchor_attn.rope.extension import extend as extend
    from anchor_attn.rope.extension import load as load
    from anchor_attn.rope.methods import METHODS as METHODS
    from anchor_attn.rope.methods import method_frequencies as method_frequencies
    from anchor_attn.rope.search import PROGRESSIVE as PROGRESSIVE
    from anchor_attn.rope.search import SearchResult as SearchResult
    from anchor_attn.rope.search import search_factors as search_factors

# What needs transformers is imported when it is asked for.
LAZY = {
    "METHODS": "anchor_attn.rope.methods",
    "PROGRESSIVE": "anchor_attn.rope.search",
    "SearchResult": "anchor_attn.rope.search",
    "chooses_by_length": "anchor_attn.rope.configs",
    "extend": "anchor_attn.rope.extension",
    "load": "anchor_attn.rope.extension",
    "method_frequencies": "anchor_attn.rope.methods",
    "search_factors": "anchor_attn.rope.search",
}


def __getattr__(name: str) -> Any:
    if name in LAZY:
        return getattr(import_module(LAZY[name]), name)
    raise AttributeError(f"module 'anchor_attn.rope' has no attribute {name!r}")
