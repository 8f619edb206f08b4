"""Whether a claim holds: the difference of two lines, against the noise of their seeds.

passes    every comparison has the claimed sign, and is larger than 2 * sqrt(2) standard errors and than `least`
fails     one of them is as clear with the other sign, or too small in spite of a noise that would show `least`
unclear   anything else: what would settle it is said

A `least` below 0 is of a claim that a line is not further below another than that: it passes where the difference less its noise
is above `least`, and fails where the difference and its noise are below.

A seed that diverged has no accuracy. Of the comparisons by accuracy (`OF_MODELS`), a line whose every seed diverged is below any
line whose every seed finished, by more than any `least`: there is no model. Where both lines have numbers, those are of the seeds
that finished; a side of which more seeds diverged than of the other cannot be the better one by its survivors, which is unclear.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.errors import UserError
from transfer.lab.experiment import Comparison, Experiment
from transfer.lab.table import LabRow, Largest, Mean

FACTOR = 2.0
OF_MODELS = ("accuracy", "train_accuracy")
"""Statistics that every seed has unless it diverged."""
Word = Literal["passes", "fails", "unclear"]


@dataclass(frozen=True, kw_only=True)
class Judged:
    comparison: Comparison
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
    if comparison.statistic == "largest_rate":
        word, reason = _by_brackets(high.largest, low.largest)
        return Judged(comparison=comparison, difference=None, noise=math.nan, word=word, reason=reason)
    a, b = high.mean(comparison.statistic), low.mean(comparison.statistic)
    gains = comparison.high_over is not None and comparison.low_over is not None
    if gains:
        a = _gain(a, _find(comparison.high_over or {}, rows).mean(comparison.statistic))
        b = _gain(b, _find(comparison.low_over or {}, rows).mean(comparison.statistic))
    difference, noise, word, reason = _judge(comparison, a, b)
    if comparison.statistic in OF_MODELS and not gains:
        word, reason = _with_diverged(high, low, word, reason)
    return Judged(comparison=comparison, difference=difference, noise=noise, word=word, reason=reason)


def _judge(comparison: Comparison, a: Mean | None, b: Mean | None) -> tuple[float | None, float, Word, str]:
    if a is None or b is None:
        side = "the first" if a is None else "the second"
        return None, math.nan, "unclear", f"{side} line has no seed with a number"
    difference = a.value - b.value
    if min(a.n, b.n) < 2:
        return difference, math.nan, "unclear", "one seed has no noise to compare with; run more with --seeds"
    noise = FACTOR * math.sqrt(a.error**2 + b.error**2)
    if comparison.least < 0:
        return difference, noise, *_not_below(comparison.least, difference, noise, min(a.n, b.n))
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


def _by_brackets(a: Largest | None, b: Largest | None) -> tuple[Word, str]:
    """Of the largest stable rates: brackets that do not overlap are a result, at the seeds and length of the bisection."""
    if a is None or b is None:
        return "unclear", "no largest rates were looked for; give the experiment largest_rate"
    what = f"{a.text} against {b.text}"
    if a.stable is not None and b.unstable is not None and a.stable >= b.unstable:
        return "passes", what
    if b.stable is not None and a.unstable is not None and b.stable >= a.unstable:
        return "fails", what
    return "unclear", f"{what}: the brackets overlap, or a trial has no result; more halvings, or wider bounds"


def _gain(a: Mean | None, b: Mean | None) -> Mean | None:
    """Of one line over another; None where one of them has no number."""
    if a is None or b is None:
        return None
    return Mean(a.value - b.value, math.hypot(a.error, b.error), min(a.n, b.n))


def _not_below(least: float, difference: float, noise: float, num_seeds: int) -> tuple[Word, str]:
    """For a claim that a line is no more than `-least` below another."""
    what = f"{difference:+.3g} ± {noise:.3g}, and the claim allows {least:.3g}"
    if difference - noise > least:
        return "passes", what
    if difference + noise < least:
        return "fails", what
    seeds = math.ceil(num_seeds * (noise / max(abs(difference - least), 1e-9)) ** 2)
    return "unclear", f"{what}; about {min(seeds, 9999)} seeds would show it"


def _with_diverged(high: LabRow, low: LabRow, word: Word, reason: str) -> tuple[Word, str]:
    """What divergence makes of a verdict by accuracy (see the module)."""
    a, b = high.diverged_share, low.diverged_share
    if not (a or b):
        return word, reason
    told = f"{high.num_diverged} and {low.num_diverged} of their seeds diverged"
    if min(len(high.entries), len(low.entries)) > 1 and {a, b} == {0.0, 1.0} and not high.lacking + low.lacking:
        return (
            "passes" if b else "fails"
        ), f"every seed of the {'second' if b else 'first'} line diverged, none of the other"
    if (word == "passes" and a > b) or (word == "fails" and b > a):
        return "unclear", f"{reason}, of the seeds that finished only: {told}"
    return word, f"{reason}; {told}"


def _find(wanted: dict[str, object], rows: Sequence[LabRow]) -> LabRow:
    found = [row for row in rows if row.line.matches(wanted)]
    if len(found) != 1:
        raise UserError(f"compare names {wanted}, and {len(found)} lines of the experiment are that; name exactly one")
    return found[0]
