"""What each extension method writes into a config, and the frequencies that come of it.

    method          what changes                                         as plain transformers loads it
    "default"       nothing, or the base (theta=…)                       default
    "linear"        position interpolation, θ/s                          linear
    "ntk"           NTK-aware, a base of b · s^(R/(R−2))                 default
    "dynamic"       NTK-aware by the input's length                      dynamic
    "ntk_by_parts"  slow pairs interpolated, fast ones kept              longrope, a list of factors
    "yarn"          by parts, ramp in the pair's index, and √(1/t)       yarn
    "yarn_paper"    by parts, ramp in its turns, and √(1/t)              longrope, a list of factors
    "longrope"      searched factors, from position n̂ on                 longrope; with n̂ only by `load`
    "llama3"        by wavelength, smooth between                        llama3

Where transformers has a method, its own function computes it.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from anchor_attn.masks.layout import checked_int
from anchor_attn.rope.checks import (
    checked_factor,
    checked_factors,
    checked_flag,
    checked_length,
    checked_number,
    checked_order,
    checked_theta,
    shown,
)
from anchor_attn.rope.frequencies import by_parts, ntk_theta, rescale_factors, yarn_attention_factor
from anchor_attn.rope.precision import inverse_frequencies

# Its name says to plain transformers, which does not know it, what it lacks.
NEEDS_US = "needs_anchor_attn_"
LONGROPE_WITH_START = f"{NEEDS_US}longrope"

Parameters = dict[str, Any]


@dataclass(frozen=True)
class Original:
    """RoPE as a model was trained with it, of one kind of layer.

    Attributes:
        parameters: transformers' own, of type "default".
        length: tokens [L].
        rotary_dim: how many numbers of a head are rotated [R].
    """

    parameters: Parameters
    length: int
    rotary_dim: int

    @property
    def theta(self) -> float:
        """The base."""
        return self.parameters["rope_theta"]

    @property
    def inv_freq(self) -> Tensor:
        """Inverse frequencies, float32 [R/2]."""
        return inverse_frequencies(self.rotary_dim, self.theta)


def method_frequencies(
    method: str,
    theta: float,
    rotary_dim: int,
    original_len: int,
    factor: float,
    seq_len: int | None = None,
    **options: Any,
) -> tuple[Tensor, float]:
    """What a method makes of RoPE, as transformers computes it.

        method_frequencies("yarn", 10_000.0, 128, 4096, 16.0)[1]      1.2773

    Args:
        method: a name of the module's table.
        theta: the base.
        rotary_dim: how many numbers of a head are rotated [R].
        original_len: tokens the model was trained on.
        factor: how many times longer.
        seq_len: of the input, for methods that choose by it; None for the longest.
        options: as `extend`.

    Returns:
        Inverse frequencies, float32 [R/2], and the factor on cos and sin.

    Raises:
        TypeError, ValueError: as `extend`.
    """
    options = checked_options(method, options)
    factor, original_len = checked_factor(method, factor), checked_length("original_len", original_len)
    if seq_len is not None:
        checked_length("seq_len", seq_len)
    original = Original({"rope_type": "default", "rope_theta": theta}, original_len, rotary_dim)
    longest = round(original_len * factor) if seq_len is None else seq_len
    return frequencies_of(parameters_of(method, original, factor, options), original, longest)


def parameters_of(method: str, original: Original, factor: float, options: dict[str, Any]) -> Parameters:
    """What a method writes in place of, or beside, the original parameters.

    Raises:
        TypeError, ValueError: an option's value, or RoPE that cannot be extended: a base of 1 or less, an odd size.
    """
    checked_theta(original.theta)
    inverse_frequencies(original.rotary_dim, original.theta)
    return METHODS[method](original, factor, **options)


def frequencies_of(parameters: Parameters, original: Original, seq_len: int | None = None) -> tuple[Tensor, float]:
    """What transformers makes of rope parameters: inverse frequencies, float32 [R/2], and the factor on cos and sin."""
    parameters = {"rope_theta": original.theta, **parameters_at_run_time(parameters)}
    parameters.pop("partial_rotary_factor", None)  # in the rotary size already
    if parameters["rope_type"] == "default":
        return inverse_frequencies(original.rotary_dim, parameters["rope_theta"]), 1.0
    # Of these "dynamic" alone reads the longest length, as the original one; others warn unless it is longer than that.
    longest = original.length if parameters["rope_type"] == "dynamic" else round(original.length * parameters["factor"])
    config = LlamaConfig(head_dim=original.rotary_dim, max_position_embeddings=longest, rope_parameters=parameters)
    with torch.device("cpu"):
        return ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, torch.device("cpu"), seq_len=seq_len)


def parameters_at_run_time(parameters: Parameters) -> Parameters:
    """What transformers' functions compute with, where a checkpoint says that they do not suffice."""
    known = {name: value for name, value in parameters.items() if name != "n_hat"}
    return {**known, "rope_type": known["rope_type"].removeprefix(NEEDS_US)}


