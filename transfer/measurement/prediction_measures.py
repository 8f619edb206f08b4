"""What kept predictions say besides the metric: whether confidence is accuracy, what the surest answers are worth, and how
far off wrong answers lie where classes are ordered.

    ece15            expected calibration error, 15 bins of equal width, each without its lower edge (Guo et al. 2017,
                     arXiv 1706.04599)
    accuracy_at_80   selective accuracy: top-1 of the 80 % of images with the highest confidence (Geifman and El-Yaniv 2017,
                     arXiv 1705.08500); images that are equally sure share the places that are left
    kappa2           Cohen's kappa with quadratic weights (Cohen 1968), of ordered classes
    mae              mean absolute error in places of the order of classes
"""

from collections.abc import Mapping

import numpy as np

NUM_BINS, COVERAGE = 15, 0.8
CALIBRATION, ORDINAL = ("ece15", "accuracy_at_80"), ("kappa2", "mae")
WITHOUT_PROBABILITIES = ("ridge",)
"""Kinds of methods whose scores were never meant as probabilities: their softmax sorts images, and has no calibration."""


def prediction_measures(found: Mapping[str, np.ndarray], *, method_kind: str, ordered: bool) -> dict[str, float]:
    """The measures that these predictions (`transfer.measurement.predictions.read`) can give, by name.

    Args:
        method_kind: of `transfer.protocol.methods.METHOD_KINDS`.
        ordered: whether the classes are, in the order of their indices.
    """
    right = found["credit"] if "credit" in found else (found["predicted"] == found["label"]).astype(np.float64)
    confidence = found["confidence"].astype(np.float64)
    measures = {} if method_kind in WITHOUT_PROBABILITIES else {"ece15": calibration_error(confidence, right)}
    measures["accuracy_at_80"] = selective_accuracy(confidence, right)
    if ordered:
        label, predicted = found["label"].astype(np.float64), found["predicted"].astype(np.float64)
        measures["mae"] = float(np.abs(predicted - label).mean())
        # By lot: the mean over all pairs of a prediction and a label.
        expected = predicted.var() + label.var() + (predicted.mean() - label.mean()) ** 2
        if expected > 0:  # else one class is all that is shown and said, and kappa is not defined
            measures["kappa2"] = float(1 - ((predicted - label) ** 2).mean() / expected)
    return measures


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Mean over images of |accuracy - confidence| of their bin. (N,) float64 each, 0 to 1."""
    edges = np.linspace(0, 1, NUM_BINS + 1)[1:-1]
    bins = np.digitize(confidence, edges, right=True)
    return float(np.abs(np.bincount(bins, weights=right - confidence)).sum() / len(right))


def selective_accuracy(confidence: np.ndarray, right: np.ndarray) -> float:
    """Mean of `right` over the share COVERAGE of images (rounded up) with the highest confidence. (N,) float64 each."""
    num = int(np.ceil(COVERAGE * len(right) - 1e-9))
    least = np.sort(confidence)[-num]
    surer, equal = confidence > least, confidence == least
    return float((right[surer].sum() + right[equal].mean() * (num - surer.sum())) / num)
