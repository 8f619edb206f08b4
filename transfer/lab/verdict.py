"""Whether a claim holds: the difference of two lines, against the noise of their seeds.

passes    every comparison has the claimed sign, and is larger than 2 * sqrt(2) standard errors and than `least`
fails     one of them is as clear with the other sign, or too small in spite of a noise that would show `least`
unclear   anything else: what would settle it is said
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.errors import UserError
from transfer.lab.experiment import Comparison, Experiment
from transfer.lab.table import LabRow, Mean

FACTOR = 2.0
Word = Literal["passes", "fails", "unclear"]


@dataclass(frozen=True, kw_only=True)
class Judged:
    comparison: Comparison
    high: LabRow
    low: LabRow
    difference: float | None
    """None: a side has no number."""
    noise: float
    """What a difference must exceed: two standard errors of it; nan where a side has one seed."""
    word: Word
    reason: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    word: Word
    judged: list[Judged]


def verdict(experiment: Experiment, rows: Sequence[LabRow]) -> Verdict | None:
    """None where the experiment claims nothing."""
    if not experiment.compare:
        return None
    judged = [judge(comparison, rows) for comparison in experiment.compare]
    words = {j.word for j in judged}
    return Verdict(word="fails" if "fails" in words else "unclear" if "unclear" in words else "passes", judged=judged)


def judge(comparison: Comparison, rows: Sequence[LabRow]) -> Judged:
    high, low = _find(comparison.high, rows), _find(comparison.low, rows)
    a, b = high.mean(comparison.statistic), low.mean(comparison.statistic)
    difference, noise, word, reason = _judge(comparison, a, b)
    return Judged(
        comparison=comparison, high=high, low=low, difference=difference, noise=noise, word=word, reason=reason
    )


def _judge(comparison: Comparison, a: Mean | None, b: Mean | None) -> tuple[float | None, float, Word, str]:
    if a is None or b is None:
        side = "the first" if a is None else "the second"
        return None, math.nan, "unclear", f"{side} line has no seed with a number"
    difference = a.value - b.value
    if min(a.n, b.n) < 2:
        return difference, math.nan, "unclear", "one seed has no noise to compare with; run more with --seeds"
    noise = FACTOR * math.sqrt(a.error**2 + b.error**2)
    wanted = max(noise, comparison.least)
    if difference > wanted:
        return difference, noise, "passes", f"{difference:+.3g} is above {wanted:.3g}"
    if difference < -noise or (comparison.least and difference + noise < comparison.least):
        return difference, noise, "fails", f"{difference:+.3g}, and the claim wants more than {comparison.least:.3g}"
    seeds = math.ceil(min(a.n, b.n) * (noise / max(abs(difference), 1e-9)) ** 2)
    return (
        difference,
        noise,
        "unclear",
        f"{difference:+.3g} within {wanted:.3g}; about {min(seeds, 9999)} seeds would show it",
    )


def _find(wanted: dict[str, object], rows: Sequence[LabRow]) -> LabRow:
    found = [row for row in rows if row.line.matches(wanted)]
    if len(found) != 1:
        raise UserError(f"compare names {wanted}, and {len(found)} lines of the experiment are that; name exactly one")
    return found[0]
