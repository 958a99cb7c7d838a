"""Estimates, curves and what is read from them, against cases worked out by hand."""

from __future__ import annotations

import math

import pytest

from lime_dist.comparison.curves import Curve, find_flops_share, trailing_means
from lime_dist.comparison.estimates import Estimate, estimate, paired_difference

LOSSES = (5.0, 4.0, 3.0, 2.5)


def curve(*losses: float, flops: tuple[int, ...] = (), factor: int = 1) -> Curve:
    """A loss each 100 FLOPs from 0 on, times `factor`."""
    flops = flops or tuple(100 * factor * index for index in range(len(losses)))
    return Curve(steps=tuple(range(len(losses))), tokens=flops, flops=flops, losses=losses)


def test_mean_and_standard_error() -> None:
    # deviations -2, 0, 2: variance (4 + 0 + 4) / 2 = 4, error 2 / sqrt(3)
    assert estimate([1.0, 3.0, 5.0]) == Estimate(mean=3.0, standard_error=pytest.approx(2 / math.sqrt(3)), count=3)


def test_one_value_has_no_error() -> None:
    assert estimate([3.0]) == Estimate(mean=3.0, standard_error=None, count=1)


def test_differences_are_paired_by_seed() -> None:
    # Seeds lie far apart, pairs do not: 0.1 and 0.3, so 0.2 with a deviation of 0.1 * sqrt(2) over sqrt(2)
    first, second = {1: 2.1, 2: 5.3, 7: 9.0}, {2: 5.0, 1: 2.0, 3: 0.0}
    found = paired_difference(first, second)
    assert found is not None and found.count == 2
    assert (found.mean, found.standard_error) == (pytest.approx(0.2), pytest.approx(0.1))
    assert paired_difference({1: 2.0}, {2: 2.0}) is None


def test_loss_difference_as_perplexity_ratio() -> None:
    ratio = Estimate(mean=math.log(2), standard_error=0.1, count=3).exponential()
    assert (ratio.mean, ratio.standard_error, ratio.count) == (pytest.approx(2), pytest.approx(0.2), 3)
    assert Estimate(mean=0.0, standard_error=None, count=1).exponential() == Estimate(
        mean=1, standard_error=None, count=1
    )


def test_means_of_a_window() -> None:
    assert trailing_means([1.0, 2.0, 6.0, 4.0], 2) == [1.5, 4.0, 5.0]
    assert trailing_means([1.0, 2.0], 1) == [1.0, 2.0]
    assert trailing_means([1.0], 2) == []


@pytest.mark.parametrize(
    ("flops", "loss"), [(0, 5.0), (100, 4.0), (150, 3.5), (225, 2.875), (300, 2.5), (301, None), (-1, None)]
)
def test_loss_at_flops(flops: float, loss: float | None) -> None:
    assert curve(*LOSSES).find_loss_at(flops) == loss


@pytest.mark.parametrize(
    ("loss", "flops"), [(6.0, 0), (5.0, 0), (4.5, 50), (4.0, 100), (2.75, 250), (2.5, 300), (2.49, None)]
)
def test_flops_to_a_loss(loss: float, flops: float | None) -> None:
    assert curve(*LOSSES).find_flops_to(loss) == flops


def test_the_first_time_counts_and_a_rise_does_not() -> None:
    bumpy = curve(5.0, 3.0, 4.0, 2.0)
    assert bumpy.find_flops_to(3.0) == 100
    # The running minimum is 3 at 200 FLOPs: from there to 2 at 300.
    assert bumpy.find_flops_to(2.5) == 250


def test_equal_curves_save_nothing() -> None:
    for losses in (LOSSES, (5.0, 2.0, 3.0), (3.0, 3.0)):  # falling; with a better loss before the last; level
        assert find_flops_share(curve(*losses), curve(*losses)) == 1


@pytest.mark.parametrize("factor", [2, 3, 10])
def test_a_curve_of_a_multiple_of_the_flops(factor: int) -> None:
    dear, cheap = curve(*LOSSES, factor=factor), curve(*LOSSES)
    assert find_flops_share(cheap, dear) == pytest.approx(1 / factor)
    assert find_flops_share(dear, cheap) == pytest.approx(factor)


def test_a_lower_curve_by_hand() -> None:
    # From 3 at 100 to 2 at 200: 2.5 at 150, half of the other's 300.
    assert find_flops_share(curve(5.0, 3.0, 2.0), curve(*LOSSES)) == pytest.approx(0.5)


def test_a_loss_that_is_never_reached() -> None:
    assert find_flops_share(curve(*LOSSES), curve(5.0, 3.0, 2.0)) is None


def test_a_bad_end_of_the_other_is_no_gain() -> None:
    diverged = curve(5.0, 4.0, 3.0, 4.0)  # as low as its last loss at 100 FLOPs already
    assert find_flops_share(curve(5.0, 4.0, 3.0, 2.0), diverged) == 1
