"""Rope types of ours, of which plain transformers can read the parameters and not compute the tables.

    rope_type                        what its tables have and frequencies alone do not say
    "needs_anchor_attn_longrope"     the first n̂ positions keep the original angles

A rotary module of transformers asks its type's function for frequencies, one a pair and for all positions. None are
right for these types, so that their function raises, and no model runs on wrong ones. Where this package was not used,
nothing is registered, and transformers raises a bare KeyError of the type's name.
"""

import logging
from typing import Any

from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from anchor_attn.rope.methods import LONGROPE_WITH_START, NEEDS_US


def register() -> None:
    """Make these types known to transformers; again and again does no harm, and nothing else is changed."""
    ROPE_INIT_FUNCTIONS[LONGROPE_WITH_START] = refuse_frequencies
    logging.getLogger("transformers.modeling_rope_utils").addFilter(is_of_others)


def refuse_frequencies(config: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, float]:
    """In place of frequencies, what to do: called where transformers builds a model from such a config."""
    raise ValueError(
        f"config must have RoPE that transformers computes alone to be built from, got {type(config).__name__} with "
        f"{LONGROPE_WITH_START!r}, whose first positions keep other angles; extend(config, 'default') first and extend "
        "the model, or read a checkpoint with anchor_attn.rope.load."
    )


def is_of_others(record: logging.LogRecord) -> bool:
    """A filter for transformers' log, which notes of every type unknown to it that it does not validate it."""
    message = record.getMessage()
    return not (message.startswith("Missing validation function") and NEEDS_US in message)
