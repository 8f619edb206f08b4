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

GRID = tuple(float(c) for c in 10.0 ** np.linspace(-6, 5, 45))
MAX_ITERATIONS = 1000
TOLERANCE = 1e-9
CONVERGED = 1e-6
"""A larger slope is no optimum; between the two lies what roundings allow."""


@dataclass(frozen=True)
class LogisticHead:
    """The solution for one c."""

    c: float
    weight: np.ndarray
    """(D, C) float64."""
    bias: np.ndarray
    """(C,) float64."""
    num_iterations: int
    slope: float
    """Largest element of the gradient of the mean objective at the end."""
    converged: bool
    """False where the iterations ended first, with a slope above 1e-6."""
    several: bool = False
    """Each label by itself."""

    def scores(self, features: np.ndarray) -> np.ndarray:
        """(N, D) -> probabilities (N, C) float64."""
        logits = np.asarray(features, np.float64) @ self.weight + self.bias
        return _sigmoid(logits) if self.several else _softmax(logits)


def fit_logistic(
    features: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    *,
    c: float | Sequence[float],
    max_iterations: int = MAX_ITERATIONS,
    tolerance: float = TOLERANCE,
) -> LogisticHead | list[LogisticHead]:
    """The head for `c`, or the heads for a list of them in its order; each but the first begins at its neighbour's end.

    Args:
        features: (N, D), any float type, not scaled here: the penalty sees their scale. DINOv2 gives them raw.
        labels: (N,) integers below `num_classes`; or of several labels an image (N, C) of 1, 0 and -1 (left out).
        tolerance: stop at this slope; where no step lessens the loss any more it ends before.
    Raises:
        UserError: features are not finite, or c is not positive.
    """
    wanted = [float(v) for v in c] if isinstance(c, Sequence) else [float(c)]
    if not wanted or not all(0 < v < float("inf") for v in wanted):
        raise UserError(f"c is {c}; a logistic regression needs positive numbers")
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
    for value in sorted(set(wanted)):
        point, num_iterations, slope = _solve(x, labels, num_classes, value, point, max_iterations, tolerance)
        solution = point.reshape(-1, num_classes)
        weight = solution[:-1] if basis is None else basis @ solution[:-1]
        found[value] = LogisticHead(
            value,
            weight.copy(),
            solution[-1].copy(),
            num_iterations,
            slope,
            slope <= CONVERGED,
            several=labels.ndim == 2,
        )
    heads = [found[value] for value in wanted]
    return heads if isinstance(c, Sequence) else heads[0]


def _solve(
    x: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    c: float,
    start: np.ndarray,
    max_iterations: int,
    tolerance: float,
) -> tuple[np.ndarray, int, float]:
    """(point, iterations, largest slope) of the mean objective."""
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

    options = {"maxiter": max_iterations, "maxfun": 20 * max_iterations, "gtol": tolerance, "ftol": 0.0, "maxls": 50}
    result = minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
    return result.x, int(result.nit), float(np.abs(objective(result.x)[1]).max())


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
