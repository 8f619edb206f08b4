"""Means with intervals over seeds, and paired differences. Shares in, shares out.

An interval here is a 95 % Student-t interval of the mean over seeds: it speaks of the spread that drawing other
training images and another initial head would give, and not of other test images or of another pretraining run.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` seeds with its interval."""

    mean: float
    n: int
    half_width: float | None
    """None with one seed: a single value has a spread, but does not show it."""

    @property
    def low(self) -> float | None:
        return None if self.half_width is None else self.mean - self.half_width

    @property
    def high(self) -> float | None:
        return None if self.half_width is None else self.mean + self.half_width


def estimate(values: Sequence[float], confidence: float = CONFIDENCE) -> Estimate | None:
    """The mean of `values` and its Student-t interval; None without values. ValueError if one is not finite."""
    n = len(values)
    if n == 0:
        return None
    if not all(map(math.isfinite, values)):
        raise ValueError(f"an interval over values that are not finite: {list(values)}; leave failed trials out")
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(mean, 1, None)
    variance = math.fsum((v - mean) ** 2 for v in values) / (n - 1)
    return Estimate(mean, n, t_quantile(n - 1, confidence) * math.sqrt(variance / n))


def paired(a: Mapping[int, float], b: Mapping[int, float], confidence: float = CONFIDENCE) -> Estimate | None:
    """`a` minus `b` over the seeds that both have; None if they share none.

    Pairing takes out what both share of a seed (the same drawn images), so it sees smaller differences than two
    intervals side by side do.
    """
    return estimate([a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())], confidence)


def t_quantile(degrees: int, confidence: float = CONFIDENCE) -> float:
    """The two-sided Student-t quantile: 4.303 for two degrees of freedom at 95 %."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, 0.5 + confidence / 2))


def verdict(gain: Estimate | None) -> str:
    """What a paired gain permits to say: a direction only if its interval leaves zero out."""
    if gain is None:
        return "no pair"
    if gain.low is None or gain.high is None:
        return "one seed"
    if gain.low > 0:
        return "wins"
    return "loses" if gain.high < 0 else "no clear difference"


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

    @property
    def verdict(self) -> str:
        """A direction only where permutation test and interval both support it."""
        low, high = self.difference.low, self.difference.high
        if smallest_p(self.difference.n) >= 1 - CONFIDENCE:
            return "too few tasks"
        if self.p_value < 1 - CONFIDENCE and low is not None and high is not None and (low > 0 or high < 0):
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
