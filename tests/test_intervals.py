"""Intervals: a t of the units that there are, and none below three."""

import math

import pytest

from anchor_attn.intervals import mean_interval, ratio_interval

T_OF_2, T_OF_4 = 4.302652729911275, 2.7764451051977987  # 95 %, by degrees of freedom
T_OF_2_AT_1_PERCENT = 9.924843200918293


def test_an_interval_is_the_t_of_its_units_and_needs_three() -> None:
    assert mean_interval([1.0, 2.0]).low is None
    assert mean_interval([1.0, 2.0]).half is None
    assert mean_interval([1.0, 2.0, 3.0]).half == pytest.approx(T_OF_2 / math.sqrt(3))
    assert mean_interval([2.0, 4.0, 6.0, 7.0, 30.0]).half == pytest.approx(T_OF_4 * math.sqrt(524.8 / 4 / 5))


def test_a_unit_without_a_finite_value_leaves_a_mean_without_an_interval() -> None:
    for values in ([1.0, 2.0, math.nan], [1.0, 2.0, math.inf], [1.0, math.inf, -math.inf]):
        found = mean_interval(values)
        assert not math.isfinite(found.mean)
        assert found.half is None


def test_a_paired_ratio_cancels_what_a_unit_shares_with_its_reference() -> None:
    references = [1.0, 2.0, 30.0, 4.0]
    paired = ratio_interval([1.1 * value for value in references], references)
    assert paired is not None
    assert (paired.low, paired.high) == (pytest.approx(1.1), pytest.approx(1.1))
    assert ratio_interval([0.0, 0.0], [0.0, 0.0]) is None


def test_an_interval_that_holds_with_others_is_the_t_of_their_share_of_the_5_percent() -> None:
    values, references = [1.0, 2.0, 3.0], [1.0, 1.0, 1.0]
    alone, of_five = (ratio_interval(values, references, count) for count in (1, 5))
    assert alone is not None
    assert of_five is not None
    assert alone.half == pytest.approx(T_OF_2 / math.sqrt(3))
    assert of_five.half == pytest.approx(T_OF_2_AT_1_PERCENT / math.sqrt(3))
    assert of_five.mean == alone.mean


@pytest.mark.parametrize(("values", "side"), [([3.0, 3.1, 3.2], 1), ([1.0, 1.1, 1.2], -1), ([1.0, 2.0, 3.0], 0)])
def test_an_interval_is_above_a_boundary_below_it_or_says_nothing(values: list[float], side: int) -> None:
    assert mean_interval(values).side(2.0) == side


def test_below_three_units_nothing_is_above_a_boundary() -> None:
    assert mean_interval([3.0, 3.1]).side(2.0) == 0
