"""What a config says about its RoPE, and what every method would make of it.

    pair    wavelength    turns    linear     ntk    yarn
       0           6.3    651.9     0.125   1.000   1.000
      32         628.3      6.5     0.125   0.348   0.596
      63      54,410.1      0.1     0.125   0.125   0.125

are three pairs of Llama 2 under a factor of 8: tokens of a turn, turns in the 4,096 tokens that it was trained on, and
θ'/θ by method. Pairs that have not turned once there, 46 to 63, meet angles in longer contexts that training never had.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from anchor_attn.rope.checks import checked_factor, checked_length
from anchor_attn.rope.configs import RECORD, parameters_at, read_original
from anchor_attn.rope.frequencies import turns_in
from anchor_attn.rope.methods import METHODS, NEEDS_US, Original, frequencies_of, method_frequencies

# Layers of this kind are extended, where a model has kinds: sliding ones never look farther than their window.
EXTENDED_LAYER_TYPE = "full_attention"


@dataclass(frozen=True)
class RopeNow:
    """RoPE of one kind of layer, as its config has it.

    Attributes:
        layer_type: None where all layers share their frequencies.
        method: a name of ours where `extend` wrote it, else transformers' type.
        factor: how many times the original length it was made for; 1 where nothing is extended.
        present_len: tokens that the config promises now.
        attention_factor: on cos and sin.
        n_hat: first positions that keep the original frequencies.
        inv_freq: now, at the present length, float32 [R/2].
        original: before any extension.
    """

    layer_type: str | None
    method: str
    factor: float
    present_len: int
    attention_factor: float
    n_hat: int
    inv_freq: Tensor
    original: Original

    @property
    def is_extendable(self) -> bool:
        """Whether `extend` would change this kind of layer."""
        return self.layer_type in (None, EXTENDED_LAYER_TYPE)

    @property
    def turns(self) -> Tensor:
        """How often each original pair turns in the original length, float64 [R/2]."""
        return turns_in(self.original.inv_freq, self.original.length)

    @property
    def unturned_pairs(self) -> list[int]:
        """Pairs that have not turned once in the original length: of their angles, training has seen a part only."""
        return [pair for pair, turns in enumerate(self.turns.tolist()) if turns < 1]

    def summary(self) -> dict[str, Any]:
        """As a result file says it; the pairs are its records."""
        return {
            "layer_type": self.layer_type,
            "method": self.method,
            "factor": self.factor,
            "theta": self.original.theta,
            "rotary_dim": self.original.rotary_dim,
            "original_len": self.original.length,
            "present_len": self.present_len,
            "attention_factor": self.attention_factor,
            "n_hat": self.n_hat,
            "unturned_pairs": self.unturned_pairs,
        }


@dataclass(frozen=True)
class RopeUnder:
    """RoPE of the same layers at a longer length, as a method would have it.

    Attributes:
        ratio: θ'/θ of every pair, float64 [R/2].
        attention_factor: on cos and sin.
        n_hat: first positions that keep the original frequencies.
    """

    ratio: Tensor
    attention_factor: float
    n_hat: int = 0

    def summary(self) -> dict[str, Any]:
        """As a result file says it; the pairs are its records."""
        return {"attention_factor": self.attention_factor, "n_hat": self.n_hat}


def describe_rope(config: PreTrainedConfig, original_len: int | None = None) -> list[RopeNow]:
    """What a config says, for every kind of layer that has rotary positions.

    Args:
        config: of a model, or of its text part.
        original_len: tokens the model was trained on, where its config does not say.

    Raises:
        ValueError: no rotary positions, a rope type that nothing is known about, or an original length that nothing
            says.
    """
    if original_len is not None:
        checked_length("original_len", original_len)
    config = config.get_text_config()
    parameters = getattr(config, "rope_parameters", None) or {}
    layer_types: list[str | None] = [
        layer_type for layer_type, value in parameters.items() if isinstance(value, dict) and value
    ]
    return [_describe(config, layer_type, original_len) for layer_type in layer_types or [None]]


def kind_to_extend(kinds: Sequence[RopeNow]) -> RopeNow:
    """Of the kinds of layers that `describe_rope` gives, the one that `extend` changes; the first where it is none."""
    return next((now for now in kinds if now.is_extendable), kinds[0])


def compare_methods(
    original: Original, factor: float, searched: Mapping[str, Any] | None = None
) -> tuple[dict[str, RopeUnder], dict[str, str]]:
    """What every method makes of RoPE at the length that the factor asks for.

    Args:
        original: RoPE before any extension.
        factor: how many times the original length, above 1.
        searched: options of "longrope", as `extend` takes them: factors, n_hat and attention_factor. Without them that
            method is left out.

    Returns:
        By method; and by method that has no meaning here, why.

    Raises:
        TypeError, ValueError: an invalid factor, or searched options that do not fit.
    """
    checked_factor("linear", factor)
    under, left_out = {}, {}
    for method in METHODS:
        if method == "longrope" and searched is None:
            continue
        options = dict(searched or {}) if method == "longrope" else {}
        try:
            inv_freq, attention_factor = method_frequencies(
                method, original.theta, original.rotary_dim, original.length, factor, **options
            )
        except ValueError as error:
            if options:
                raise
            left_out[method] = str(error)
            continue
        ratio = inv_freq.double() / original.inv_freq.double()
        under[method] = RopeUnder(ratio, float(attention_factor), options.get("n_hat", 0))
    return under, left_out


def list_pairs(now: RopeNow, under: Mapping[str, RopeUnder | None]) -> list[dict[str, Any]]:
    """A record a pair: its wavelength in tokens, its turns in the original length, and θ'/θ now and by method.

    Args:
        now: of one kind of layer.
        under: as `compare_methods` gives it; None for a method that leaves this kind of layer as it is.
    """
    theta, pairs = now.original.inv_freq.double(), len(now.original.inv_freq)
    columns = {"now": (now.inv_freq.double() / theta).tolist()}
    columns |= {method: [None] * pairs if rope is None else rope.ratio.tolist() for method, rope in under.items()}
    return [
        {
            "layer_type": now.layer_type,
            "pair": pair,
            "wavelength_tokens": 2 * math.pi / frequency,
            "turns": turns,
            "turned_once": turns >= 1,
            **{name: column[pair] for name, column in columns.items()},
        }
        for pair, (frequency, turns) in enumerate(zip(theta.tolist(), now.turns.tolist(), strict=True))
    ]


def name_pairs(pairs: Sequence[int]) -> str:
    """Pairs as stretches.

    name_pairs([3, 4, 5, 9])      "3–5, 9"
    """
    stretches: list[list[int]] = []
    for pair in pairs:
        if stretches and pair == stretches[-1][-1] + 1:
            stretches[-1].append(pair)
        else:
            stretches.append([pair])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}–{part[-1]}" for part in stretches)


def _describe(config: PreTrainedConfig, layer_type: str | None, original_len: int | None) -> RopeNow:
    original = read_original(config, layer_type, original_len)
    parameters = parameters_at(config, layer_type)
    record = getattr(config, RECORD, None) or {}
    written = record if str(layer_type) in record.get("original", {}) else {}
    present_len = int(config.max_position_embeddings)
    inv_freq, attention_factor = frequencies_of(parameters, original, present_len)
    rope_type = parameters.get("rope_type", "default").removeprefix(NEEDS_US)
    factor = written.get("factor") or parameters.get("factor") or present_len / original.length
    extended = written or rope_type != "default"
    return RopeNow(
        layer_type=layer_type,
        method=written.get("method", rope_type),
        factor=float(factor) if extended else 1.0,
        present_len=present_len,
        attention_factor=float(attention_factor),
        n_hat=int(parameters.get("n_hat") or 0),
        inv_freq=inv_freq,
        original=original,
    )
