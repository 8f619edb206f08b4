"""What a final trial predicts for each test image, kept for metrics, error analysis, and whoever asks later.

<sweep>/predictions/<trial digest>.npz
    sample      (N,) int64      place of the image in the test split's index, rising
    label       (N,) int64
    predicted   (N,) int64
    confidence  (N,) float32    share of the predicted class: the probability, or the softmax of the scores
    top5        (N, 5) int64    the likeliest classes, first first; fewer columns where there are fewer classes
    credit      (N,) float64    chance that the answer is right, where classes with equal scores are ordered by lot
    credit5     (N,) float64    the same for the five likeliest

Where the truth of an image is more than one class, all of what is said is kept, and every metric follows from it:
    sample      (N,) int64
    scores      (N, C) float64  of each label
    truth       (N, C) int64    1 shown, 0 not shown, -1 not said
and of pixels
    scores      (N, C, C) float64  pixels of each class (rows) by what was predicted of them
    truth       (N, C) int64    pixels of each class
and of boxes
    scores      (N, D) of `box_precision.FOUND`: detections, and whether they are right
    truth       (N, C) int64    boxes of each class
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from pipeline.errors import UserError
from pipeline.storage import objects
from transfer import metrics
from transfer.arrays import read_arrays, write_arrays
from transfer.box_precision import FOUND, is_found

ARRAYS = dict.fromkeys(("sample", "label", "predicted", "top5"), "int64")
ARRAYS |= {"confidence": "float32", "credit": "float64", "credit5": "float64"}
OPTIONAL = {"credit", "credit5"}
WHOLE = {"sample": "int64", "scores": "float64", "truth": "int64"}
"""Arrays of a file that keeps all of what is said."""
RECOMPUTED = ("top1", "top5", "mean_per_class", "balanced_accuracy")
"""Metrics that follow from what was predicted; the others need all scores."""
REMEDY = "restore it, or delete the trial's entry under trials/ and run the sweep again"
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
    """Write what `scores` (N, C) say, whole or not at all. Args: labels: (N,) classes, or the truth of another shape."""
    order = np.argsort(samples, kind="stable")
    samples, scores, labels = samples[order].astype(np.int64), scores[order], labels[order].astype(np.int64)
    scores = scores if is_found(scores) else scores.astype(np.float64)
    if labels.ndim > 1:
        write_arrays(url_of(sweep, digest), sample=samples, scores=scores, truth=labels)
        return
    top = np.argsort(-scores, axis=1, kind="stable")[:, :5]
    shares = scores
    if kind == "scores":
        shares = np.exp(scores - scores.max(1, keepdims=True))
        shares /= shares.sum(1, keepdims=True)
    write_arrays(
        url_of(sweep, digest),
        sample=samples,
        label=labels,
        predicted=top[:, 0].astype(np.int64),
        confidence=np.take_along_axis(shares, top[:, :1], 1)[:, 0].astype(np.float32),
        top5=top.astype(np.int64),
        credit=metrics.credit(scores, labels, 1),
        credit5=metrics.credit(scores, labels, 5),
    )


def read(sweep: str, digest: str) -> dict[str, np.ndarray]:
    """The arrays by name, and one row an image in each; "credit" and "credit5" are not in files of earlier versions.

    Raises:
        FileNotFoundError: the trial kept none.
        UserError: the file is damaged, or is something else.
    """
    url = url_of(sweep, digest)
    found = read_arrays(url, REMEDY)
    if "truth" in found:
        return _checked_whole(found, url)
    missing = ARRAYS.keys() - found.keys() - OPTIONAL
    if missing:
        raise UserError(f"{url} lacks {', '.join(sorted(missing))}; {REMEDY}")
    num = len(found["label"]) if found["label"].ndim else -1
    for name, dtype in ARRAYS.items():
        if name in found:
            shape = found[name].shape
            if (
                found[name].dtype != dtype
                or shape[:1] != (num,)
                or len(shape) != (2 if name == "top5" else 1)
                or 0 in shape
            ):
                raise UserError(f"{url}: {name} is {found[name].dtype} of shape {shape}, for {num} images; {REMEDY}")
    if min(int(found[name].min()) for name in ("label", "predicted", "top5", "sample")) < 0:
        raise UserError(f"{url} has a class or an image of a negative number; {REMEDY}")
    if any(not ((found[name] >= 0) & (found[name] <= 1)).all() for name in ("confidence", *OPTIONAL) if name in found):
        raise UserError(f"{url} has a confidence outside 0 to 1; {REMEDY}")
    if (contradiction := _contradiction(found)) is not None:
        raise UserError(f"{url}: {contradiction}; {REMEDY}")
    return found


def _checked_whole(found: dict[str, np.ndarray], url: str) -> dict[str, np.ndarray]:
    num = len(found["truth"]) if found["truth"].ndim else -1
    of_boxes = "scores" in found and is_found(found["scores"])
    for name, dtype in (WHOLE | {"scores": FOUND} if of_boxes else WHOLE).items():
        if name not in found or found[name].dtype != dtype or found[name].shape[:1] != (num,) or 0 in found[name].shape:
            raise UserError(f"{url}: {name} is not there as {dtype}, for {num} images; {REMEDY}")
    if found["sample"].shape != (num,) or found["sample"].min() < 0:
        raise UserError(f"{url} has an image of a negative number; {REMEDY}")
    scores, truth = found["scores"], found["truth"]
    if of_boxes:
        if scores.ndim != 2 or truth.ndim != 2 or truth.min() < 0 or scores["label"].max() >= truth.shape[1]:
            raise UserError(f"{url} has detections of a class that there is not; {REMEDY}")
        if not np.isfinite(scores["score"]).all() or not np.isin(scores["right"], (-1, 0, 1)).all():
            raise UserError(f"{url} has detections that are neither right nor wrong; {REMEDY}")
    elif scores.ndim == 3:
        if not (scores >= 0).all() or not np.array_equal(scores.sum(2), truth):
            raise UserError(f"{url}: truth is not the sum of what was predicted of each class; {REMEDY}")
    elif scores.shape != truth.shape or not np.isin(truth, (-1, 0, 1)).all():
        raise UserError(f"{url}: truth is not 1, 0 and -1 in the shape of the scores; {REMEDY}")
    return found


def names_classes(found: Mapping[str, np.ndarray] | None) -> bool:
    """Whether these predictions name one class an image: only then is there a confusion, a confidence, a mistake."""
    return found is not None and "predicted" in found


def _contradiction(found: Mapping[str, np.ndarray]) -> str | None:
    """Where two arrays say different things of an image: what is counted as right, and what is shown as predicted."""
    top, label = found["top5"], found["label"]
    if not np.array_equal(top[:, 0], found["predicted"]):
        return "the first of top5 is not what is predicted"
    for name, is_among in (("credit", top[:, 0] == label), ("credit5", (top == label[:, None]).any(1))):
        # Among equal scores the first is shown, so that a credit between 0 and 1 says nothing of it.
        if name in found and (np.where(is_among, found[name] <= 0, found[name] >= 1)).any():
            return f"{name} is not what the predictions and the labels give"
    return None


def recomputed(metric: str, found: Mapping[str, np.ndarray], keep: np.ndarray | None = None) -> float | None:
    """A metric over the kept predictions ((N,) bool; None = all). None where it cannot be told from them, or none is kept."""
    keep = np.ones(len(found["sample"]), bool) if keep is None else keep
    if not keep.any():
        return None
    if "truth" in found:
        try:
            return metrics.compute(metric, found["scores"][keep], found["truth"][keep])
        except UserError:  # nothing of these images can be measured by it
            return None
    if metric not in RECOMPUTED:
        return None
    labels = found["label"][keep]
    if metric == "top5":
        right = found["credit5"] if "credit5" in found else (found["top5"] == found["label"][:, None]).any(1)
        return float(right[keep].mean())
    right = (found["credit"] if "credit" in found else found["predicted"] == found["label"])[keep]
    if metric == "top1":
        return float(right.mean())
    num, sums = np.bincount(places := np.unique(labels, return_inverse=True)[1]), np.bincount(places, weights=right)
    return float((sums / num).mean())


def contradiction(entry: Mapping[str, Any], found: Mapping[str, np.ndarray]) -> str:
    """How an entry's numbers differ from what follows from its predictions, in a sentence; "" = they agree.

    Args:
        entry: value, metric, metrics and num_test of a final trial.
    """
    if entry["num_test"] != len(found["sample"]):
        return f"num_test is {entry['num_test']}, and there are {len(found['sample'])} predictions"
    # Equal scores at the top share their credit, which files of earlier versions do not hold.
    tolerance = 1e-9 if "credit" in found or "truth" in found else 0.02
    numbers = {"value": (entry["metric"], entry["value"])}
    numbers |= {f"metrics.{name}": (name, value) for name, value in entry["metrics"].items()}
    for field, (metric, value) in numbers.items():
        expected = recomputed(metric, found)
        if expected is not None and abs(expected - value) > tolerance:
            return f"{field} is {value:.6g}, and its predictions give {expected:.6g}"
    other = entry["metrics"].get(entry["metric"], entry["value"])
    return "" if other == entry["value"] else f"value is {entry['value']:.6g}, and metrics say {other:.6g}"


def all_metrics(scores: np.ndarray, labels: np.ndarray, also: Sequence[str] = ()) -> dict[str, float]:
    """Every metric that these scores can give, by name.

    Args:
        also: metrics that must be among them; what cannot be measured raises UserError.
    """
    names: list[str]
    if is_found(scores):
        names = list(metrics.OF_BOXES)
    elif scores.ndim == 3:
        names = list(metrics.OF_PIXELS)
    elif labels.ndim > 1:
        has_both = ((labels == 1).any(0) & (labels == 0).any(0)).any()
        names = [name for name in metrics.OF_SEVERAL_LABELS if name != "auroc" or has_both]
    else:
        num_classes = scores.shape[1]
        names = ["top1", "mean_per_class", "balanced_accuracy"]
        names += ["top5"] if num_classes > 5 else []
        names += ["auroc"] if num_classes <= MAX_AUROC_CLASSES and len(np.unique(labels)) > 1 else []
    return {name: metrics.compute(name, scores, labels) for name in dict.fromkeys((*names, *also))}
