"""Average precision of boxes, as COCO's evaluation has it (pycocotools' `COCOeval`, all areas, 100 detections an image).

A detection is right at an IoU where it takes a box of its class that no surer one has taken, the one that it overlaps most. What
matches only a crowd counts nowhere. Precision is read at 101 recalls, and averaged over classes that have a box, and over IoUs.
"""

from collections.abc import Sequence

import numpy as np

from pipeline.data.format.boxes import Boxes
from pipeline.errors import UserError

IOUS = np.linspace(0.5, 0.95, 10)
MAX_DETECTIONS = 100
"""Of an image, as COCO counts them."""
RECALLS = np.linspace(0.0, 1.0, 101)
FOUND = np.dtype([("edges", "f8", (4,)), ("score", "f8"), ("label", "i8"), ("right", "i1", (len(IOUS),))])
"""A detection: edges in shares of the image, and at each IoU 1 right, 0 wrong, -1 not counted. Label -1 fills a row up."""
NUM_DRAWS, SEED = 20, 20_261_129


def is_found(scores: np.ndarray) -> bool:
    """Whether these are detections, as `matched` gives them, and not scores."""
    return scores.dtype.names is not None


def matched(detections: Sequence[np.ndarray], truth: Sequence[Boxes]) -> np.ndarray:
    """(N, D) of FOUND, D the largest number of detections of an image.

    Args:
        detections: of each image (D, 6): left, top, right, bottom in shares of the image, score, label; surest first.
        truth: its boxes.
    """
    found = np.zeros((len(truth), max([1, *map(len, detections)])), FOUND)
    found["label"] = -1
    for row, said, boxes in zip(found, detections, truth, strict=True):
        part = row[: len(said)]
        part["edges"], part["score"], part["label"] = said[:, :4], said[:, 4], said[:, 5]
        for label in np.unique(part["label"]):
            chosen, of_class = part["label"] == label, boxes.labels == label
            part["right"][chosen] = _match(
                part["edges"][chosen] * boxes.scale, boxes.edges[of_class], boxes.crowd[of_class]
            )
    return found


def _match(found: np.ndarray, boxes: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """(D, T): of detections of one class in one image, surest first. Args: found: (D, 4), boxes: (B, 4), crowd: (B,)."""
    right = np.zeros((len(found), len(IOUS)), np.int8)
    if not len(boxes):
        return right
    overlap = _overlap(found, boxes, crowd)
    least = np.minimum(IOUS, 1 - 1e-10)
    taken = np.zeros((len(IOUS), len(boxes)), bool)
    for d, row in enumerate(overlap):
        free = np.where(crowd | taken, -1.0, row)  # (T, B)
        best = free.shape[1] - 1 - free[:, ::-1].argmax(1)  # of equals the last, as there
        hits = free.max(1) >= least
        right[d, hits] = 1
        taken[hits, best[hits]] = True
        right[d, ~hits & (np.where(crowd, row, -1.0).max() >= least)] = -1
    return right


def _overlap(found: np.ndarray, boxes: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """(D, B) IoU; with a crowd the share of the detection that lies in it."""
    low, high = np.maximum(found[:, None, :2], boxes[:, :2]), np.minimum(found[:, None, 2:], boxes[:, 2:])
    shared = np.prod((high - low).clip(0), axis=2)
    own, theirs = (np.prod(b[:, 2:] - b[:, :2], axis=1) for b in (found, boxes))
    whole = np.where(crowd, own[:, None], own[:, None] + theirs - shared)
    return np.divide(shared, whole, out=np.zeros_like(shared), where=whole > 0)


def precision(found: np.ndarray, num_boxes: np.ndarray, ious: slice = slice(None)) -> float:
    """Mean average precision over classes and over some of IOUS.

    Args:
        found: (N, D) of FOUND.
        num_boxes: (N, C) boxes of each class in each image.
    Raises:
        UserError: no image has a box.
    """
    totals = num_boxes.sum(0)
    if not totals.any():
        raise UserError("average precision needs an image with a box; the split has none")
    found = found[found["label"] >= 0]
    found = found[np.argsort(-found["score"], kind="stable")]
    return float(
        np.mean([_of_class(found["right"][found["label"] == c, ious], totals[c]) for c in np.flatnonzero(totals)])
    )


def _of_class(right: np.ndarray, num: int) -> float:
    """Mean over IoUs. Args: right: (D, T), surest first."""
    hits, misses = np.cumsum(right == 1, axis=0), np.cumsum(right == 0, axis=0)
    recall, precise = hits / num, hits / np.maximum(hits + misses, np.spacing(1))
    best = np.maximum.accumulate(precise[::-1], axis=0)[::-1]
    read = np.zeros((len(RECALLS), right.shape[1]))
    for t in range(right.shape[1]):
        places = np.searchsorted(recall[:, t], RECALLS, side="left")
        reached = places < len(best)
        read[reached, t] = best[places[reached], t]
    return float(read.mean())


def guessed(ious: slice, train: Sequence[Boxes], test: Sequence[Boxes], num_classes: int) -> float:
    """What guessing reaches: each test image is said to show the boxes of a training image drawn at random, each with a score
    drawn at random; the mean over draws."""
    draw = np.random.Generator(np.random.PCG64(SEED))
    counts = np.stack([boxes.counts(num_classes) for boxes in test])
    values = []
    for _ in range(NUM_DRAWS):
        chosen = [train[i] for i in draw.integers(len(train), size=len(test))]
        said = [
            np.column_stack([b.edges / b.scale, draw.random(len(b.labels)), b.labels])[~b.crowd].reshape(-1, 6)
            for b in chosen
        ]
        surest = [rows[np.argsort(-rows[:, 4], kind="stable")] for rows in said]
        values.append(precision(matched(surest, test), counts, ious))
    return float(np.mean(values))
