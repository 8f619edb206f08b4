"""Means with intervals over seeds, paired differences, and what they permit to say. Values in a metric's own unit.

Which interval a number has (`Estimate.rule`):

    logit t    95 % Student-t interval of the mean over seeds, on the logit scale of the metric's range, so that it stays inside
    t          the same without a scale: of differences, and of metrics without a range
    wilson, bootstrap    of the test images, where nothing is drawn and there are no seeds to speak of (`transfer.measurement`)

Over seeds it speaks of the spread that drawing other training images and another initial head would give, and not of other test
images or of another pretraining run.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transfer.metric_facts import CONFIDENCE, LEVEL

OF_TEST_IMAGES = ("wilson", "bootstrap")
"""Rules of intervals that speak of other test images."""
LEAST_ERROR = 1e-9
"""Of a mean: below it values are equal but for rounding, and show no spread that a test could be made of."""
Range = tuple[float, float]


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` values with its interval."""

    mean: float
    n: int
    low: float | None = None
    high: float | None = None
    """None with one drawn value, for values that are all equal (there is a spread, but they do not show it), and for a share
    whose mean is not inside its range."""
    rule: str = ""
    """How the interval was made; "" = there is none."""
    p: float | None = None
    """Of a difference: two-sided, of the t test that its mean is zero."""

    @property
    def half_width(self) -> float | None:
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


def estimate(values: Sequence[float], *, within: Range | None = None) -> Estimate | None:
    """The mean of `values` and its Student-t interval; None without values. ValueError if one is not finite.

    Args:
        within: range of the metric. The interval is then of the logit of the mean's place in it, by the delta method, and never
            leaves it: logit(m) +- t se / (m (1 - m)).
    """
    n = len(values)
    if n == 0:
        return None
    if not all(map(math.isfinite, values)):
        raise ValueError(f"an interval over values that are not finite: {list(values)}; leave failed trials out")
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(mean, 1)
    error = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)
    half = t_quantile(n - 1) * error
    # Shares of a few hundred images agree by chance: three draws that each differ by 7 of 200 images prove nothing more.
    if within is None:
        if error < LEAST_ERROR:
            return Estimate(mean, n, p=1.0)
        return Estimate(mean, n, mean - half, mean + half, "t", _p_of_zero(mean, error, n - 1))
    if error < LEAST_ERROR or not within[0] < mean < within[1]:
        return Estimate(mean, n)
    return Estimate(mean, n, *_on_logit_scale(mean, half, within), "logit t")


def _on_logit_scale(mean: float, half: float, within: Range) -> Range:
    width = within[1] - within[0]
    share = (mean - within[0]) / width
    middle, reach = math.log(share / (1 - share)), half / width / (share * (1 - share))
    low, high = (0.5 * (1 + math.tanh(place / 2)) for place in (middle - reach, middle + reach))
    return within[0] + width * low, within[0] + width * high


def _p_of_zero(mean: float, error: float, degrees: int) -> float:
    from scipy.special import stdtr

    return float(2 * stdtr(degrees, -abs(mean / error)))


def paired(a: Mapping[int, float], b: Mapping[int, float]) -> Estimate | None:
    """`a` minus `b` over the seeds that both have; None if they share none.

    Pairing takes out what both share of a seed (the same drawn images), so it sees smaller differences than two
    intervals side by side do.
    """
    return estimate([a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())])


def t_quantile(degrees: int) -> float:
    """The two-sided Student-t quantile: 4.303 for two degrees of freedom at 95 %."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, 0.5 + CONFIDENCE / 2))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjusted p-values by Holm's step-down (1979): the family is those that are there; None stays None.

    The share of families with any false "wins" among them stays below the level, whatever depends on what.
    """
    order = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, place) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        adjusted[place] = largest
    return adjusted


def verdict(gain: Estimate | None, p: float | None, *, larger_is_better: bool = True) -> str:
    """What a paired gain permits to say at the level of 5 %: a direction only if `p` is below it.

    Args:
        p: the gain's own, or corrected over a table (`holm`).
    """
    if gain is None:
        return "no pair"
    if p is None:
        return "one pair"
    if p >= LEVEL or not gain.mean:
        return "no clear difference"
    return "wins" if (gain.mean > 0) == larger_is_better else "loses"


MAX_EXACT_TASKS = 20
NUM_FLIPS = 100_000


@dataclass(frozen=True)
class Comparison:
    """A against B over tasks."""

    difference: Estimate
    """Mean over tasks of A minus B, its interval over tasks."""
    wins: int
    ties: int
    losses: int
    """Tasks on which A has the higher, the same, or the lower mean over seeds."""
    p_value: float
    """Two-sided, of the sign-flip permutation test."""
    p_holm: float | None = None
    """Corrected over the lines of a table."""

    @property
    def verdict(self) -> str:
        """A direction only where corrected permutation test and interval both support it."""
        low, high = self.difference.low, self.difference.high
        p = self.p_value if self.p_holm is None else self.p_holm
        if smallest_p(self.difference.n) >= LEVEL:
            return "too few tasks"
        if p < LEVEL and low is not None and high is not None and (low > 0 or high < 0):
            return "better" if low > 0 else "worse"
        return "no clear difference"


def compare(differences: Sequence[float]) -> Comparison | None:
    """What the differences of two sources on the same tasks say, one a task; None without a task."""
    over_tasks = estimate(differences)
    if over_tasks is None:
        return None
    return Comparison(
        over_tasks,
        sum(d > 0 for d in differences),
        sum(d == 0 for d in differences),
        sum(d < 0 for d in differences),
        sign_flip(differences),
    )


def sign_flip(differences: Sequence[float]) -> float:
    """Two-sided p-value of a mean of zero: the share of all flips of the signs whose mean is as far from zero, or farther.

    If the two sources were exchangeable, each task's difference could as well have had the other sign (Fisher 1935, section 21).
    Exact up to 20 tasks; above that 100,000 random flips from a fixed seed, the observed one counted.
    """
    import numpy as np

    values = np.asarray(differences, dtype=np.float64)
    n, observed = len(values), abs(float(np.sum(values)))
    edge = observed - 1e-12 * max(1.0, float(np.sum(np.abs(values))))  # equal sums differ in their last bits
    if n <= MAX_EXACT_TASKS:
        sums = np.zeros(1)
        for value in values:
            sums = np.concatenate([sums + value, sums - value])
        return float(np.mean(np.abs(sums) >= edge))
    signs = np.random.Generator(np.random.PCG64(0)).integers(0, 2, (NUM_FLIPS, n), dtype=np.int8) * 2 - 1
    return float((1 + np.sum(np.abs(signs @ values) >= edge)) / (1 + NUM_FLIPS))


def smallest_p(n: int) -> float:
    """The least that the exact test can give with `n` tasks: 0.0625 with five, so that five tasks never settle anything."""
    return 2.0 ** (1 - n) if n else 1.0
