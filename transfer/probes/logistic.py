"""Multinomial logistic regression on frozen features by L-BFGS, as scikit-learn and cuML (in DINOv2) fit it (facts 4.3).

    minimise  c * sum of cross-entropies + |weights|^2 / 2      the bias is free; two classes are one logistic unit

Of several labels an image each is one logistic unit, as scikit-learn's OneVsRestClassifier has them.

All float64. The published procedure tries c = 10^linspace(-6, 5, 45), chooses on a tenth of the training images that
is held out, and fits all of them again.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.errors import UserError

MAX_ITERATIONS = 1000
TOLERANCE = 1e-9
"""Of the slope; where no step lessens the loss any more it ends before."""


@dataclass(frozen=True)
class LogisticHead:
    """The solution for one c."""

    weight: np.ndarray
    """(D, C) float64."""
    bias: np.ndarray
    """(C,) float64."""
    several: bool
    """Each label by itself."""

    def scores(self, features: np.ndarray) -> np.ndarray:
        """(N, D) -> probabilities (N, C) float64."""
        logits = np.asarray(features, np.float64) @ self.weight + self.bias
        return _sigmoid(logits) if self.several else _softmax(logits)


def fit_logistic(
    features: np.ndarray, labels: np.ndarray, num_classes: int, *, cs: Sequence[float]
) -> list[LogisticHead]:
    """A head for each of `cs`, in its order; in rising order each but the first begins at its neighbour's end.

    Args:
        features: (N, D), any float type, not scaled here: the penalty sees their scale. DINOv2 gives them raw.
        labels: (N,) integers below `num_classes`; or of several labels an image (N, C) of 1, 0 and -1 (left out).
    Raises:
        UserError: features are not finite, or a c is not positive.
    """
    if not cs or not all(0 < c < float("inf") for c in cs):
        raise UserError(f"c is {cs}; a logistic regression needs positive numbers")
    x = np.asarray(features, np.float64)
    if not np.isfinite(x).all():
        raise UserError("the features are not finite; the checkpoint has diverged, take an earlier one")
    basis = None
    if len(x) < x.shape[1]:
        # The solution is a sum of features: with few images the problem is as small as they are.
        basis, r = np.linalg.qr(x.T)
        x = np.ascontiguousarray(r.T)
    point = np.zeros((x.shape[1] + 1) * num_classes)
    found: dict[float, LogisticHead] = {}
    for c in sorted(set(cs)):
        point = _solve(x, labels, num_classes, c, point)
        solution = point.reshape(-1, num_classes)
        weight = solution[:-1] if basis is None else basis @ solution[:-1]
        found[c] = LogisticHead(weight.copy(), solution[-1].copy(), several=labels.ndim == 2)
    return [found[c] for c in cs]


def _solve(x: np.ndarray, labels: np.ndarray, num_classes: int, c: float, start: np.ndarray) -> np.ndarray:
    """Where the mean objective is lowest."""
    from scipy.optimize import minimize

    num, losses = len(x), _binary if labels.ndim == 2 else _multinomial
    # Two columns that mirror each other share what one unit's weights are: half the norm, so half the c.
    penalty = 1.0 / (num * (c / 2 if labels.ndim == 1 and num_classes == 2 else c))

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = flat.reshape(-1, num_classes)
        total, slope = losses(x @ weights[:-1] + weights[-1], labels)
        loss = total / num + penalty / 2 * (weights[:-1] ** 2).sum()
        slope /= num
        gradient = np.empty_like(weights)
        gradient[:-1] = x.T @ slope + penalty * weights[:-1]
        gradient[-1] = slope.sum(0)
        return float(loss), gradient.ravel()

    options = {"maxiter": MAX_ITERATIONS, "maxfun": 20 * MAX_ITERATIONS, "gtol": TOLERANCE, "ftol": 0.0, "maxls": 50}
    found: np.ndarray = minimize(objective, start, jac=True, method="L-BFGS-B", options=options).x
    return found


def _multinomial(logits: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray]:
    """Sum of cross-entropies, and its slope by the logits."""
    rows, shifted = np.arange(len(logits)), logits - logits.max(1, keepdims=True)
    total = np.exp(shifted).sum(1)
    slope = np.exp(shifted) / total[:, None]
    slope[rows, labels] -= 1
    return float((np.log(total) - shifted[rows, labels]).sum()), slope


def _binary(logits: np.ndarray, targets: np.ndarray) -> tuple[float, np.ndarray]:
    """The same of each label by itself, over what is said."""
    said = targets >= 0
    loss = np.logaddexp(0.0, logits) - targets * logits
    return float(loss[said].sum()), (_sigmoid(logits) - targets) * said


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(logits / 2))  # without overflow at either end


def _softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)
