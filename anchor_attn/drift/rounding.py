"""What rounding is expected to do to one score: the spacing of each cast, propagated.

    rounding x to p bits is off by anything within ± spacing / 2        spacing = 2^(⌊log2 |x|⌋ + 1 − p)
    its square is spacing² / 12 on average                              x moved by d: of the difference of both errors
                                                                        spacing² · u(1 − u), u = d / spacing
    a score moves by the error of a number times what that number is multiplied with

Nothing is rounded here and nothing fitted: query and key of a sample of pairs, rotated in float64, say how wide the
spacings are and what an error is multiplied with. Errors of two numbers are taken as independent, and so are those of
one number at two positions, unless it has hardly moved. What is known is not estimated: the rounding of an integer
position and of a frequency, and that a number times a power of two is exact.

The angle is the one stage where an error may be as large as what it is added to: a phase that is uniform within ±h
leaves sin(h) / h of what it turns.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from anchor_attn.drift.policies import FP64, Policy, Rounding, rotary_tables, rotate, rounded
from anchor_attn.drift.states import States
from anchor_attn.drift.view import TokenPairs

SIGNIFICANT_BITS: Mapping[Rounding, int] = {"bfloat16": 8, "float16": 11, "tf32": 11, "float32": 24, "float64": 53}
SMALLEST_FLOAT16_SPACING = 2.0**-24
TINY = 1e-300
EXPONENT = 0x7FF0_0000_0000_0000  # of a float64
# u at which u(1 − u) is 1/6, as of two errors that know nothing of each other.
FORGOTTEN = (1 - 1 / math.sqrt(3)) / 2


@dataclass(frozen=True)
class Side:
    """Queries or keys of N sampled pairs, at two places each: 0 without a shift, 1 with it.

    Attributes:
        position_ids: int64 [2, N].
        first: of each pair before rotation, float64 [N, R/2].
        second: as `first`.
        cos: with its attention factor, float64 [2, N, R/2].
        sin: as `cos`.
        turned: rotated, float64 [2, N, D].
        is_exact: angles are 0, and cos and sin what every format holds, bool [2, N, 1].
    """

    position_ids: Tensor
    first: Tensor
    second: Tensor
    cos: Tensor
    sin: Tensor
    turned: Tensor
    is_exact: Tensor

    @classmethod
    def of(cls, x: Tensor, position_ids: Tensor, states: States, shift: int) -> "Side":
        """Of states [N, D] at positions [N]."""
        both = torch.stack((position_ids, position_ids + shift))
        cos, sin = torch.stack(
            [rotary_tables(ids, states.inv_freq, FP64, states.attention_factor) for ids in both], dim=1
        )
        _, first, second, _ = states.split(x.double())
        turned = torch.stack([rotate(x, ids, states, FP64) for ids in both])
        is_exact = (both == 0)[..., None] & (states.attention_factor == 1.0)
        return cls(both, first, second, cos, sin, turned, is_exact)


class RoundingModel:
    """Of N pairs of one head: how far each stage is expected to move a score, at two places.

    Args:
        query: rotated and not.
        key: of the same pairs.
        states: whose scale and frequencies are meant.
    """

    def __init__(self, query: Side, key: Side, states: States) -> None:
        self.query, self.key, self.states = query, key, states
        # What each side is multiplied with in the score.
        self.facing = (query, key.turned * states.score_scale), (key, query.turned * states.score_scale)
        self._variances: dict[tuple[str, Rounding], Tensor] = {}
        self._phases: dict[Rounding, tuple[Tensor, Tensor]] = {}

    @classmethod
    def of(
        cls, states: States, row: int, head: int, position_ids: Tensor, shift: int, sample: TokenPairs
    ) -> "RoundingModel":
        """Of sampled pairs of a row and a head."""
        ends = (states.query[row, head], sample.queries), (states.key[row, head // states.repeats], sample.keys)
        query, key = (Side.of(x[places], position_ids[places], states, shift) for x, places in ends)
        return cls(query, key, states)

    def drift(self, policy: Policy) -> tuple[Tensor, Tensor]:
        """Mean of |drift| and of its square of every pair, float64 [N] both.

        Errors are many, so that their sum is normal; only angle errors that are large move its mean away from 0.
        """
        if policy.angles not in self._phases:
            self._phases[policy.angles] = self._angles(policy.angles)
        mean, variance = self._phases[policy.angles]
        for of, rounding in _casts(policy):
            if (of.__name__, rounding) not in self._variances:
                self._variances[of.__name__, rounding] = of(self, rounding)
            variance = variance + self._variances[of.__name__, rounding]
        spread = variance.sqrt().clamp_min(TINY)
        ratio = mean / (spread * math.sqrt(2))
        size = spread * math.sqrt(2 / math.pi) * torch.exp(-ratio.square()) + mean * torch.erf(ratio)
        return size, mean.square() + variance

    def _angles(self, rounding: Rounding) -> tuple[Tensor, Tensor]:
        """Mean and variance of the drift: pair i holds Re(z), and after phase errors φ Re(z · e^(iφ))."""
        scale = self.states.score_scale
        (_, qx, qy, _), (_, kx, ky, _) = (self.states.split(side.turned[0]) for side in (self.query, self.key))
        z = torch.complex(qx * kx + qy * ky, qy * kx - qx * ky) * scale
        if rounding == "float64":  # a float32 frequency times a position is exact there
            return torch.zeros(len(z), dtype=torch.float64), torch.zeros(len(z), dtype=torch.float64)
        held_q, held_k = (rounded(side.position_ids, rounding) for side in (self.query, self.key))
        (known_q, wide_q), (known_k, wide_k) = (
            _phase_errors(side.position_ids, held, self.states.inv_freq, rounding)
            for side, held in ((self.query, held_q), (self.key, held_k))
        )
        turned = z * torch.polar(torch.ones((), dtype=torch.float64), known_q - known_k)
        apart = (held_q != held_k)[..., None]  # of one position, as it is held, both angles are off by the same
        wide_q, wide_k = wide_q * apart, wide_k * apart
        lost = _one_less(_lost(wide_q), _lost(wide_k))  # of e^(iφ), 1 less its mean
        doubled = _one_less(_lost(2 * wide_q), _lost(2 * wide_k))
        along, across = 2 * lost - lost.square() - doubled / 2, doubled / 2  # variances of cos φ and sin φ
        variance = turned.real.square() * along.clamp_min(0) + turned.imag.square() * across
        kept = turned.real * lost
        mean = (turned.real[1] - turned.real[0]) - (kept[1] - kept[0])
        return mean.sum(-1), variance.sum((0, -1))

    def _table(self, rounding: Rounding) -> Tensor:
        variance = torch.zeros(())
        for side, facing in self.facing:
            _, x, y, _ = self.states.split(facing)
            for values, weights in (
                (side.cos, side.first * x + side.second * y),
                (side.sin, side.first * y - side.second * x),
            ):
                variance = variance + _moved_by(values, weights, rounding, side.is_exact)
        return variance

    def _rotation(self, rounding: Rounding) -> Tensor:
        variance = torch.zeros(())
        for side, facing in self.facing:
            _, x, y, _ = self.states.split(facing)
            one, two = side.first * side.cos, side.second * side.sin
            three, four = side.second * side.cos, side.first * side.sin
            for values, weights in ((one, x), (two, x), (one - two, x), (three, y), (four, y), (three + four, y)):
                variance = variance + _moved_by(values, weights, rounding, side.is_exact)
        return variance

    def _read(self, rounding: Rounding) -> Tensor:
        """Rotated numbers, cast to be stored or to be multiplied."""
        of_query, of_key = (_moved_by(side.turned, facing, rounding, side.is_exact) for side, facing in self.facing)
        return of_query + of_key

    def _summed(self, rounding: Rounding) -> Tensor:
        """Partial sums, in the order of a head's numbers; narrow formats sum in float32."""
        sums = (self.query.turned * self.key.turned).cumsum(-1)
        wide: Rounding = "float64" if rounding == "float64" else "float32"
        return _moved_by(sums, torch.tensor(self.states.score_scale), wide)

    def _answered(self, rounding: Rounding) -> Tensor:
        """The score, cast."""
        score = (self.query.turned * self.key.turned).sum(-1, keepdim=True)
        return _moved_by(score, torch.tensor(self.states.score_scale), rounding)


