"""Do the first losses after a resume belong to the run that was saved? Held against the window before its checkpoint; pure.

    window    one number of each of the last WINDOW updates before the checkpoint
    after     the same of the first FIRST updates after the resume

A line through the window by the median of the slopes of all its pairs (Theil 1950, Sen 1968), and the median absolute deviation
(MAD) from it, times 1.4826 (a standard deviation, for normal noise): up to 29 % of wild values move neither by much. What comes
after may go on along the line or stand at its end, and anything between is no deviation. The score is the distance of the
median of `after` from that span, in such standard deviations; above LIMIT it is a deviation.

For independent normal noise around a line that goes on, the score's own standard deviation is about 0.5, so that chance alone
exceeds LIMIT less than once in 10^10 resumes. Real losses are neither: docs/LOG.md has what was measured on runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WINDOW, FIRST = 50, 10
LIMIT = 4.0
TO_DEVIATION = 1.4826
FLOOR = 0.002
"""Noise is taken for at least this share of the level: losses that hardly vary make nothing out of nothing."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Of what came after a resume with the window before."""

    expected: float
    """The nearest value to `found` that the window allows for."""
    found: float
    """Median of what came after."""
    noise: float
    """Standard deviation of one number, robust."""

    @property
    def score(self) -> float:
        return abs(self.found - self.expected) / self.noise

    @property
    def deviates(self) -> bool:
        return not self.score <= LIMIT  # what is no number does


def compare(window: Sequence[float], after: Sequence[float]) -> Comparison | None:
    """None where the window is not full yet: losses of a run's first steps stand still and then fall, on no line."""
    if len(window) < WINDOW or len(after) == 0:
        return None
    values = np.asarray(window, dtype=np.float64)
    x = np.arange(len(values), dtype=np.float64)
    first, second = np.triu_indices(len(values), 1)
    slope = float(np.median((values[second] - values[first]) / (x[second] - x[first])))
    rest = values - slope * x
    level = float(np.median(rest))
    noise = TO_DEVIATION * float(np.median(np.abs(rest - level)))
    stands = level + slope * x[-1]
    goes_on = stands + slope * (len(after) + 1) / 2
    found = float(np.median(np.asarray(after, dtype=np.float64)))
    expected = min(max(found, min(stands, goes_on)), max(stands, goes_on))
    return Comparison(expected=expected, found=found, noise=max(noise, FLOOR * abs(stands), 1e-12))
