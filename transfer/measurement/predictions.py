"""What a final trial said of each test image, kept for metrics, error analysis, and whoever asks later.

<sweep>/predictions/<trial digest>.npz
    sample      (N,) int64      place of the image in the test split's index, rising
    label       (N,) int64
    predicted   (N,) int64
    confidence  (N,) float32    share of the predicted class: the probability, or the softmax of the scores
    top5        (N, 5) int64    the likeliest classes, first first; fewer columns where there are fewer classes
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Literal

import numpy as np

from pipeline.storage import objects
from transfer import metrics

MAX_AUROC_CLASSES = 400
"""A curve for each class is sorted; beyond this it takes longer than the trial."""


def url_of(sweep: str, digest: str) -> str:
    return objects.join(sweep, "predictions", f"{digest}.npz")


def write(
    sweep: str,
    digest: str,
    samples: np.ndarray,
    scores: np.ndarray,
    labels: np.ndarray,
    *,
    kind: Literal["scores", "probabilities"] = "scores",
) -> None:
    """Write what `scores` (N, C) say, whole or not at all."""
    order = np.argsort(samples, kind="stable")
    samples, scores, labels = samples[order], scores[order].astype(np.float64), labels[order]
    top = np.argsort(-scores, axis=1, kind="stable")[:, :5]
    shares = scores
    if kind == "scores":
        shares = np.exp(scores - scores.max(1, keepdims=True))
        shares /= shares.sum(1, keepdims=True)
    buffer = io.BytesIO()
    np.savez(
        buffer,
        sample=samples.astype(np.int64),
        label=labels.astype(np.int64),
        predicted=top[:, 0].astype(np.int64),
        confidence=np.take_along_axis(shares, top[:, :1], 1)[:, 0].astype(np.float32),
        top5=top.astype(np.int64),
    )
    objects.write_bytes(url_of(sweep, digest), buffer.getvalue())


def read(sweep: str, digest: str) -> dict[str, np.ndarray]:
    """The arrays by name. FileNotFoundError where the trial kept none."""
    with np.load(io.BytesIO(objects.read_bytes(url_of(sweep, digest)))) as file:
        return {name: file[name] for name in file.files}


def all_metrics(scores: np.ndarray, labels: np.ndarray, also: Sequence[str] = ()) -> dict[str, float]:
    """Every metric that these scores can give, by name.

    Args:
        also: metrics that must be among them; what cannot be measured raises UserError.
    """
    num_classes = scores.shape[1]
    names = ["top1", "mean_per_class", "balanced_accuracy"]
    names += ["top5"] if num_classes > 5 else []
    names += ["auroc"] if num_classes <= MAX_AUROC_CLASSES and len(np.unique(labels)) > 1 else []
    return {name: metrics.compute(name, scores, labels) for name in dict.fromkeys((*names, *also))}
