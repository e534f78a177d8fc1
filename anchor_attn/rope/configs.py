"""Extension methods in transformers' configs: what RoPE was before, what a method writes, and how it reads back.

    config.rope_parameters      what plain transformers computes with
    config.anchor_attn_rope     beside it: the method by name, and what the config said before

A method replaces the one before it: it starts from what the config said before any.
"""

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from anchor_attn.rope.checks import Extension
from anchor_attn.rope.methods import (
    NEEDS_US,
    Original,
    Parameters,
    as_factors,
    frequencies_of,
    parameters_at_run_time,
    parameters_of,
)
from anchor_attn.rope.own_types import register

RECORD = "anchor_attn_rope"
FIELDS = ("rope_parameters", "max_position_embeddings", "original_max_position_embeddings", "head_dim")
# Of rope parameters, those that belong to a method and not to the model.
METHOD_KEYS = {
    "rope_type", "type", "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow",
    "short_factor", "long_factor", "low_freq_factor", "high_freq_factor", "mscale", "mscale_all_dim", "truncate",
    "n_hat",
}  # fmt: skip
# Where a config says the length that a model was trained on; a linear one does not.
LENGTHS = {
    "default": "max_position_embeddings",
    "dynamic": "max_position_embeddings",
    "linear": None,
    "yarn": "original_max_position_embeddings",
    "longrope": "original_max_position_embeddings",
    "llama3": "original_max_position_embeddings",
}


def read_original(config: PreTrainedConfig, layer_type: str | None = None, length: int | None = None) -> Original:
    """RoPE as a model was trained with it, before any extension, also one that it was published with.

    Args:
        config: of a text model.
        layer_type: of the layers, where kinds differ.
        length: tokens it was trained on, where the config does not say.

    Raises:
        ValueError: no rotary positions, a rope type without a plain RoPE under it, or a length that nothing says.
    """
    length = length or (getattr(config, RECORD, None) or {}).get("original", {}).get(str(layer_type))
    config = restored(config)
    parameters = getattr(config, "rope_parameters", None)
    parameters = parameters.get(layer_type) if parameters and layer_type is not None else parameters
    if not parameters or getattr(config, "layer_rope_theta", None):
        got = "with a theta for every layer" if parameters else "without"
        raise ValueError(
            f"config must have rotary positions of one theta to be extended, got {type(config).__name__} {got}; "
            "extend another model."
        )
    rope_type = parameters.get("rope_type", "default")
    if rope_type not in LENGTHS:
        raise ValueError(
            f"rope_type must be one of {tuple(LENGTHS)} to be extended, got {rope_type!r}; choose other layer_types, "
            "or another model."
        )
    said = str(LENGTHS[rope_type])
    known: Any = parameters.get(said) or getattr(config, said, None)
    if not (length or known):
        raise ValueError(
            f"original_len must be given for a config of rope_type={rope_type!r}, which does not say it, got none; "
            "pass the tokens that the model was trained on."
        )
    theta = parameters.get("rope_theta")
    theta = config.default_theta if theta is None else theta
    # A model may read more there for its own ends, as Ministral 3 does, and the original length with it.
    own = {name: value for name, value in parameters.items() if name not in METHOD_KEYS}
    if own.keys() - {"rope_theta", "partial_rotary_factor"} and "original_max_position_embeddings" in parameters:
        own["original_max_position_embeddings"] = parameters["original_max_position_embeddings"]
    part = own.get("partial_rotary_factor")
    rotary_dim = int(_head_dim(config) * (1.0 if part is None else part))
    return Original({**own, "rope_type": "default", "rope_theta": theta}, int(length or known), rotary_dim)


def extended(config: PreTrainedConfig, asked: Extension) -> PreTrainedConfig:
    """A copy of a text model's config under a method, in a form that its own class reads back.

    Raises:
        TypeError, ValueError: as `extend`.
    """
    base = restored(config)
    layer_types = _checked_layer_types(base, asked.layer_types)
    if asked.only_restores:
        return base
    originals = {layer_type: read_original(config, layer_type, asked.original_len) for layer_type in layer_types}
    lengths = {original.length for original in originals.values()}
    if len(lengths) > 1:
        raise ValueError(
            f"layer_types must name layers trained on one length, got {asked.layer_types} with {sorted(lengths)}; pass "
            "original_len, or extend one kind."
        )
    length = lengths.pop()
    scale = asked.scale(length)
    written = {
        layer_type: parameters_of(asked.method, part, scale, asked.options) for layer_type, part in originals.items()
    }
    changed = copy.deepcopy(base)
    changed.max_position_embeddings = length if asked.method == "dynamic" else round(length * scale)
    if getattr(changed, "head_dim", 0) is None:  # some of transformers' functions do not look past the None
        changed.head_dim = _head_dim(changed)
    if hasattr(changed, "original_max_position_embeddings"):  # Phi-3 has it beside, and reads that first
        changed.original_max_position_embeddings = length
    _write(changed, originals, written, asked.method, scale)
    record = {
        "method": asked.method,
        "factor": scale,
        "options": {name: _plain(value) for name, value in asked.options.items() if value is not None},
        "rope_type": parameters_at(changed, layer_types[0])["rope_type"],
        "layer_types": list(asked.layer_types),
        "original": {str(layer_type): part.length for layer_type, part in originals.items()},
        "before": {name: getattr(base, name) for name in _differing(base, changed)},
    }
    setattr(changed, RECORD, record)
    return changed


