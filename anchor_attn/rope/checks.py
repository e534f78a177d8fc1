"""What is asked of an extension method, and the numbers that it takes: checked before anything is changed."""

import math
import sys
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from anchor_attn.masks.layout import checked_int

# Beyond it powers of the base overflow, long after they mean anything.
MOST_TIMES = 1_000_000


@dataclass(frozen=True)
class Extension:
    """One call of `extend`; the arguments of the same names.

    Raises:
        TypeError, ValueError: factor and target_len both given, or neither, or an invalid original length.
    """

    method: str
    factor: float | None = None
    target_len: int | None = None
    original_len: int | None = None
    layer_types: tuple[str, ...] = ("full_attention",)
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.factor is not None and self.target_len is not None:
            raise ValueError(
                f"factor or target_len must be given, got both ({self.factor} and {self.target_len}); pass one."
            )
        if self.factor is None and self.target_len is None and self.method != "default":
            raise ValueError(
                f"factor or target_len must be given for method={self.method!r}, got none; pass factor=8, say."
            )
        if self.original_len is not None:
            checked_length("original_len", self.original_len)

    @property
    def only_restores(self) -> bool:
        """Whether nothing is asked for but RoPE as it was before any extension."""
        return self == Extension("default", layer_types=self.layer_types)

    def scale(self, length: int) -> float:
        """How many times a length of the original is asked for.

            Extension("yarn", target_len=65_536).scale(4096)      16.0

        Raises:
            TypeError, ValueError: an invalid factor or target, or a target that is not above the original.
        """
        if self.target_len is None:
            return 1.0 if self.factor is None else checked_factor(self.method, self.factor)
        least, rule = (length, "at least") if self.method == "default" else (length + 1, "above")
        if checked_length("target_len", self.target_len) < least:
            raise ValueError(
                f"target_len must be {rule} the original length of {length} tokens, got {self.target_len}; raise it, "
                "or say with original_len what the model was trained on."
            )
        if self.target_len > MOST_TIMES * length:
            raise ValueError(
                f"target_len must be at most {MOST_TIMES:,} times the original length of {length} tokens, got "
                f"{self.target_len}; lower it."
            )
        return self.target_len / length


def _check_real(name: str, value: float, above: int) -> None:
    """Raise a TypeError unless a value is a real number."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {shown(value)}; pass one above {above}.")


def checked_number(name: str, value: float, above: int = 0) -> float:
    """A number above another and finite, as a float.

    Raises:
        TypeError: not a number.
        ValueError: its value.
    """
    _check_real(name, value, above)
    if not above < value <= sys.float_info.max:  # as integers, some of which no float holds
        raise ValueError(f"{name} must be above {above} and finite, got {value}; pass such a number.")
    return float(value)


def checked_factor(method: str, factor: float) -> float:
    """How many times longer, as a float; above 1, where "default" also takes 1.

    Raises:
        TypeError: not a number.
        ValueError: its value.
    """
    _check_real("factor", factor, 1)
    if not 1 < factor < math.inf and not (factor == 1 and method == "default"):
        raise ValueError(f"factor must be above 1 and finite, got {factor}; pass 8, say.")
    if factor > MOST_TIMES:
        raise ValueError(f"factor must be at most {MOST_TIMES:,}, got {factor}; pass 8, say.")
    return float(factor)


def checked_length(name: str, length: int) -> int:
    """Tokens, at least one.

    Raises:
        TypeError: no integer.
        ValueError: none of them.
    """
    if checked_int(length, name) < 1:
        raise ValueError(f"{name} must be at least one token, got {length}; pass the length in tokens.")
    return int(length)


def checked_theta(theta: float) -> float:
    """A base that can be extended, as a float: above 1, where later pairs turn slower, which every method builds on.

    Raises:
        TypeError: not a number.
        ValueError: its value.
    """
    return checked_number("theta", theta, above=1)


def checked_factors(name: str, factors: Sequence[float], pairs: int) -> list[float]:
    """Rescale factors, one a pair, above 0 and not falling, as floats.

    Those of our search are at least 1. A list from elsewhere may speed a pair up, and transformers computes that.

    Raises:
        TypeError: no numbers.
        ValueError: how many they are, or one of them.
    """
    if not isinstance(factors, Sequence) or isinstance(factors, str | bytes):
        raise TypeError(f"{name} must be a list of numbers, got {shown(factors)}; pass one a pair.")
    if len(factors) != pairs:
        raise ValueError(f"{name} must hold a factor for each of {pairs} pairs, got {len(factors)}; pass {pairs}.")
    checked = [checked_number(f"{name}[{i}]", factor) for i, factor in enumerate(factors)]
    for i in range(1, pairs):
        if checked[i] < checked[i - 1]:
            raise ValueError(
                f"{name} must not fall from pair to pair, got {checked[i - 1]} before {checked[i]} at pair {i}; a "
                "slower pair is interpolated at least as much as a faster one."
            )
    return checked


def checked_flag(name: str, value: bool) -> bool:
    """True or False themselves: the text "no" would be true.

    Raises:
        TypeError: anything else.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {shown(value)}; pass one of them.")
    return value


def checked_layer_types(layer_types: Sequence[str]) -> tuple[str, ...]:
    """Kinds of layers by their names.

    Raises:
        TypeError: no names, or one outside of a list, of which each letter would be taken for a name.
    """
    is_list = isinstance(layer_types, Sequence | Set) and not isinstance(layer_types, str | bytes)
    if not is_list or not all(isinstance(layer_type, str) for layer_type in layer_types):
        raise TypeError(f"layer_types must be a list of names, got {shown(layer_types)}; pass ['full_attention'], say.")
    return tuple(layer_types)


def checked_order(low_name: str, low: float, high_name: str, high: float) -> tuple[float, float]:
    """Two numbers as floats, the first below the second.

    Raises:
        TypeError: no number.
        ValueError: not above 0 and finite, or in the other order.
    """
    low, high = checked_number(low_name, low), checked_number(high_name, high)
    if low >= high:
        raise ValueError(f"{low_name} must be below {high_name}, got {low} and {high}; leave both out for the paper's.")
    return low, high


def shown(value: Any) -> str:
    """A value in one line, however long it is."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:80]} …"
