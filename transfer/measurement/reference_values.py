"""What a number of a test split is to be read against: what guessing gives, and how far other test images would move it."""

import math
from collections.abc import Callable
from typing import Literal, TypedDict

import numpy as np

from transfer import metrics
from transfer.metric_facts import CONFIDENCE, facts_of

NUM_RESAMPLES, SEED = 1000, 20_261_129
MAX_WORK = 2e9
"""Scores that the resamples of a bootstrap may hold in all: large tests of many classes get fewer of them, 100 at least."""


class Interval(TypedDict):
    """95 %, of the test images."""

    low: float
    high: float
    rule: Literal["wilson", "bootstrap"]


def baselines(metric: str, scores: np.ndarray, labels: metrics.Labels, train_labels: np.ndarray) -> dict[str, float]:
    """What the metric gives to answers that never look at an image.

        chance     the same score for every class
        majority   always the most frequent class of the training images, the first of equals

    Args:
        scores: (N, C), for their shape alone.
        train_labels: (M,) of the images that were fitted.
    """
    constant = np.zeros(scores.shape)
    often = constant.copy()
    often[:, int(np.bincount(train_labels, minlength=scores.shape[1]).argmax())] = 1.0
    return {name: metrics.compute(metric, s, labels) for name, s in (("chance", constant), ("majority", often))}


def image_interval(metric: str, scores: np.ndarray, labels: np.ndarray) -> Interval:
    """95 % interval of a metric over test images: Wilson's for a share of them, else percentiles of a bootstrap of images.

    Args:
        scores: (N, C).
        labels: (N,) integers.
    """
    value = metrics.compute(metric, scores, labels)
    if facts_of(metric).counts_images:
        low, high = wilson(value, len(labels))
        return {"low": low, "high": high, "rule": "wilson"}
    low, high = bootstrap(lambda chosen: metrics.compute(metric, scores[chosen], labels[chosen]), labels, scores.size)
    return {"low": low, "high": high, "rule": "bootstrap"}


def wilson(share: float, num: int) -> tuple[float, float]:
    """Wilson's score interval (1927) of a share of `num` images."""
    from scipy.special import ndtri

    z2 = float(ndtri(0.5 + CONFIDENCE / 2)) ** 2
    middle = (share + z2 / (2 * num)) / (1 + z2 / num)
    reach = math.sqrt(z2) / (1 + z2 / num) * math.sqrt(share * (1 - share) / num + z2 / (4 * num * num))
    return max(0.0, middle - reach), min(1.0, middle + reach)


def bootstrap(measure: Callable[[np.ndarray], float], labels: np.ndarray, work: int) -> tuple[float, float]:
    """Percentiles of a metric over resamples with replacement, drawn within each class so that none loses its images.

    Args:
        measure: the metric of images at these places (N,).
        work: scores in one resample.
    """
    draw = np.random.Generator(np.random.PCG64(SEED))
    num = int(max(100, min(NUM_RESAMPLES, MAX_WORK / max(1, work))))
    groups = [np.flatnonzero(labels == c) for c in np.unique(labels)]
    values = [measure(np.concatenate([draw.choice(g, len(g)) for g in groups])) for _ in range(num)]
    low, high = np.quantile(values, [0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2])
    return float(low), float(high)
