"""Numbers of a report of drift, as text."""

import math


def brief(value: float | None) -> str:
    """A magnitude: 0.0043 as "4.3e-3", 0.2 as "0.20", and "–" for none."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    if 0.1 <= value < 100:
        return f"{value:.2f}"
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa  # inf and nan have none


def name_shift(shift: int) -> str:
    """1,000 as "1,000", 4,000,000 as "4M"."""
    return f"{shift // 10**6}M" if shift % 10**6 == 0 else f"{shift:,}"


def brief_ratio(ratio: float | None) -> str:
    """1.234 as "1.23", 0.99953 as "0.9995", which is not 1, and "–" for none."""
    if ratio is None:
        return "–"
    apart = abs(ratio - 1)
    places = 2 if not 0 < apart < 0.05 else min(12, 1 - math.floor(math.log10(apart)))
    return f"{ratio:.{places}f}"


def percent(share: float | None, unit: str = " %") -> str:
    """0.0123 as "1.2 %", and "–" for none."""
    return "–" if share is None else f"{100 * share:.2g}{unit}"
