"""Longer contexts: any extension method on a model or a config, by one call; and loading what needs our code."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from anchor_attn.configs import configs_of, own_configs
from anchor_attn.rope.checks import Extension, checked_layer_types
from anchor_attn.rope.configs import RECORD, adopt_config, at_run_time, extended, parameters_at, parts_of, read_original
from anchor_attn.rope.methods import NEEDS_US, checked_options, frequencies_of
from anchor_attn.rope.rotary import RotaryForm, adopt, keep_start, rebuilt, recognise, rotaries_of

# Of `from_pretrained`, what says where the files are.
HUB_OPTIONS = (
    "cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token",
)  # fmt: skip

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
        extend(model, "default")                   as it was

    A method replaces the one before it, also one that the model was published with: it starts from the RoPE under it.
    The model gets a config of its own and frequencies in float32; others built from the same config stay as they are.

    "dynamic", and "longrope" with a set for short inputs, choose by the length of the input: with continuous positions
    a document's result then depends on what it is packed with (`chooses_by_length`). "dynamic" depends on earlier
    inputs too, as transformers computes it: from the original length on, frequencies are those of the longest input
    since one below it. `wrap(model, rope_precision="float32")`, or "exact", rotates packed inputs by their own length
    alone.

    The first n̂ positions take more than frequencies: a live model gets a hook for them, and `load` brings it back. A
    config alone has none, so that building a model from it raises; extend the model instead.

    Args:
        model_or_config: of transformers; changed, and returned. A wrapped model stays wrapped.
        method: a name of the table in `anchor_attn.rope.methods`.
        factor: how many times the original length, above 1.
        target_len: the length itself, in tokens, in place of a factor.
        original_len: tokens the model was trained on, where its config does not say.
        layer_types: which kinds of layers are extended, where a model has frequencies for each kind: sliding layers
            never look farther than their window.
        options: of "default", theta; of "ntk_by_parts", "yarn" and "yarn_paper", beta_fast (32) and beta_slow (1), in
            turns, and of the last two attention_factor; of "yarn", mscale, mscale_all_dim and truncate as models are
            published with them; of "longrope", factors (a list, a tensor, or the file of a search, which says the
            others too), short_factors for inputs up to the original length (the same factors), n_hat (0) and
            attention_factor; of "llama3", low_freq_factor (1) and high_freq_factor (4).

    Returns:
        The same model or config.

    Raises:
        TypeError: no model or config of transformers, or an option of the wrong type.
        ValueError: an unknown method or option, an invalid factor, a length below the original one, factors of the
            wrong length or falling, a config without rotary positions, or a rotary module that cannot be rebuilt;
            nothing is changed then.
    """
    config = _text_config(model_or_config)
    options, layer_types = checked_options(method, options), checked_layer_types(layer_types)
    factor, original_len, options = _with_file(method, factor, target_len, original_len, options)
    changed = extended(config, Extension(method, factor, target_len, original_len, layer_types, options))
    if isinstance(model_or_config, PreTrainedConfig):
        adopt_config(config, changed)
        return model_or_config
    model: nn.Module = model_or_config
    rotary: Any = _rotary_module(model)
    fresh = rebuilt(rotary, at_run_time(changed))
    record = getattr(changed, RECORD, None)  # none where the config is again what the model was made from
    forms = _checked_forms(fresh, changed, layer_types) if record else {}
    scales = _fresh_scales(model, config, changed)
    # Nothing above changes the model, and nothing below fails.
    own_configs(model)
    for held in {id(held): held for part in model.modules() for held in configs_of(part).values()}.values():
        if type(held) is type(changed):
            adopt_config(held, changed)
    adopt(rotary, fresh)
    rotary.config = at_run_time(_text_config(model))
    for layer, scale in scales.items():
        layer.scaling = scale
    if n_hat := record and record["options"].get("n_hat"):
        for found in rotaries_of(rotary):
            if found.layer_type in forms:
                original = read_original(changed, found.layer_type)
                keep_start(found, forms[found.layer_type], original.inv_freq, n_hat, original.length)
    return model_or_config


