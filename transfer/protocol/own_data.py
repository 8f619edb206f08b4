"""A suite for datasets that come without one: the default protocol, by the size of the data.

methods   ridge at 1, 5, 10 and 25 images a class; nearest neighbours and logistic regression on all images, of more than
          50,000 the linear probe in its place, whose cost does not grow with them; others by their names
held out  10 images of each class for the few-shot methods, fewer where the smallest class has below 40
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.configuration import nearest
from pipeline.data.format import manifest
from pipeline.data.format.manifest import Manifest
from pipeline.data.prepare.prepare import prepare
from pipeline.data.sources.cards import list_cards, load_card
from pipeline.errors import UserError
from pipeline.storage import objects
from transfer.protocol.methods import METHOD_KINDS, parse_methods
from transfer.protocol.tasks import Suite, Task, TaskEntry

NAME = "own_data"
SHOTS, SEEDS, HOLDOUT = (1, 5, 10, 25), 3, 10
MANY_IMAGES = 50_000
VAL_SHARE = 0.2
"""Of a folder without splits."""
FINETUNE: dict[str, Any] = {"split": "full", "learning_rates": [0.01, 0.03, 0.1], "epochs": [10], "batch": 64}


def prepared(place: str, out: str, *, workers: int = 1) -> str:
    """URL of the prepared dataset at `place`; raw images are prepared first, below `out`/data, as the card `images`.

    Where a source has no splits, a fifth of each class becomes val. UserError for what is neither.
    """
    if objects.exists(objects.join(place, manifest.NAME)):
        return place
    target, card = objects.join(out, "data", _name_of(place)), load_card("images")
    try:
        return prepare(card, target, source=place, val_share=VAL_SHARE, workers=workers).url
    except UserError as error:
        # Its splits are its own, or it was prepared so by an earlier start of the same command.
        if not any(why in str(error) for why in ("leave out val_share", "prepared otherwise (val_share None)")):
            raise
    return prepare(card, target, source=place, workers=workers).url


def default_suite(datasets: Sequence[str], methods: Sequence[str] = ()) -> tuple[Suite, list[str]]:
    """The suite for prepared datasets, and what it is in sentences.

    Args:
        datasets: their places.
        methods: names of `METHOD_KINDS` in place of the default.
    Raises:
        UserError: no dataset there; one class; a class without a training image; two datasets of one name; no such method.
    """
    found = [Manifest.open(place) for place in datasets]
    sizes = [_counts(one) for one in found]
    entries = [_task(one, int(counts.min())) for one, counts in zip(found, sizes, strict=True)]
    names = [entry.name for entry in entries]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"two datasets would be the task {twice[0]}; give one of their folders another name")
    num, fewest = max(int(c.sum()) for c in sizes), max(int(c.min()) for c in sizes)
    several = all(one.labels for one in found)
    usual = "linear" if num > MANY_IMAGES else "logistic"
    default: Sequence[str] = ("ridge", "knn", usual)
    if all(one.masks for one in found) or all(one.boxes for one in found):
        several, default = True, ("segment" if found[0].masks else "detect",)
    settings = _methods(methods or default, fewest, several=several)
    suite = Suite(
        name=NAME,
        title="Own images",
        tasks=tuple(entries),
        methods=parse_methods(settings, "--methods"),
        num_seeds=SEEDS,
    )
    said = [
        f"{entry.name}: {one.splits[Task.train_split].num_samples:,} training images, {len(one.outputs)} "
        + (
            "classes of pixels"
            if one.masks
            else "classes of boxes"
            if one.boxes
            else f"labels, the rarest is shown by {int(c.min())}"
            if one.labels
            else f"classes, the smallest has {int(c.min())}"
        )
        for entry, one, c in zip(entries, found, sizes, strict=True)
    ]
    said.append("protocol (no --suite): " + "; ".join(f"{m.title}{_shots(m.settings.shots)}" for m in suite.methods))
    return suite, said


def _methods(names: Sequence[str], fewest: int, *, several: bool) -> dict[str, Any]:
    """Args: several: whether no image has one class, so that few images of each cannot be drawn."""
    shots = [s for s in SHOTS if s <= fewest]
    found: dict[str, Any] = {}
    for name in names:
        if name in ("ridge", "ridge_selected") and not several:
            found[name] = {"shots": shots}
        elif name == "finetune":
            found[name] = FINETUNE
        elif name in METHOD_KINDS:
            found[name] = {"split": "full"}
        else:
            raise UserError(f"--methods has {name!r}; {nearest(name, METHOD_KINDS)}")
    return found


def _counts(found: Manifest) -> np.ndarray:
    """Training images of each class, or that show each label."""
    if len(found.outputs) < 2:
        raise UserError(f"{found.url} has one class ({found.outputs[0]}); a task needs two at least")
    if Task.train_split not in found.splits or len(found.splits) < 2:
        raise UserError(
            f"{found.url} has the splits {', '.join(found.splits)}; a task needs train, and val or test: prepare it again with "
            f"--val-share {VAL_SHARE}"
        )
    counts = np.bincount(found.split(Task.train_split).label, minlength=len(found.classes))
    if found.targets is not None:
        counts = counts @ (found.targets == 1)
    if not counts.min():
        raise UserError(
            f"the class {found.outputs[int(counts.argmin())]} of {found.url} has no training image; remove it"
        )
    return counts


def _task(found: Manifest, fewest: int) -> TaskEntry:
    known = found.name if found.name in list_cards() and found.name != "images" else ""
    return TaskEntry(
        card=known or "images",
        data=found.url,
        label="" if known else _name_of(found.url),
        holdout_per_class=max(1, min(HOLDOUT, fewest // 4)),
    )


def _name_of(place: str) -> str:
    stem = place.rstrip("/").rpartition("/")[2].partition(".")[0].lower()
    return re.sub(r"[^a-z0-9]+", "_", stem).strip("_") or "images"


def _shots(shots: Sequence[int]) -> str:
    return f" at {', '.join(map(str, shots))} images a class" if shots else ""