def checked_options(method: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a method, with lists and Python's numbers for tensors and arrays.

    Raises:
        ValueError: an unknown method, or an option that it has not.
    """
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"method must be one of {tuple(METHODS)}, got {shown(method)}; pass one of them.")
    known = [name for name in inspect.signature(METHODS[method]).parameters if name not in ("original", "factor")]
    if unknown := sorted(options.keys() - set(known)):
        has = f"of {tuple(known)}" if known else "left out"
        raise ValueError(f"options of method={method!r} must be {has}, got {', '.join(unknown)}; leave them out.")
    return {name: value.tolist() if hasattr(value, "tolist") else value for name, value in options.items()}


# --- each method's parameters ----------------------------------------------------------------------------------------


def _default(original: Original, factor: float, theta: float | None = None) -> Parameters:
    return {"rope_type": "default"} | ({} if theta is None else {"rope_theta": checked_theta(theta)})


def _linear(original: Original, factor: float) -> Parameters:
    return {"rope_type": "linear", "factor": factor}


def _ntk(original: Original, factor: float) -> Parameters:
    return {"rope_type": "default", "rope_theta": ntk_theta(original.theta, factor, original.rotary_dim)}


def _dynamic(original: Original, factor: float) -> Parameters:
    ntk_theta(original.theta, factor, original.rotary_dim)  # raises where it has no meaning
    return {"rope_type": "dynamic", "factor": factor}


def _ntk_by_parts(original: Original, factor: float, beta_fast: float = 32.0, beta_slow: float = 1.0) -> Parameters:
    slow, fast = checked_order("beta_slow", beta_slow, "beta_fast", beta_fast)
    return as_factors(original, factor, by_parts(original.inv_freq, factor, original.length, slow, fast), 1.0)


def _yarn(
    original: Original,
    factor: float,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    attention_factor: float | None = None,
    mscale: float | None = None,
    mscale_all_dim: float | None = None,
    truncate: bool = True,
) -> Parameters:
    slow, fast = checked_order("beta_slow", beta_slow, "beta_fast", beta_fast)
    given = {"attention_factor": attention_factor, "mscale": mscale, "mscale_all_dim": mscale_all_dim}
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original.length,
        "beta_fast": fast,
        "beta_slow": slow,
        **{name: checked_number(name, value) for name, value in given.items() if value is not None},
        **({} if checked_flag("truncate", truncate) else {"truncate": False}),
    }


def _yarn_paper(
    original: Original,
    factor: float,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    attention_factor: float | None = None,
) -> Parameters:
    parameters = _ntk_by_parts(original, factor, beta_fast, beta_slow)
    if attention_factor is None:
        attention_factor = yarn_attention_factor(factor)
    return {**parameters, "attention_factor": checked_number("attention_factor", attention_factor)}


def _longrope(
    original: Original,
    factor: float,
    factors: Sequence[float] | None = None,
    short_factors: Sequence[float] | None = None,
    n_hat: int = 0,
    attention_factor: float | None = None,
) -> Parameters:
    if factors is None:
        raise ValueError("factors must be given for method='longrope', got none; search them, or pass one a pair.")
    pairs = original.rotary_dim // 2
    if checked_int(n_hat, "n_hat") < 0:
        raise ValueError(f"n_hat must be 0 or more positions, got {n_hat}; pass 0 to rescale all of them.")
    if n_hat > original.length:
        raise ValueError(
            f"n_hat must be at most the original length of {original.length} tokens, got {n_hat}; no position beyond "
            "it has a trained angle to keep."
        )
    parameters = {
        "rope_type": LONGROPE_WITH_START if n_hat else "longrope",
        "factor": factor,
        "original_max_position_embeddings": original.length,
        "long_factor": checked_factors("factors", factors, pairs),
        "short_factor": checked_factors("short_factors", factors if short_factors is None else short_factors, pairs),
    }
    if attention_factor is not None:
        parameters["attention_factor"] = checked_number("attention_factor", attention_factor)
    return {**parameters, "n_hat": int(n_hat)} if n_hat else parameters


def _llama3(
    original: Original, factor: float, low_freq_factor: float = 1.0, high_freq_factor: float = 4.0
) -> Parameters:
    low, high = checked_order("low_freq_factor", low_freq_factor, "high_freq_factor", high_freq_factor)
    return {
        "rope_type": "llama3",
        "factor": factor,
        "original_max_position_embeddings": original.length,
        "low_freq_factor": low,
        "high_freq_factor": high,
    }


METHODS: dict[str, Callable[..., Parameters]] = {
    "default": _default,
    "linear": _linear,
    "ntk": _ntk,
    "dynamic": _dynamic,
    "ntk_by_parts": _ntk_by_parts,
    "yarn": _yarn,
    "yarn_paper": _yarn_paper,
    "longrope": _longrope,
    "llama3": _llama3,
}


def as_factors(original: Original, factor: float, inv_freq: Tensor, attention_factor: float) -> Parameters:
    """Any static method, as plain transformers loads it."""
    factors = rescale_factors(original.inv_freq, inv_freq)
    return {
        "rope_type": "longrope",
        "factor": factor,
        "original_max_position_embeddings": original.length,
        "long_factor": factors,
        "short_factor": factors,
        "attention_factor": float(attention_factor),
    }