def load(path: str | Path, **options: Any) -> PreTrainedModel:
    """A causal model from a folder or a hub, also one whose RoPE needs this package.

        extend(model, "longrope", factors="factors.json").save_pretrained("longer")
        load("longer", dtype="bfloat16")      its first n̂ positions kept, which plain transformers cannot

    Args:
        path: as `AutoModelForCausalLM.from_pretrained`.
        options: as `AutoModelForCausalLM.from_pretrained`.
    """
    where = {name: options[name] for name in HUB_OPTIONS if name in options}
    read, _ = PreTrainedConfig.get_config_dict(path, **where)
    record = read.get(RECORD)
    if record is None or not record["rope_type"].startswith(NEEDS_US):
        return AutoModelForCausalLM.from_pretrained(path, **options)
    # From a dictionary: the class's own validation would refuse what it does not know, or warn.
    plain = {name: value for name, value in {**read, **record["before"]}.items() if name != RECORD}
    config = CONFIG_MAPPING[read["model_type"]].from_dict(plain)
    model = AutoModelForCausalLM.from_pretrained(path, config=config, **options)
    length = next(iter(record["original"].values()))
    extend(
        model,
        record["method"],
        record["factor"],
        original_len=length,
        layer_types=record["layer_types"],
        **record["options"],
    )
    return model


def _with_file(
    method: str, factor: float | None, target_len: int | None, original_len: int | None, options: dict[str, Any]
) -> tuple[float | None, int | None, dict[str, Any]]:
    """Factor, original length and options, with those that the file of a search says where the call says nothing."""
    path = options.get("factors")
    if method != "longrope" or not isinstance(path, str | Path):
        return factor, original_len, options
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        said = {name: found.get(name) for name in ("short_factors", "n_hat", "attention_factor")}
        factors, searched = list(found["factors"]), float(found["factor"])
        trained_on = found.get("original_max_position_embeddings")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"factors must be the result of a search, got {str(path)!r} ({type(error).__name__}: {error}); pass the "
            "file that anchor-attn rope search wrote, or a list of factors."
        ) from error
    options = {name: value for name, value in said.items() if value is not None} | options | {"factors": factors}
    if factor is None and target_len is None:
        factor = searched
    return factor, trained_on if original_len is None else original_len, options


def _text_config(model_or_config: nn.Module | PreTrainedConfig) -> PreTrainedConfig:
    """The config that holds the rope parameters of the text model."""
    config = getattr(model_or_config, "config", None) if isinstance(model_or_config, nn.Module) else model_or_config
    if not isinstance(config, PreTrainedConfig):
        raise TypeError(
            f"model_or_config must be a model or a config of transformers, got {type(model_or_config).__name__}; pass "
            "the model itself, before DDP or FSDP."
        )
    return config.get_text_config()


def _rotary_module(model: nn.Module) -> nn.Module:
    """The one rotary module of a model."""
    modules = {rotary.module for rotary in rotaries_of(model)}
    if len(modules) != 1:
        raise ValueError(
            f"model must have one rotary module to be extended, got {type(model).__name__} with {len(modules)}; "
            "extend its config before the model is made."
        )
    return modules.pop()


def _checked_forms(
    fresh: nn.Module, config: PreTrainedConfig, layer_types: Sequence[str]
) -> dict[str | None, RotaryForm]:
    """The form of each table that a new rotary module gives for extended layers, once it is seen to follow its config.

    Raises:
        ValueError: the module computes other frequencies than the method has.
    """
    forms = {}
    for found in rotaries_of(fresh):
        if found.layer_type is not None and found.layer_type not in layer_types:
            continue
        original = read_original(config, found.layer_type)
        longest = 2 * original.length
        forms[found.layer_type] = recognise(found)
        expected, attention_factor = frequencies_of(parameters_at(config, found.layer_type), original, longest)
        given, given_factor = found.frequencies(longest)
        if not torch.equal(given, expected) or given_factor != attention_factor:
            raise ValueError(
                f"model must have a rotary module that computes what its config says, got {type(fresh).__name__}, "
                "which gives other frequencies; set them yourself."
            )
    return forms


def _fresh_scales(model: nn.Module, config: PreTrainedConfig, changed: PreTrainedConfig) -> dict[Any, float]:
    """What DeepSeek's attention layers, when they are made, take from YaRN into the scale of their scores."""
    if not any("mscale_all_dim" in part for part in (*parts_of(config), *parts_of(changed))):
        return {}
    layers: list[Any] = [part for part in model.modules() if {"scaling", "layer_idx"} <= vars(part).keys()]
    with torch.device("meta"):
        return {layer: type(layer)(changed, layer.layer_idx).scaling for layer in layers}
