"""Cells of probes computed again by NumPy and scikit-learn in float64, from features and the listed images alone.

Nothing of the probes' own code is used; what a cell was fitted on comes in as arrays.
"""

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, cohen_kappa_score, mean_absolute_error, roc_auc_score


def ridge(x: np.ndarray, y: np.ndarray, test: np.ndarray, num_classes: int, l2: float) -> np.ndarray:
    """big_vision's few-shot regression by its normal equations: scores (M, C)."""
    mean, std = x.mean(0), x.std(0) + 1e-5

    def design(z: np.ndarray) -> np.ndarray:
        return np.concatenate([(z - mean) / std, np.full((len(z), 1), 100.0)], 1)

    a, targets = design(x), 2 * np.eye(num_classes)[y] - 1
    return design(test) @ np.linalg.solve(a.T @ a + l2 * np.eye(a.shape[1]), a.T @ targets)


def neighbours(
    x: np.ndarray, y: np.ndarray, test: np.ndarray, num_classes: int, k: int, temperature: float = 0.07
) -> np.ndarray:
    """DINOv2's weighted votes, an image at a time."""
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    votes = np.zeros((len(test), num_classes))
    for row, image in enumerate(test):
        similarity = unit @ (image / np.linalg.norm(image))
        nearest = np.argsort(-similarity, kind="stable")[:k]
        for place in nearest:
            votes[row, y[place]] += np.exp(similarity[place] / temperature - 1 / temperature)
    return votes / votes.sum(1, keepdims=True)


def logistic(x: np.ndarray, y: np.ndarray, test: np.ndarray, c: float) -> np.ndarray:
    """DINOv2's logistic regression: features as they are."""
    return LogisticRegression(C=c, solver="newton-cg", tol=1e-9, max_iter=5000).fit(x, y).predict_proba(test)


def top1(scores: np.ndarray, labels: np.ndarray) -> float:
    return float((scores.argmax(1) == labels).mean())


def balanced(scores: np.ndarray, labels: np.ndarray) -> float:
    return float(balanced_accuracy_score(labels, scores.argmax(1)))


def auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Unweighted mean over classes of one against the rest."""
    return float(np.mean([roc_auc_score(labels == c, scores[:, c]) for c in range(scores.shape[1])]))


def shares(scores: np.ndarray) -> np.ndarray:
    """Softmax of (M, C)."""
    powers = np.exp(scores - scores.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Guo et al. (2017), equation 3: a bin at a time."""
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    total = 0.0
    for m in range(bins):
        inside = (confidence > m / bins) & (confidence <= (m + 1) / bins)
        if inside.any():
            total += inside.sum() / len(labels) * abs(right[inside].mean() - confidence[inside].mean())
    return total


def selective(probabilities: np.ndarray, labels: np.ndarray, coverage: float = 0.8) -> float:
    order = np.argsort(-probabilities.max(1))[: int(np.ceil(coverage * len(labels)))]
    return float((probabilities[order].argmax(1) == labels[order]).mean())


def quadratic_kappa(scores: np.ndarray, labels: np.ndarray) -> float:
    return float(cohen_kappa_score(labels, scores.argmax(1), weights="quadratic"))


def absolute_error(scores: np.ndarray, labels: np.ndarray) -> float:
    return float(mean_absolute_error(labels, scores.argmax(1)))
