"""Cells of probes computed again by NumPy and scikit-learn in float64, from features and the listed images alone.

Nothing of the probes' own code is used; what a cell was fitted on comes in as arrays.
"""

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    cohen_kappa_score,
    jaccard_score,
    mean_absolute_error,
    roc_auc_score,
)


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


# --- several labels an image: truth (N, L) of 1 shown, 0 not shown, -1 not said ---------------------------------------


def ridge_of_labels(x: np.ndarray, truth: np.ndarray, test: np.ndarray, l2: float) -> np.ndarray:
    """The same regression onto 1, -1, and 0 where nothing is said, solved as one least-squares problem with extra rows."""
    mean, std = x.mean(0), x.std(0) + 1e-5
    a, b = (np.column_stack([(z - mean) / std, np.full(len(z), 100.0)]) for z in (x, test))
    aims = np.select([truth == 1, truth == 0], [1.0, -1.0], 0.0)
    rows = np.vstack([a, np.sqrt(l2) * np.eye(a.shape[1])])
    return b @ np.linalg.lstsq(rows, np.vstack([aims, np.zeros((a.shape[1], aims.shape[1]))]), rcond=None)[0]


def logistic_of_labels(x: np.ndarray, truth: np.ndarray, test: np.ndarray, c: float) -> np.ndarray:
    """One logistic regression a label, of the images that say something of it."""
    columns = []
    for label in range(truth.shape[1]):
        said = truth[:, label] >= 0
        head = LogisticRegression(C=c, solver="newton-cg", tol=1e-9, max_iter=5000).fit(x[said], truth[said, label])
        columns.append(head.predict_proba(test)[:, 1])
    return np.stack(columns, 1)


def neighbours_of_labels(
    x: np.ndarray, truth: np.ndarray, test: np.ndarray, k: int, temperature: float = 0.07
) -> np.ndarray:
    """Weighted votes for each label, of the neighbours that say something of it; 0.5 where none does."""
    unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    found = np.full((len(test), truth.shape[1]), 0.5)
    for row, image in enumerate(test):
        similarity = unit @ (image / np.linalg.norm(image))
        nearest = np.argsort(-similarity, kind="stable")[:k]
        weights = np.exp((similarity[nearest] - 1) / temperature)
        for label in range(truth.shape[1]):
            said = truth[nearest, label] >= 0
            if said.any():
                found[row, label] = weights[said] @ (truth[nearest, label][said] == 1) / weights[said].sum()
    return found


def _each_label(scores: np.ndarray, truth: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """(values, shown) of the images that say something of a label, of labels that some of them show."""
    found = [(scores[t >= 0, i], t[t >= 0]) for i, t in enumerate(truth.T)]
    return [(values, shown) for values, shown in found if shown.any()]


def average_precision(scores: np.ndarray, truth: np.ndarray) -> float:
    return float(np.mean([average_precision_score(shown, values) for values, shown in _each_label(scores, truth)]))


def auroc_of_labels(scores: np.ndarray, truth: np.ndarray) -> float:
    both = [(values, shown) for values, shown in _each_label(scores, truth) if not shown.all()]
    return float(np.mean([roc_auc_score(shown, values) for values, shown in both]))


def precision_at_recalls(scores: np.ndarray, truth: np.ndarray, points: int) -> float:
    """VOC's devkits, an image at a time (no equal scores): 11 points of recall (2007), or 0 = the area of 2010."""
    found = []
    for values, shown in _each_label(scores, truth):
        order = np.argsort(-values)
        recall, precision, right = [], [], 0
        for rank, place in enumerate(order, start=1):
            right += int(shown[place])
            recall.append(right / shown.sum())
            precision.append(right / rank)
        if points:
            tenths = [
                max(p for p, r in zip(precision, recall, strict=True) if r >= t / 10 - 1e-9) for t in range(points)
            ]
            found.append(sum(tenths) / points)
        else:
            area, before = 0.0, 0.0
            for place, r in enumerate(recall):
                area, before = area + (r - before) * max(precision[place:]), r
            found.append(area)
    return float(np.mean(found))


# --- a class for each pixel -------------------------------------------------------------------------------------------


def bilinear(scores: np.ndarray, height: int, width: int) -> np.ndarray:
    """(h, w, C) -> (height, width, C): pixel centres are matched, and places beyond the outer centres take the outer value."""

    def places(num: int, of: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        at = np.clip((np.arange(num) + 0.5) * of / num - 0.5, 0, of - 1)
        low = np.floor(at).astype(int)
        return low, np.minimum(low + 1, of - 1), at - low

    top, bottom, down = places(height, scores.shape[0])
    left, right, along = places(width, scores.shape[1])
    rows = scores[top] * (1 - down)[:, None, None] + scores[bottom] * down[:, None, None]
    return rows[:, left] * (1 - along)[:, None] + rows[:, right] * along[:, None]


def mean_iou(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Over all pixels (M,) of all images; classes that neither names are left out."""
    return float(jaccard_score(truth, predicted, average="macro", labels=np.union1d(truth, predicted)))


# --- boxes: of each image detections (score, class, left, top, right, bottom) and boxes (class, crowd, left, top, right, bottom)


def _iou(a: tuple[float, ...], b: tuple[float, ...], crowd: bool) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    area, other = (a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1])
    return width * height / (area if crowd else area + other - width * height)


def box_precision(detections: list[list[tuple]], boxes: list[list[tuple]], ious: list[float]) -> float:
    """COCO's average precision as its paper's evaluation page describes it, a detection at a time; no two scores are equal."""
    classes = {box[0] for image in boxes for box in image if not box[1]}
    values = []
    for name in sorted(classes):
        num = sum(box[0] == name and not box[1] for image in boxes for box in image)
        for least in ious:
            answers = []
            for found, there in zip(detections, boxes, strict=True):
                free = [box for box in there if box[0] == name and not box[1]]
                crowds = [box for box in there if box[0] == name and box[1]]
                for score, _, *edges in sorted((d for d in found if d[1] == name), reverse=True):
                    fitting = [(_iou(tuple(edges), box[2:], False), i) for i, box in enumerate(free)]
                    best = max(fitting, default=(0.0, -1))
                    if best[0] >= least:
                        free.pop(best[1])
                        answers.append((score, True))
                    elif not any(_iou(tuple(edges), box[2:], True) >= least for box in crowds):
                        answers.append((score, False))
            curve, right = [], 0
            for rank, (_, hit) in enumerate(sorted(answers, reverse=True), start=1):
                right += hit
                curve.append((right / num, right / rank))
            # As there: a recall of 7 / 25 is below linspace's 0.28000000000000003.
            read = [max((p for r, p in curve if r >= at), default=0.0) for at in np.linspace(0, 1, 101)]
            values.append(sum(read) / 101)
    return float(np.mean(values))
