"""The transformers configs that a model's modules hold."""

from torch import nn
from transformers import PreTrainedConfig


def configs_of(module: nn.Module) -> dict[str, PreTrainedConfig]:
    """The configs that a module holds itself, by attribute."""
    return {name: value for name, value in vars(module).items() if isinstance(value, PreTrainedConfig)}
