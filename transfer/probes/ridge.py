"""Few-shot ridge regression on frozen features, as big_vision's `fewshot_lsr.py` does it (facts 4.2).

Whiten by the support's mean and standard deviation, append a constant 100 (a bias that the penalty hardly sees),
regress onto 2 * onehot - 1, predict the largest output. The penalty is one fixed number, 2^10, in the published
protocol. The older variant (scenic's `fewshot_utils.py`) tries a grid and takes, for each number of shots, the one
penalty that ranks best over all tasks: `rank_selected`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.errors import UserError

BIAS = 100.0
STD_FLOOR = 1e-5


@dataclass(frozen=True)
class Ridge:
    """A factorised ridge problem: weights for any penalty cost two small products.

    With X (N, D + 1) whitened and bias included and Y (N, C), the weights are (X'X + l2 I)^-1 X'Y, which is
    lhs diag(1 / (eigenvalues + l2)) rhs, from X'X where N >= D + 1 and from XX' (the smaller) otherwise. All float64.
    """

    mean: np.ndarray
    std: np.ndarray
    eigenvalues: np.ndarray
    lhs: np.ndarray
    rhs: np.ndarray

    def scores(self, features: np.ndarray, l2: float) -> np.ndarray:
        """(N, D) -> (N, C) float64."""
        weights = (self.lhs / (self.eigenvalues + l2)) @ self.rhs
        return _with_bias((features.astype(np.float64) - self.mean) / self.std) @ weights


def fit_ridge(features: np.ndarray, labels: np.ndarray, num_classes: int) -> Ridge:
    """Factorise the support.

    Args:
        features: (N, D), any float type.
        labels: (N,) integers below `num_classes`, or of several labels an image (N, C) of 1, 0 and -1 (not said).
    Raises:
        UserError: features are not finite (the backbone is broken).
    """
    x = features.astype(np.float64)
    if not np.isfinite(x).all():
        raise UserError("the features of the support are not finite; the checkpoint has diverged, take an earlier one")
    mean = x.mean(0, keepdims=True)
    std = x.std(0, keepdims=True) + STD_FLOOR
    x = _with_bias((x - mean) / std)
    if labels.ndim == 2:  # a label that is left open lies between both
        y = np.where(labels < 0, 0.0, 2.0 * labels - 1.0)
    else:
        y = np.full((len(labels), num_classes), -1.0)
        y[np.arange(len(labels)), labels] = 1.0
    num, width = x.shape
    if num >= width:
        eigenvalues, q = np.linalg.eigh(x.T @ x)
        lhs, rhs = q, q.T @ (x.T @ y)
    else:
        eigenvalues, q = np.linalg.eigh(x @ x.T)
        lhs, rhs = x.T @ q, q.T @ y
    # A Gram matrix has no negative eigenvalues; rounding makes some, and a small penalty would meet them.
    return Ridge(mean, std, np.maximum(eigenvalues, 0.0), lhs, rhs)


def rank_selected(accuracies: Mapping[str, Sequence[float]], l2s: Sequence[float]) -> float:
    """The one penalty for all tasks at one number of shots: the best mean rank over tasks (facts 4.2).

    A task ranks the penalties by accuracy, so that no task with large differences decides alone. As in the published
    procedure equals are ranked by their order in the grid, the larger penalty higher, and of equal means the smaller
    penalty wins. It reads the test splits; give accuracies on held-out images to keep them closed.

    Args:
        accuracies: for each task the accuracies along `l2s`.
    Raises:
        ValueError: no task, or a task with another number of accuracies.
    """
    table = [list(row) for row in accuracies.values()]
    if not table or any(len(row) != len(l2s) for row in table):
        raise ValueError(f"{len(l2s)} accuracies a task are needed, got {[len(row) for row in table]}")
    ranks = np.argsort(np.argsort(table, axis=1, kind="stable"), axis=1, kind="stable")
    return float(l2s[int(ranks.sum(0).argmax())])


def _with_bias(x: np.ndarray) -> np.ndarray:
    return np.concatenate([x, np.full((len(x), 1), BIAS)], axis=1)