def _casts(policy: Policy) -> Iterator[tuple[Callable[[RoundingModel, Rounding], Tensor], Rounding]]:
    """The casts of a policy behind its angles, without those that find nothing left to round."""
    yield RoundingModel._table, policy.table
    yield RoundingModel._rotation, policy.rotation
    held = policy.rotation
    for rounding in (policy.storage, policy.accumulation):
        if SIGNIFICANT_BITS[rounding] < SIGNIFICANT_BITS[held]:
            yield RoundingModel._read, rounding
            held = rounding
    yield RoundingModel._summed, policy.accumulation
    if policy.accumulation in ("bfloat16", "float16"):
        yield RoundingModel._answered, policy.accumulation


# --- one number ------------------------------------------------------------------------------------------------------


def spacing(values: Tensor, rounding: Rounding) -> Tensor:
    """Between a rounding's neighbours at float64 values; 0 at 0, which every format holds.

    spacing(torch.tensor(300.0).double(), "bfloat16")      2.0
    """
    below = (values.view(torch.int64) & EXPONENT).view(torch.float64)  # the power of two at or below
    gaps = below * 2.0 ** (1 - SIGNIFICANT_BITS[rounding])
    return torch.where(below == 0, 0.0, gaps.clamp_min(SMALLEST_FLOAT16_SPACING)) if rounding == "float16" else gaps


