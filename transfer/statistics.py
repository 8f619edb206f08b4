"""Means with intervals over seeds, and paired differences. Shares in, shares out.

An interval here is a 95 % Student-t interval of the mean over seeds: it speaks of the spread that drawing other
training images and another initial head would give, and not of other test images or of another pretraining run.
"""

from __future__ import annotations

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
