"""Probes by name: from cached features to scores, for every point of a method's grid in one pass.

A probe is fitted on a support and asked for scores on other features, for one point or all of them; the solvers are in
`transfer.probes.ridge`, `knn`, `linear` and `logistic`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np

from transfer.probes.knn import fit_knn
from transfer.probes.linear import LinearHead, fit_linear, scores_of
from transfer.probes.logistic import fit_logistic
from transfer.probes.ridge import fit_ridge
from transfer.protocol.method_settings import (
    KnnSettings,
    LinearSettings,
    LogisticSettings,
    RidgeSelectedSettings,
    RidgeSettings,
)
from transfer.protocol.methods import Method

CHUNK_ELEMENTS = 1 << 26
"""Scores of several heads that are held at once: 256 MiB."""
Point = dict[str, Any]
Scorer = Callable[[np.ndarray], Iterator[np.ndarray]]
"""(N, D) features -> scores (N, C) for each point, in order, one at a time."""


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
        case LinearSettings():
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
    """Fit all `points` of a method on a support (N, D), (N,)."""
    settings = method.settings
    if isinstance(settings, RidgeSettings | RidgeSelectedSettings):
        ridge = fit_ridge(features, labels, num_classes)
        return lambda x: (ridge.scores(x, float(p["l2"])) for p in points)
    if isinstance(settings, KnnSettings):
        neighbours = fit_knn(features, labels, num_classes, device=device)
        ks = [int(p["k"]) for p in points]
        return lambda x: iter(neighbours.scores_of(x, ks, temperature=settings.temperature).values())
    if isinstance(settings, LinearSettings):
        heads = fit_linear(
            features,
            labels,
            num_classes,
            grid=[float(p["learning_rate"]) for p in points],
            num_steps=settings.num_steps,
            batch=settings.batch,
            seed=seed,
            device=device,
        )
        return lambda x: _linear_scores(heads, x)
    if isinstance(settings, LogisticSettings):
        scaled = _unit if settings.unit_features else np.asarray
        found = fit_logistic(scaled(features), labels, num_classes, c=[float(p["c"]) for p in points])
        solutions = found if isinstance(found, list) else [found]
        return lambda x: (solution.scores(scaled(x)) for solution in solutions)
    raise ValueError(f"{method.name} is no probe")


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
