"""Numbers that extension methods take, checked before anything is changed."""

import math
from collections.abc import Sequence
from numbers import Real

from anchor_attn.masks.layout import checked_int


def check_type(name: str, value: float) -> None:
    """Raise a TypeError unless a value is a real number."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}; pass one above 0.")


def checked_number(name: str, value: float) -> float:
    """A number above 0 and finite, as a float.

    Raises:
        TypeError: not a number.
        ValueError: its value.
    """
    check_type(name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be above 0 and finite, got {value}; pass such a number.")
    return float(value)


def checked_factor(method: str, factor: float) -> float:
    """How many times longer, as a float; above 1, where "default" also takes 1.

    Raises:
        TypeError: not a number.
        ValueError: its value.
    """
    check_type("factor", factor)
    if not 1 < factor < math.inf and not (factor == 1 and method == "default"):
        raise ValueError(f"factor must be above 1 and finite, got {factor}; pass 8, say.")
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


def checked_factors(name: str, factors: Sequence[float], pairs: int) -> list[float]:
    """Rescale factors, one a pair, above 0 and not falling, as floats.

    Raises:
        TypeError: no numbers.
        ValueError: how many they are, or one of them.
    """
    if isinstance(factors, str) or not hasattr(factors, "__len__"):
        raise TypeError(f"{name} must be a list of numbers, got {factors!r}; pass one a pair.")
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
