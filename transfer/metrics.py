"""Metrics over the scores of a whole test split: one function, `compute`, by the name that a card's `metric` gives.

Ties are shared: where the label's score equals others', the answer counts with the chance that a draw among the equals
would be right, so that a head that says the same about everything gets 1/C and not the share of class 0. Without ties
that is the argmax. Classes that the test split lacks are skipped of means over classes, and of their denominator.
Every metric is a share, larger is better.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pipeline.errors import Diverged, UserError
from transfer import box_precision

Labels = np.ndarray | Sequence[Sequence[int]]


def compute(name: str, scores: np.ndarray, labels: Labels) -> float:
    """The metric `name` of `scores` (N, C), any float type, larger for likelier classes.

        top1, top5              share of images with the label among the k largest scores
        mean_per_class          mean of the classes' own top-1 shares (Pets, Flowers, Aircraft, Caltech-101)
        balanced_accuracy       the same number under the name that medicine and scikit-learn use for it
        auroc                   two classes: the area under the ROC curve of score 1 minus score 0; more classes: the
                                unweighted mean over classes of one against the rest, by the class's own score, so
                                give probabilities where other work ranks probabilities; of several labels an image the
                                unweighted mean over labels (CheXpert)
        map11                   mean over labels of the 11-point interpolated precision (VOC2007)
        map_area                mean over labels of the area under precision that never rises with recall (VOC2010's devkit)
        miou                    pixels: mean over classes of intersection over union, over all images together
        pixel_accuracy          pixels: the share that is right
        box_map, box_map50      boxes: COCO's average precision over IoU 0.5 to 0.95, and at 0.5 (`transfer.box_precision`)
        map                     mean over labels of average precision, not interpolated (scikit-learn's)
        real                    top-1 against a set of right labels for each image (ImageNet ReaL)

    Args:
        labels: (N,) integers below C; for `real` N sequences of class indices, images with an empty one are skipped;
            of several labels an image (N, C) of 1 (shows it), 0 (does not) and -1 (skipped for this label). Of pixels scores
            are (N, C, C), how many of each class (rows) got which, and labels (N, C) how many there are; of boxes
            they are detections (`box_precision.matched`), and labels (N, C) how many boxes of each class there are.
    Raises:
        UserError: no such metric, shapes that do not fit, scores that are not a number, or nothing to measure.
    """
    if name not in METRICS:
        raise UserError(f"no metric is called {name!r}; choose one of {', '.join(METRICS)}")
    scores = np.asarray(scores)
    fits = scores.ndim == (3 if name in OF_PIXELS else 2) and box_precision.is_found(scores) == (name in OF_BOXES)
    if not fits or len(scores) != len(labels) or not len(scores) or (scores.shape[1] < 2 and name not in OF_BOXES):
        raise UserError(
            f"{name} needs scores (images, classes) and as many labels; got {scores.shape} and {len(labels)} labels"
        )
    if name not in OF_BOXES and np.isnan(scores).any():
        raise Diverged(f"{name}: {int(np.isnan(scores).any(1).sum())} images have scores that are not a number")
    return float(METRICS[name](scores, labels))


def recalls(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Top-1 share of each class, (C,) float64; not a number for a class without an image."""
    labels = _checked(scores, labels)
    num = np.bincount(labels, minlength=scores.shape[1])
    right = np.bincount(labels, weights=credit(scores, labels, 1), minlength=scores.shape[1])
    return np.divide(right, num, out=np.full(len(num), np.nan), where=num > 0)


def credit(scores: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    """Of scores (N, C) and labels (N,), (N,) float64: the chance that the label is among the k largest if lots order equals."""
    own = scores[np.arange(len(labels)), labels][:, None]
    larger, equal = (scores > own).sum(1), (scores == own).sum(1)  # `equal` counts the label itself
    return np.clip((k - larger) / equal, 0.0, 1.0)


def _top(k: int) -> Callable[[np.ndarray, Any], float]:
    return lambda scores, labels: credit(scores, _checked(scores, labels), k).mean()


def _mean_per_class(scores: np.ndarray, labels: np.ndarray) -> float:
    return float(np.nanmean(recalls(scores, labels)))


def _auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    if np.ndim(labels) == 2:
        return _over_labels("auroc", _area)(scores, labels)
    labels = _checked(scores, labels)
    if scores.shape[1] == 2:
        # Scores of float32 that differ in their last bits only would become ties.
        scores = np.diff(scores.astype(np.float64), axis=1).repeat(2, 1)
        areas = [_area(scores[:, 1], labels == 1)]
    else:
        areas = [_area(scores[:, c], labels == c) for c in range(scores.shape[1])]
    found = [a for a in areas if a is not None]
    if not found:
        raise UserError("auroc needs images of two classes at least; the split has one")
    return float(np.mean(found))


def _area(values: np.ndarray, positive: np.ndarray) -> float | None:
    """Share of pairs (positive, negative) in the right order, half of one for equals; None without a pair."""
    num = int(positive.sum())
    if num in (0, len(positive)):
        return None
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]  # equals share their mean rank
    return float((ranks[positive].sum() - num * (num + 1) / 2) / (num * (len(positive) - num)))


def _over_labels(
    name: str, of_one: Callable[[np.ndarray, np.ndarray], float | None]
) -> Callable[[np.ndarray, Any], float]:
    """Mean over labels of a measure (values, positive) of the images that say something of the label; None is left out."""

    def measure(scores: np.ndarray, labels: np.ndarray) -> float:
        labels = np.asarray(labels)
        if labels.shape != scores.shape or not np.isin(labels, (-1, 0, 1)).all():
            raise UserError(f"{name} needs labels of 1, 0 and -1 in the shape of the scores {scores.shape}")
        said = labels >= 0
        found = [of_one(scores[said[:, c], c], labels[said[:, c], c] == 1) for c in range(scores.shape[1])]
        present = [value for value in found if value is not None]
        if not present:
            raise UserError(f"{name} needs images with and without one of the labels; the split has none")
        return float(np.mean(present))

    return measure


def _over_curves(name: str, of_curve: Callable[[np.ndarray, np.ndarray], float]) -> Callable[[np.ndarray, Any], float]:
    """Mean over labels of a measure of the curve (recall, precision); a label that no image shows has none."""
    return _over_labels(name, lambda values, positive: of_curve(*_curve(values, positive)) if positive.any() else None)


def _curve(values: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(recall, precision), rising in recall; images with equal scores enter together, since nothing orders them."""
    order = np.argsort(-values, kind="stable")
    last = np.append(np.diff(values[order]) != 0, True)  # the end of each run of equals
    right, seen = np.cumsum(positive[order])[last], np.arange(1, len(values) + 1)[last]
    return right / positive.sum(), right / seen


def _precision11(recall: np.ndarray, precision: np.ndarray) -> float:
    """Mean over the recalls 0, 0.1, ..., 1 of the best precision at that recall or a higher one (VOC2007 devkit)."""
    # Recalls such as 3/10 are compared with tenths: rounding must not lose the point.
    return float(np.mean([precision[recall >= tenth / 10 - 1e-12].max() for tenth in range(11)]))


def _precision_area(recall: np.ndarray, precision: np.ndarray) -> float:
    """Area under the best precision at each recall or a higher one (VOC2010 devkit)."""
    return _average_precision(recall, np.maximum.accumulate(precision[::-1])[::-1])


def _average_precision(recall: np.ndarray, precision: np.ndarray) -> float:
    """Sum over the list of precision times the gain in recall, as it is."""
    return float(np.diff(recall, prepend=0.0) @ precision)


def _miou(scores: np.ndarray, _: np.ndarray) -> float:
    counts = scores.sum(0)
    right = counts.diagonal()
    union = counts.sum(0) + counts.sum(1) - right
    return float((right[union > 0] / union[union > 0]).mean())


def _pixel_accuracy(scores: np.ndarray, _: np.ndarray) -> float:
    return float(scores.diagonal(axis1=1, axis2=2).sum() / scores.sum())


def _real(scores: np.ndarray, labels: Sequence[Sequence[int]]) -> float:
    top = scores == scores.max(1, keepdims=True)
    credits = []
    for row, right in zip(top, labels, strict=True):
        if len(right):
            if min(right) < 0 or max(right) >= scores.shape[1]:
                raise UserError(f"real: the labels {list(right)} are not all among the {scores.shape[1]} classes")
            credits.append(row[list(set(right))].sum() / row.sum())
    if not credits:
        raise UserError("real needs an image with a label at least; all sets are empty")
    return float(np.mean(credits))


def _checked(scores: np.ndarray, labels: Labels) -> np.ndarray:
    found = np.asarray(labels)
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise UserError(f"one class index an image is needed, not labels of shape {found.shape} and {found.dtype}")
    if found.min() < 0 or found.max() >= scores.shape[1]:
        raise UserError(f"labels run from {found.min()} to {found.max()}, the scores have {scores.shape[1]} classes")
    return found


def _boxes(ious: slice) -> Callable[[np.ndarray, Any], float]:
    return lambda found, num_boxes: box_precision.precision(found, np.asarray(num_boxes), ious)


AT_IOUS = {"box_map": slice(None), "box_map50": slice(1)}
"""Of `box_precision.IOUS`."""
OF_BOXES = tuple(AT_IOUS)
OF_PIXELS = ("miou", "pixel_accuracy")
OF_SEVERAL_LABELS = ("map11", "map_area", "map", "auroc")
METRICS: dict[str, Callable[[np.ndarray, Any], float]] = {
    "top1": _top(1),
    "top5": _top(5),
    "mean_per_class": _mean_per_class,
    "balanced_accuracy": _mean_per_class,
    "auroc": _auroc,
    "map11": _over_curves("map11", _precision11),
    "map_area": _over_curves("map_area", _precision_area),
    "map": _over_curves("map", _average_precision),
    "real": _real,
    "miou": _miou,
    "pixel_accuracy": _pixel_accuracy,
    **{name: _boxes(ious) for name, ious in AT_IOUS.items()},
}