def adopt_config(config: PreTrainedConfig, changed: PreTrainedConfig) -> None:
    """Make RoPE in a config what it is in another of its class."""
    for name in _differing(config, changed):
        setattr(config, name, copy.deepcopy(getattr(changed, name)))
    if hasattr(config, RECORD):
        delattr(config, RECORD)
    if hasattr(changed, RECORD):
        setattr(config, RECORD, copy.deepcopy(getattr(changed, RECORD)))


def restored(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of a config as it was before any extension of ours."""
    config = copy.deepcopy(config)
    record = getattr(config, RECORD, None)
    if record is not None:
        for name, value in record["before"].items():
            setattr(config, name, value)
        delattr(config, RECORD)
    return config


def at_run_time(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config that transformers' rotary modules compute with: itself, or a copy where it names a type of ours."""
    parameters = config.rope_parameters
    if not needs_us(config):
        return config
    shown = copy.deepcopy(config)
    if "rope_type" in parameters:
        shown.rope_parameters = parameters_at_run_time(parameters)
    else:
        shown.rope_parameters = {
            layer_type: part and parameters_at_run_time(part) for layer_type, part in parameters.items()
        }
    return shown


def needs_us(config: PreTrainedConfig) -> bool:
    """Whether plain transformers refuses this config."""
    return any(part["rope_type"].startswith(NEEDS_US) for part in parts_of(config))


def chooses_by_length(model_or_config: nn.Module | PreTrainedConfig) -> bool:
    """Whether frequencies depend on the input's length, as those of "dynamic" and of "longrope" with a short set do.

    The length is that of the longest row of a batch: with continuous positions a document is then rotated by what it is
    packed with, and no attention mask keeps it apart. `check_isolation` changes tokens and no lengths: it sees nothing.

    Args:
        model_or_config: of transformers.
    """
    config: Any = model_or_config if isinstance(model_or_config, PreTrainedConfig) else model_or_config.config
    return any(
        "dynamic" in part["rope_type"] or part.get("short_factor") != part.get("long_factor")
        for part in parts_of(config.get_text_config())
    )


def _differing(config: PreTrainedConfig, changed: PreTrainedConfig) -> list[str]:
    """The fields of RoPE that two configs of a class do not agree on."""
    return [name for name in FIELDS if getattr(config, name, None) != getattr(changed, name, None)]


def parameters_at(config: PreTrainedConfig, layer_type: str | None) -> Parameters:
    """The rope parameters of one kind of layer; None for a model whose layers share them."""
    return config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]


def parts_of(config: PreTrainedConfig) -> list[Parameters]:
    """The rope parameters of every kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    parts = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return [part for part in parts if "rope_type" in part]


def _checked_layer_types(config: PreTrainedConfig, layer_types: Sequence[str]) -> list[str | None]:
    """The kinds of layers to extend; None for a model whose layers share their frequencies."""
    parameters = getattr(config, "rope_parameters", None) or {}
    known = [layer_type for layer_type, part in parameters.items() if isinstance(part, dict)]
    if not known and tuple(layer_types) == ("full_attention",):
        return [None]
    if not layer_types or set(layer_types) - set(known):
        raise ValueError(
            f"layer_types must name some of {tuple(known) or ('full_attention',)}, got {tuple(layer_types)}; pass "
            "kinds of layers that have rotary positions of their own."
        )
    return [*layer_types]


def _write(
    config: PreTrainedConfig,
    originals: dict[str | None, Original],
    written: dict[str | None, Parameters],
    method: str,
    scale: float,
) -> None:
    """Put a method's parameters into a config, as factors where its class takes nothing else."""
    if None not in written and any("truncate" in part for part in written.values()):
        raise ValueError(
            "truncate must be left out for a model with frequencies for each kind of layer, got False, which "
            "transformers does not read there; leave it out."
        )
    before = config.rope_parameters

    def put(parameters: dict[str | None, Parameters]) -> None:
        full = {layer_type: {**originals[layer_type].parameters, **part} for layer_type, part in parameters.items()}
        config.rope_parameters = full.get(None, {**before, **full})

    put(written)
    if needs_us(config):
        register()
    static = method not in ("dynamic", "longrope")
    if static and not _reads_back(config):  # Phi-3 knows no type but "longrope", which takes all of them
        written = {
            layer_type: as_factors(originals[layer_type], scale, *frequencies_of(part, originals[layer_type]))
            for layer_type, part in written.items()
        }
        put(written)
    if not _reads_back(config):
        raise ValueError(
            f"method must be one that {type(config).__name__} can hold, got {method!r}, which its validation refuses; "
            "choose a base with method='default' and theta, or method='ntk'."
        )


def _reads_back(config: PreTrainedConfig) -> bool:
    """Whether the config's own class takes the parameters as they are; Phi-3 makes "longrope" of "yarn"."""
    try:
        return type(config).from_dict(config.to_dict()).rope_parameters == config.rope_parameters
    except Exception:  # each class validates in its own way
        return False


def _head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _plain(value: Any) -> Any:
    """An option as JSON has it."""
    if isinstance(value, bool | int):
        return value
    return [float(part) for part in value] if isinstance(value, Sequence) else float(value)
