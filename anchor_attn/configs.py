"""The transformers configs that a model's modules hold."""

import copy
from typing import Any

from torch import nn
from transformers import PreTrainedConfig


def configs_of(module: nn.Module) -> dict[str, PreTrainedConfig]:
    """The configs that a module holds itself, by attribute."""
    return {name: value for name, value in vars(module).items() if isinstance(value, PreTrainedConfig)}


def own_configs(model: nn.Module) -> None:
    """Give a model configs of its own, for models built from one config share it.

    Modules that held one config hold one copy of it afterwards.
    """
    copies: dict[int, Any] = {}  # deepcopy's memo: by the id of what was copied
    for module in model.modules():
        for name, config in configs_of(module).items():
            setattr(module, name, copy.deepcopy(config, copies))
