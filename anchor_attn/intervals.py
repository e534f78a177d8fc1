"""What may be said of a mean or of a ratio: its 95 % t interval over independent units, or that there is none."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

UNITS_FOR_AN_INTERVAL = 3


@dataclass(frozen=True)
class Interval:
    """A mean and where it lies.

        ratio_interval([1.1, 2.3, 3.2], [1.0, 2.0, 3.0])      1.10 (95 % 1.00 … 1.20, over 3)

    Attributes:
        mean: of the units.
        low: lower end of the 95 % interval; None below three units.
        high: its upper end.
        units: how many.
    """

    mean: float
    low: float | None
    high: float | None
    units: int

    @property
    def half(self) -> float | None:
        """Half of its width."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2

    def side(self, boundary: float) -> int:
        """1 if all of the interval is above a boundary, −1 if all of it is below, 0 if nothing can be said."""
        if self.low is None or self.high is None:
            return 0
        return int(self.low > boundary) - int(self.high < boundary)

    def text(self, form: str = ".3g", times: float = 1.0) -> str:
        """The mean and its interval in a number format, each multiplied."""
        if self.low is None or self.high is None:
            return f"{self.mean * times:{form}} (no interval below {UNITS_FOR_AN_INTERVAL} units)"
        return f"{self.mean * times:{form}} (95 % {self.low * times:{form}} … {self.high * times:{form}}, {self.units})"


def mean_interval(values: Sequence[float]) -> Interval:
    """The mean of units.

    Args:
        values: one a unit; one at least.
    """
    if not all(map(math.isfinite, values)):  # fsum raises for infinities of both signs
        return Interval(sum(values) / len(values), None, None, len(values))
    mean = math.fsum(values) / len(values)
    return _around(mean, [value - mean for value in values], 1.0)


def ratio_interval(values: Sequence[float], references: Sequence[float], comparisons: int = 1) -> Interval | None:
    """The mean of some values over the mean of others, paired by unit; None where the others are zero.

    Its error is that of the residuals, value − ratio · reference: what a unit has in common with its reference cancels.

    Args:
        values: one a unit.
        references: of the same units.
        comparisons: that share the 5 % by which an interval may miss: each has 5 % over so many (Bonferroni).
    """
    reference = math.fsum(references) / len(references)
    if not reference:
        return None
    ratio = math.fsum(values) / len(values) / reference
    residuals = [value - ratio * other for value, other in zip(values, references, strict=True)]
    return _around(ratio, residuals, reference, comparisons)


def _around(mean: float, residuals: Sequence[float], divisor: float, comparisons: int = 1) -> Interval:
    units = len(residuals)
    if units < UNITS_FOR_AN_INTERVAL or not math.isfinite(mean):
        return Interval(mean, None, None, units)
    from scipy import stats

    variance = math.fsum(residual**2 for residual in residuals) / (units - 1)
    half = float(stats.t.ppf(1 - 0.025 / comparisons, units - 1)) * math.sqrt(variance / units) / abs(divisor)
    return Interval(mean, mean - half, mean + half, units)
