"""Rotary modules that come back as they were: "dynamic" and "longrope" ones rewrite themselves in every forward."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from anchor_attn.rope.rotary import rotaries_of


@contextmanager
def kept_rotaries(model: nn.Module) -> Iterator[None]:
    """Put buffers and attributes of a model's rotary modules back behind what runs it.

        4,096 tokens through a "dynamic" model of 2,048: inv_freq is that of 4,096, max_seq_len_cached 4,096

    transformers registers a new inv_freq for the one and copies into the other's; a shorter input then goes on with it.
    """
    modules = dict.fromkeys(rotary.module for rotary in rotaries_of(model))
    before = [(module, _attributes(module), _buffers(module)) for module in modules]
    try:
        yield
    finally:
        for module, attributes, buffers in before:
            for name in _attributes(module).keys() - attributes.keys():
                delattr(module, name)
            for name, value in attributes.items():
                setattr(module, name, value)
            for name, (buffer, content) in buffers.items():
                buffer.copy_(content)
                module._buffers[name] = buffer


def _attributes(module: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if not name.startswith("_") and name != "training"}


def _buffers(module: Any) -> dict[str, Any]:
    """Each with what it holds."""
    return {name: (buffer, buffer.clone()) for name, buffer in module._buffers.items() if buffer is not None}
