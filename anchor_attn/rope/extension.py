"""Longer contexts: any extension method on a model or a config, by one call; and loading what needs our code.

What was before is kept in the config beside (`config.anchor_attn_rope`), so that a method replaces the one before it
and never comes on top of it.
"""

import copy
import inspect
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from anchor_attn.configs import configs_of
from anchor_attn.rope.methods import METHODS, NEEDS_US, Original, Parameters, as_factors, frequencies_of
from anchor_attn.rope.rotary import adopt, keep_start, rebuilt, rotaries_of

RECORD = "anchor_attn_rope"

M = TypeVar("M", nn.Module, PreTrainedConfig)


def extend(
    model_or_config: M,
    method: str,
    factor: float | None = None,
    target_len: int | None = None,
    *,
    original_len: int | None = None,
    layer_types: Sequence[str] = ("full_attention",),
    **options: Any,
) -> M:
    """Give a model or a config the frequencies of a longer context, ready to train.

        extend(model, "yarn", factor=8)            a model of 4,096 tokens, for 32,768
        extend(model, "default", theta=5e6, target_len=65_536)      a larger base, as AnchorAttention's paper has it

    "dynamic" and "longrope" with a set for short inputs choose by the length of the input: a document's result then
    depends on what it is packed with.

    Args:
        model_or_config: of transformers; changed, and returned. A wrapped model stays wrapped.
        method: a name of the module's table.
        factor: how many times the original length, above 1.
        target_len: the length itself, in tokens, in place of a factor.
        original_len: tokens the model was trained on, where its config does not say.
        layer_types: which kinds of layers are extended, where a model has frequencies for each kind: sliding layers
            never look farther than their window.
        options: of "default", theta; of "ntk_by_parts", "yarn" and "yarn_paper", beta_fast (32) and beta_slow (1), in
            turns, and of the last two attention_factor; of "longrope", factors (a list, or the file of a search),
            short_factors (ones), n_hat (0) and attention_factor; of "llama3", low_freq_factor (1) and
            high_freq_factor (4).

    Returns:
        The same model or config.

    Raises:
        ValueError: an unknown method or option, a factor that is none, a length below the original one, factors of the
            wrong length or falling, a config without rotary positions, or a rotary module that cannot be rebuilt;
            nothing is changed then.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {tuple(METHODS)}, got {method!r}; pass one of them.")
    model = model_or_config if isinstance(model_or_config, nn.Module) else None
    config: PreTrainedConfig = (model_or_config if model is None else model.config).get_text_config()
    if method == "longrope":
        factor, options = _read_search(factor, target_len, options)
    _check_options(method, options)
    originals = {kind: read_original(config, kind, original_len) for kind in _kinds(config, layer_types)}
    length = next(iter(originals.values())).length
    scale = _checked_scale(method, factor, target_len, length)
    changed = _extended(config, method, scale, length, originals, options)
    if model is None:
        _adopt_config(config, changed)
        return model_or_config
    fresh = {module: rebuilt(module, changed) for module in {rotary.module for rotary in rotaries_of(model)}}
    if len(fresh) != 1:
        raise ValueError(
            f"model must have one rotary module to be extended, got {type(model).__name__} with {len(fresh)}; "
            "extend its config before the model is made."
        )
    for held in {id(c): c for m in model.modules() for c in configs_of(m).values()}.values():
        if type(held) is type(config):
            _adopt_config(held, changed)
    for module, new in fresh.items():
        adopt(module, new)
    if options.get("n_hat"):
        for rotary in rotaries_of(model):
            if rotary.layer_type in originals:
                keep_start(rotary, originals[rotary.layer_type].inv_freq, options["n_hat"])
    return model_or_config


def load(path: str | Path, **options: Any) -> PreTrainedModel:
    """A causal model from a folder or a hub, also one whose RoPE needs this package.

    Args:
        path: as `AutoModelForCausalLM.from_pretrained`.
        options: as `AutoModelForCausalLM.from_pretrained`.
    """
    config = AutoConfig.from_pretrained(path)
    record = getattr(config, RECORD, None)
    if record is None or not record["rope_type"].startswith(NEEDS_US):
        return AutoModelForCausalLM.from_pretrained(path, **options)
    plain = extend(config, "default", layer_types=record["layer_types"])
    model = AutoModelForCausalLM.from_pretrained(path, config=plain, **options)
    return extend(model, record["method"], record["factor"], layer_types=record["layer_types"], **record["options"])


def read_original(config: PreTrainedConfig, kind: str | None = None, length: int | None = None) -> Original:
    """RoPE as a model was trained with it, before any extension.

    Args:
        config: of a text model.
        kind: of layer, where kinds differ.
        length: tokens it was trained on, where the config does not say.

    Raises:
        ValueError: no rotary positions, a rope type without a plain RoPE under it, or a length that nothing says.
    """
    kept = (getattr(config, RECORD, None) or {}).get("original", {}).get(str(kind))
    if kept is not None:
        return Original(kept["parameters"], length or kept["length"], kept["rotary_dim"])
    parameters = getattr(config, "rope_parameters", None)
    parameters = parameters.get(kind) if parameters and kind is not None else parameters
    if not parameters:
        raise ValueError(f"config must have rotary positions to be extended, got {type(config).__name__} without.")
    rope_type = parameters.get("rope_type", "default")
    if rope_type not in LENGTHS:
        raise ValueError(f"rope_type must be one of {tuple(LENGTHS)} to be extended, got {rope_type!r}.")
    said = LENGTHS[rope_type]
    known = parameters.get(said) if said == "original_max_position_embeddings" else getattr(config, str(said), None)
    if not (length or known):
        raise ValueError(
            f"original_len must be given for a config of rope_type={rope_type!r}, which does not say it, got none; "
            "pass the tokens that the model was trained on."
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    theta = parameters.get("rope_theta") or config.default_theta
    # A model may read more there for its own ends, as Ministral 3 does, and the original length with it.
    own = {name: value for name, value in parameters.items() if name not in METHOD_KEYS}
    if own.keys() - {"rope_theta", "partial_rotary_factor"} and known:
        own["original_max_position_embeddings"] = known
    rotary_dim = int(head_dim * (own.get("partial_rotary_factor") or 1.0))
    return Original({**own, "rope_type": "default", "rope_theta": theta}, length or int(known), rotary_dim)


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


def _kinds(config: PreTrainedConfig, layer_types: Sequence[str]) -> list[str | None]:
    """The kinds of layers to extend; None for a model whose layers share their frequencies."""
    parameters = getattr(config, "rope_parameters", None) or {}
    if not any(isinstance(value, dict) for value in parameters.values()):
        return [None]
    kinds = [kind for kind in layer_types if parameters.get(kind)]
    if not kinds:
        raise ValueError(f"layer_types must name some of {tuple(parameters)}, got {tuple(layer_types)}.")
    return kinds


def _read_search(
    factor: float | None, target_len: int | None, options: dict[str, Any]
) -> tuple[float | None, dict[str, Any]]:
    """Factors, and what else a search found, from its file."""
    factors = options.get("factors")
    if not isinstance(factors, str | Path):
        if factors is None:
            raise ValueError("factors must be given for method='longrope', got none; run anchor-attn rope search.")
        return factor, {**options, "factors": [float(part) for part in factors]}
    found = json.loads(Path(factors).read_text())
    read = {name: found[name] for name in ("factors", "short_factors", "n_hat") if found.get(name) is not None}
    if factor is None and target_len is None:
        factor = found["factor"]
    return factor, {**options, **read}


def _check_options(method: str, options: dict[str, Any]) -> None:
    known = [name for name in inspect.signature(METHODS[method]).parameters if name not in ("original", "factor")]
    if unknown := sorted(options.keys() - set(known)):
        has = f"one of {tuple(known)}" if known else "left out: it has none"
        raise ValueError(f"options of method={method!r} must be {has}, got {', '.join(unknown)}.")


def _checked_scale(method: str, factor: float | None, target_len: int | None, length: int) -> float:
    if factor is not None and target_len is not None:
        raise ValueError(f"factor or target_len must be given, got both ({factor} and {target_len}); pass one.")
    if target_len is not None:
        if target_len < length or (target_len == length and method != "default"):
            raise ValueError(
                f"target_len must be above the original length of {length} tokens, got {target_len}; raise it, or say "
                "with original_len what the model was trained on."
            )
        return target_len / length
    if factor is None and method == "default":
        return 1.0
    if factor is None:
        raise ValueError(f"factor or target_len must be given for method={method!r}, got none; pass factor=8, say.")
    if not 1 < factor < math.inf:
        raise ValueError(f"factor must be above 1 and finite, got {factor}; pass 8, say.")
    return float(factor)


def _extended(
    config: PreTrainedConfig,
    method: str,
    scale: float,
    length: int,
    originals: dict[str | None, Original],
    options: dict[str, Any],
) -> PreTrainedConfig:
    """A copy of the config under a method, in a form that its own class reads back."""
    changed = copy.deepcopy(config)
    changed.max_position_embeddings = length if method == "dynamic" else round(length * scale)
    if getattr(changed, "head_dim", 0) is None:  # some of transformers' functions do not look past the None
        changed.head_dim = changed.hidden_size // changed.num_attention_heads
    if hasattr(changed, "original_max_position_embeddings"):  # Phi-3 has it beside, and reads that first
        changed.original_max_position_embeddings = length
    written = {kind: METHODS[method](original, scale, **options) for kind, original in originals.items()}
    _write(changed, written, originals)
    if not _reads_back(changed) and method != "dynamic":  # Phi-3 knows no type but "longrope", which takes all of them
        written = {
            kind: as_factors(originals[kind], scale, *frequencies_of(parameters, originals[kind]))
            for kind, parameters in written.items()
        }
        _write(changed, written, originals)
    if not _reads_back(changed):
        raise ValueError(
            f"method must be one that {type(config).__name__} can hold, got {method!r}, which its validation refuses; "
            "choose a base with method='default' and theta, or method='ntk'."
        )
    record = {
        "method": method,
        "factor": scale,
        "options": options,
        "rope_type": next(iter(written.values()))["rope_type"],
        "layer_types": [kind for kind in originals if kind is not None],
        "original": {
            str(kind): {"parameters": part.parameters, "length": part.length, "rotary_dim": part.rotary_dim}
            for kind, part in originals.items()
        },
    }
    setattr(changed, RECORD, None if method == "default" and not options and scale == 1 else record)
    return changed


def _write(
    config: PreTrainedConfig, written: dict[str | None, Parameters], originals: dict[str | None, Original]
) -> None:
    written = {kind: {**originals[kind].parameters, **parameters} for kind, parameters in written.items()}
    config.rope_parameters = written.get(None) or {**config.rope_parameters, **written}


def _reads_back(config: PreTrainedConfig) -> bool:
    """Whether the config's own class takes the parameters as they are; Phi-3 makes "longrope" of "yarn"."""
    try:
        return type(config).from_dict(config.to_dict()).rope_parameters == config.rope_parameters
    except Exception:  # each class validates in its own way
        return False


def _adopt_config(config: PreTrainedConfig, changed: PreTrainedConfig) -> None:
    for name in ("rope_parameters", "max_position_embeddings", "original_max_position_embeddings", "head_dim", RECORD):
        if hasattr(changed, name):
            setattr(config, name, copy.deepcopy(getattr(changed, name)))
