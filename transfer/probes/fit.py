"""Probes by name: from cached features to scores, for every point of a method's grid in one pass.

A probe is fitted on a support and asked for scores on other features, for one point or all of them; the solvers are in
`transfer.probes.ridge`, `knn`, `linear` and `logistic`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np

from pipeline.data.format.boxes import Boxes
from transfer import box_precision
from transfer.probes.detect import fit_detect
from transfer.probes.knn import fit_knn
from transfer.probes.linear import LinearHead, fit_linear, scores_of
from transfer.probes.logistic import fit_logistic
from transfer.probes.ridge import fit_ridge
from transfer.probes.segment import confusion, fit_segment, pixel_counts
from transfer.protocol.method_settings import (
    DetectSettings,
    KnnSettings,
    LinearSettings,
    LogisticSettings,
    RidgeSelectedSettings,
    RidgeSettings,
    SegmentSettings,
)
from transfer.protocol.methods import Method

CHUNK_ELEMENTS = 1 << 26
"""Scores of several heads that are held at once: 256 MiB."""
Point = dict[str, Any]
Scorer = Callable[[np.ndarray], Iterator[np.ndarray]]
"""(N, D) features -> scores (N, C), or what `measured` takes, for each point, in order, one at a time."""


def grid(method: Method, num_support: int, shots: int = 0) -> list[Point]:
    """The points of a probe; one where there is nothing to select.

    Args:
        num_support: images that it is fitted on: k cannot be larger.
        shots: images of each class; then k is at most that, and that itself is tried too (dinov2/eval/knn.py).
    """
    settings = method.settings
    match settings:
        case RidgeSettings():
            return [{"l2": settings.l2}]
        case RidgeSelectedSettings():
            return [{"l2": l2} for l2 in settings.l2s]
        case KnnSettings():
            ks = sorted({*settings.ks, shots}) if shots > 0 else settings.ks
            most = shots if shots > 0 else num_support
            return [{"k": k} for k in ks if k <= most] or [{"k": num_support}]
        case LinearSettings() | SegmentSettings() | DetectSettings():
            return [{"learning_rate": rate} for rate in settings.learning_rates]
        case LogisticSettings():
            return [{"c": c} for c in settings.cs]
    raise ValueError(f"{method.name} is no probe")


def scores_are(method: Method) -> Literal["scores", "probabilities"]:
    return "probabilities" if method.kind in ("knn", "logistic") else "scores"


def fit(
    method: Method,
    points: Sequence[Point],
    features: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    *,
    seed: int,
    device: str = "cpu",
) -> Scorer:
    """Fit all `points` of a method on a support: features (N, D), of segmentation maps (N, h, w, D), of detection maps at several
    resolutions, and their truth (`transfer.protocol.truth`)."""
    settings = method.settings
    if isinstance(settings, RidgeSettings | RidgeSelectedSettings):
        ridge = fit_ridge(features, labels, num_classes)
        return lambda x: (ridge.scores(x, float(p["l2"])) for p in points)
    if isinstance(settings, KnnSettings):
        neighbours = fit_knn(features, labels, num_classes, device=device)
        ks = [int(p["k"]) for p in points]
        return lambda x: iter(neighbours.scores_of(x, ks, temperature=settings.temperature).values())
    if isinstance(settings, LinearSettings | SegmentSettings | DetectSettings):
        rates = [float(p["learning_rate"]) for p in points]
        how: dict[str, Any] = {"seed": seed, "device": device}
        if isinstance(settings, LinearSettings):
            num_steps, batch = settings.num_steps, settings.batch
            heads = fit_linear(features, labels, num_classes, grid=rates, num_steps=num_steps, batch=batch, **how)
            return lambda x: _linear_scores(heads, x)
        if isinstance(settings, SegmentSettings):
            segmented = fit_segment(features, labels, num_classes, settings=settings, rates=rates, **how)
            return lambda x: (head.scores(x) for head in segmented)
        found_by = fit_detect(features, labels, num_classes, settings=settings, rates=rates, **how)  # type: ignore[arg-type]
        return lambda x: (head.detections(x) for head in found_by)
    if isinstance(settings, LogisticSettings):
        scaled = _unit if settings.unit_features else np.asarray
        solutions = fit_logistic(scaled(features), labels, num_classes, cs=[float(p["c"]) for p in points])
        return lambda x: (solution.scores(scaled(x)) for solution in solutions)
    raise ValueError(f"{method.name} is no probe")


def measured(said: np.ndarray, truth: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """What metrics and records take of what a probe says: of masks (confusion, pixels of each class), of boxes (detections with
    whether they are right, boxes of each class), else what came in."""
    if truth.dtype != object:
        return said, truth
    if isinstance(truth[0], Boxes):
        return box_precision.matched(said, truth), np.stack([boxes.counts(num_classes) for boxes in truth])  # type: ignore[arg-type]
    return confusion(said, truth), pixel_counts(truth, num_classes)


def _linear_scores(heads: Sequence[LinearHead], x: np.ndarray) -> Iterator[np.ndarray]:
    """As many heads in one product as memory allows: reading the features is what takes the time."""
    num = max(1, CHUNK_ELEMENTS // (len(x) * len(heads[0].bias)))
    for begin in range(0, len(heads), num):
        yield from map(_finite, scores_of(heads[begin : begin + num], x))


def _finite(scores: np.ndarray) -> np.ndarray:
    """A head whose rate was too large says nothing: the same score for every class."""
    return scores if np.isfinite(scores).all() else np.zeros_like(scores)


def _unit(features: np.ndarray) -> np.ndarray:
    """Rows of length 1."""
    x = features.astype(np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
