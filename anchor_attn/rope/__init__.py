"""Rotary position embeddings whose precision is stated and kept."""

from anchor_attn.rope.precision import ROPE_PRECISIONS as ROPE_PRECISIONS
from anchor_attn.rope.precision import RopePrecision as RopePrecision
from anchor_attn.rope.precision import RotaryTable as RotaryTable
from anchor_attn.rope.precision import apply_rotary as apply_rotary
from anchor_attn.rope.precision import inverse_frequencies as inverse_frequencies
from anchor_attn.rope.precision import packed_rotary_table as packed_rotary_table
from anchor_attn.rope.precision import rotary_table as rotary_table
