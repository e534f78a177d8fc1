"""Which transformers configs a module holds."""

import copy
from typing import Any

from torch import nn
from transformers import PreTrainedConfig


def configs_of(module: nn.Module) -> dict[str, PreTrainedConfig]:
    """The configs that a module holds itself, by attribute."""
    return {name: value for name, value in vars(module).items() if isinstance(value, PreTrainedConfig)}


def own_configs(model: nn.Module) -> None:
    """Give a model copies of its configs, as shared inside it as they were: models built from one share it."""
    copies: dict[int, Any] = {}
    for module in model.modules():
        for name, config in configs_of(module).items():
            setattr(module, name, copy.deepcopy(config, copies))
