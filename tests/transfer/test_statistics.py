"""Intervals against scipy's own, pairs, and what a verdict may say."""

import math

import pytest
from scipy import stats

from transfer.statistics import Estimate, estimate, paired, verdict


@pytest.mark.parametrize("values", [[0.5, 0.6], [0.1, 0.4, 0.3], [0.61, 0.62, 0.605, 0.63, 0.59]])
def test_the_interval_is_students(values: list[float]) -> None:
    ours = estimate(values)
    assert ours is not None and ours.n == len(values)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=sum(values) / len(values), scale=stats.sem(values))
    assert ours.low == pytest.approx(low, abs=1e-12) and ours.high == pytest.approx(high, abs=1e-12)


def test_the_paired_interval_is_that_of_the_paired_t_test() -> None:
    a, b = {0: 0.7, 1: 0.8, 2: 0.75, 9: 0.1}, {2: 0.6, 1: 0.7, 0: 0.62, 7: 0.9}
    ours = paired(a, b)
    theirs = stats.ttest_rel([0.7, 0.8, 0.75], [0.62, 0.7, 0.6]).confidence_interval(0.95)
    assert ours is not None and ours.n == 3  # seeds that only one side has pair with nothing
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert paired({0: 1.0}, {1: 1.0}) is None


def test_one_value_has_no_interval_and_none_has_no_mean() -> None:
    one = estimate([0.4])
    assert one == Estimate(0.4, 1, None) and one.low is None and one.high is None
    assert estimate([]) is None
    with pytest.raises(ValueError, match="not finite"):
        estimate([0.5, math.nan])


def test_a_verdict_needs_an_interval_that_leaves_zero_out() -> None:
    assert verdict(Estimate(0.10, 3, 0.09)) == "wins"
    assert verdict(Estimate(0.10, 3, 0.10)) == "no clear difference"
    assert verdict(Estimate(-0.10, 3, 0.09)) == "loses"
    assert verdict(Estimate(0.50, 1, None)) == "one seed"
    assert verdict(None) == "no pair"
