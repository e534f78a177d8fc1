"""Hugging Face decoders under anchor attention, through transformers' own registries."""

from anchor_attn.hf.settings import set_pattern as set_pattern
from anchor_attn.hf.wrapping import is_wrapped as is_wrapped
from anchor_attn.hf.wrapping import unwrap as unwrap
from anchor_attn.hf.wrapping import wrap as wrap