def _forgotten(values: Tensor, gaps: Tensor) -> Tensor:
    """How little the errors at both places [2, …] have in common: 6 u(1 − u), 1 for errors that are independent.

    Of one spacing u is the part of a step that the number moved by, whole steps aside: it is known, as 16 · θ is. Of
    two the errors are independent, unless the number hardly moved.
    """
    u = (values[1] - values[0]).abs() / gaps.amax(0).clamp_min(TINY)
    u = torch.where(gaps[0] == gaps[1], u.frac(), u.clamp_max(FORGOTTEN))
    return 6 * u * (1 - u)


def _moved_by(values: Tensor, weights: Tensor, rounding: Rounding, is_exact: Tensor | None = None) -> Tensor:
    """Variance of the drift of scores [N] by the rounding of values [2, N, n] that weigh so much in them."""
    gaps = spacing(values, rounding)
    common = 1 - _forgotten(values, gaps)
    if is_exact is not None:
        gaps = gaps.masked_fill(is_exact, 0.0)
    before, after = (gaps * weights).unbind()
    return (before.square() + after.square() - 2 * common * before * after).sum(-1) / 12


def _phase_errors(position_ids: Tensor, held: Tensor, inv_freq: Tensor, rounding: Rounding) -> tuple[Tensor, Tensor]:
    """Of angles at positions [2, N]: what the rounding of a position and a frequency adds, and the ± of their product.

    Of the error of the product, what is the same at both places leaves scores relative, and is left out.
    """
    exact, held = position_ids.double()[..., None], held.double()[..., None]
    frequencies = rounded(inv_freq, rounding).double()
    known = (held - exact) * frequencies + exact * (frequencies - inv_freq.double())
    angles = held * frequencies
    gaps = spacing(angles, rounding)
    is_exact = (frequencies.frexp().mantissa == 0.5) | (held.frexp().mantissa == 0.5)
    if rounding == "tf32":  # whose products, of 11 bits by 11, are float32's
        is_exact = torch.ones_like(is_exact)
    forgotten = _forgotten(angles, gaps)
    return known, (gaps / 2 * forgotten.sqrt()).masked_fill(is_exact, 0.0)


def _lost(width: Tensor) -> Tensor:
    """1 − sin(h) / h of half-widths h, what a phase that is uniform within ±h takes from what it turns."""
    small = width.square() / 6 * (1 - width.square() / 20)  # sin(h) / h cancels there
    return torch.where(width < 0.01, small, 1 - (width / math.pi).sinc())


def _one_less(one: Tensor, other: Tensor) -> Tensor:
    """1 − (1 − a)(1 − b), to the last digit where both are small."""
    return one + other - one * other
