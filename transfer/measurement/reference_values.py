"""What a number of a test split is to be read against: what guessing gives, and how far other test images would move it."""

import math
from collections.abc import Callable
from typing import Literal, TypedDict

import numpy as np

from pipeline.data.format.masks import VOID
from transfer import box_precision, metrics
from transfer.metric_facts import CONFIDENCE, facts_of

NUM_RESAMPLES, NUM_ORDERS, SEED = 1000, 20, 20_261_129
MAX_WORK = 2e9
"""Scores that the resamples of a bootstrap may hold in all: large tests of many classes get fewer of them, 100 at least."""


class Interval(TypedDict):
    """95 %, of the test images."""

    low: float
    high: float
    rule: Literal["wilson", "bootstrap"]


def baselines(
    metric: str, scores: np.ndarray, labels: metrics.Labels, train_labels: np.ndarray, truth: np.ndarray | None = None
) -> dict[str, float]:
    """What the metric gives to answers that never look at an image.

        chance     the same score for every class
        majority   always the most frequent class of the training images, the first of equals

    of pixels the same (every class equally often, and the most frequent one), and of several labels an image

        chance     the mean over orders of the images that are drawn at random
        prevalence the same scores for every image: the share of the images that show a label, where all are in one place

    of boxes `chance` is what the boxes of training images reach that are drawn at random (`box_precision.guessed`).

    Args:
        scores: (N, C), for their shape alone; of pixels (N, C, C).
        train_labels: (M,) of the images that were fitted, or (M, C), or (M,) masks or boxes.
        truth: (N,) boxes of the test images.
    """
    if truth is not None and metric in metrics.OF_BOXES:
        ious, num = metrics.AT_IOUS[metric], np.asarray(labels).shape[1]
        return {"chance": box_precision.guessed(ious, list(train_labels), list(truth), num)}
    if scores.ndim == 3:
        return _of_pixels(metric, np.asarray(labels), train_labels)
    if train_labels.ndim == 2:
        draw = np.random.Generator(np.random.PCG64(SEED))
        drawn = [metrics.compute(metric, draw.random(scores.shape), labels) for _ in range(NUM_ORDERS)]
        return {"chance": float(np.mean(drawn)), "prevalence": metrics.compute(metric, np.zeros(scores.shape), labels)}
    constant = np.zeros(scores.shape)
    often = constant.copy()
    often[:, int(np.bincount(train_labels, minlength=scores.shape[1]).argmax())] = 1.0
    return {name: metrics.compute(metric, s, labels) for name, s in (("chance", constant), ("majority", often))}


def _of_pixels(metric: str, pixels: np.ndarray, masks: np.ndarray) -> dict[str, float]:
    """Args: pixels: (N, C) of each class; masks: (M,) that were fitted."""
    num = pixels.shape[1]
    seen = np.bincount(np.concatenate([mask.ravel() for mask in masks]), minlength=VOID + 1)[:num]
    often = np.zeros((*pixels.shape, num))
    often[:, :, int(seen.argmax())] = pixels
    counts = {"chance": np.repeat(pixels[:, :, None] / num, num, axis=2), "majority": often}
    return {name: metrics.compute(metric, found, pixels) for name, found in counts.items()}


def image_interval(metric: str, scores: np.ndarray, labels: np.ndarray) -> Interval:
    """95 % interval of a metric over test images: Wilson's for a share of them, else percentiles of a bootstrap of images.

    Args:
        scores: (N, C).
        labels: (N,) integers, or of several labels an image (N, C): images are then drawn from all of them.
    """
    value = metrics.compute(metric, scores, labels)
    if facts_of(metric).counts_images:
        low, high = wilson(value, len(labels))
        return {"low": low, "high": high, "rule": "wilson"}
    strata = labels if labels.ndim == 1 else np.zeros(len(labels), np.int64)
    low, high = bootstrap(lambda chosen: metrics.compute(metric, scores[chosen], labels[chosen]), strata, scores.size)
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
