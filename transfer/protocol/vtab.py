"""VTAB-1k: 19 tasks, which images they train on, and how their labels are made (Zhai et al. 2019; facts 4.1).

    official split of TensorFlow Datasets -> train, val, test of VTAB -> 800 and 200 to select, both to refit, test once

"The first 800" are those of TensorFlow Datasets' own order, so the data must come in it: `write_list` takes the examples
of its splits in order, checks their number, and writes the list that `normfree data prepare vtab_...` reads. Numbers and
rules are those of google-research/task_adaptation (task_adaptation/data/*.py and the counts in their tests).
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline.errors import UserError

Group = Literal["natural", "specialized", "structured"]
Part = tuple[str, int, int]
"""An official split, from and to which per cent of it."""
NUM_TRAIN, NUM_VAL = 800, 200


@dataclass(frozen=True)
class VtabTask:
    """One of the 19. Its name is that of its card."""

    name: str
    group: Group
    num_classes: int
    official: Mapping[str, int]
    """Images of the splits of TensorFlow Datasets that it uses."""
    train: Part
    val: Part
    test: Part
    rule: Callable[[Any], int] | None = None
    """From what the dataset says of an image to its class; None: the dataset's own class index."""
    flip: bool = True
    """Whether BiT-HyperRule mirrors training images (Kolesnikov et al. 2020, supplement F)."""
    random_crop: bool = True
    """Whether it crops them at random."""

    def bounds(self, part: Literal["train", "val", "test"]) -> tuple[str, int, int]:
        """(official split, first image, behind the last) of a part of the full task."""
        split, low, high = getattr(self, part)
        return split, *(round(self.official[split] * percent / 100) for percent in (low, high))

    def counts(self) -> dict[str, int]:
        """Images of the full task's train, val and test."""
        bounds = {part: self.bounds(part) for part in ("train", "val", "test")}
        return {part: high - low for part, (_, low, high) in bounds.items()}

    def bounds_1k(self) -> dict[str, tuple[str, int, int]]:
        """The same for VTAB-1k: the first 800 of train, the first 200 of val, all of test."""
        (train, t, _), (val, v, _) = self.bounds("train"), self.bounds("val")
        return {"train": (train, t, t + NUM_TRAIN), "val": (val, v, v + NUM_VAL), "test": self.bounds("test")}


def _bin(edges: Sequence[float], value: float) -> int:
    """The last edge that lies below the value, as the reference takes it: a value on an edge belongs to the bin before."""
    return int(np.searchsorted(edges, value, side="left")) - 1


def clevr_count(num_objects: int) -> int:
    """Scenes hold 3 to 10 objects."""
    return num_objects - 3


def clevr_distance(depths: Sequence[float]) -> int:
    """Of the nearest object, by the third pixel coordinate of each."""
    return _bin((0.0, 8.0, 8.5, 9.0, 9.5, 10.0, 100.0), min(depths))


def kitti_distance(objects: Sequence[tuple[int, float]]) -> int:
    """Of the nearest vehicle, from each object's type (0 car, 1 van, 2 truck) and its z in metres; 3: none."""
    depths = [z for kind, z in objects if kind < 3]
    return _bin((-100.0, 8.0, 20.0, 999.0), min(depths, default=1000.0))


def dsprites_location(x_position: int) -> int:
    """32 columns in pairs."""
    return x_position // 2


def dsprites_orientation(orientation: int) -> int:
    """40 angles in 16 bins of 2.5."""
    return int(orientation // 2.5)


def _own(name: str, group: Group, num_classes: int, train: int, val: int, test: int, **rest: Any) -> VtabTask:
    """With a validation split of its own."""
    official = {"train": train, "validation": val, "test": test}
    parts: tuple[Part, Part, Part] = ("train", 0, 100), ("validation", 0, 100), ("test", 0, 100)
    return VtabTask(name, group, num_classes, official, *parts, **rest)


def _tail(
    name: str, group: Group, num_classes: int, train: int, cut: int, test: tuple[str, int], **rest: Any
) -> VtabTask:
    """With the end of train, from `cut` per cent, for validation."""
    official = {"train": train, test[0]: test[1]}
    parts: tuple[Part, Part, Part] = ("train", 0, cut), ("train", cut, 100), (test[0], 0, 100)
    return VtabTask(name, group, num_classes, official, *parts, **rest)


def _thirds(name: str, group: Group, num_classes: int, num: int, cut: int, end: int, **rest: Any) -> VtabTask:
    """All three out of one split."""
    parts: tuple[Part, Part, Part] = ("train", 0, cut), ("train", cut, end), ("train", end, 100)
    return VtabTask(name, group, num_classes, {"train": num}, *parts, **rest)


def _norb(name: str, num_classes: int, **rest: Any) -> VtabTask:
    """With the first half of test for validation."""
    official = {"train": 24_300, "test": 24_300}
    parts: tuple[Part, Part, Part] = ("train", 0, 100), ("test", 0, 50), ("test", 50, 100)
    return VtabTask(name, "structured", num_classes, official, *parts, **rest)


def _tasks() -> Iterator[VtabTask]:
    clevr: Any = {
        "group": "structured",
        "train": 70_000,
        "cut": 90,
        "test": ("validation", 15_000),
        "random_crop": False,
    }
    sprites: Any = {"group": "structured", "num_classes": 16, "num": 737_280, "cut": 80, "end": 90, "flip": False}

    yield _tail("vtab_caltech101", "natural", 102, 3060, 90, ("test", 6084))
    yield _tail("vtab_cifar100", "natural", 100, 50_000, 90, ("test", 10_000))
    yield _own("vtab_dtd", "natural", 47, 1880, 1880, 1880)
    yield _own("vtab_flowers102", "natural", 102, 1020, 1020, 6149)
    yield _tail("vtab_pets", "natural", 37, 3680, 80, ("test", 3669))
    yield _tail("vtab_svhn", "natural", 10, 73_257, 90, ("test", 26_032))
    yield _own("vtab_sun397", "natural", 397, 76_128, 10_875, 21_750)
    yield _own("vtab_patch_camelyon", "specialized", 2, 262_144, 32_768, 32_768)
    yield _thirds("vtab_eurosat", "specialized", 10, 27_000, 60, 80)
    yield _thirds("vtab_resisc45", "specialized", 45, 31_500, 60, 80)
    yield _own("vtab_retinopathy", "specialized", 5, 35_126, 10_906, 42_670)
    yield _tail("vtab_clevr_count", num_classes=8, rule=clevr_count, **clevr)
    yield _tail("vtab_clevr_distance", num_classes=6, rule=clevr_distance, **clevr)
    yield _own("vtab_dmlab", "structured", 6, 65_550, 22_628, 22_735, random_crop=False)
    yield _own("vtab_kitti_distance", "structured", 4, 6347, 423, 711, rule=kitti_distance, random_crop=False)
    yield _thirds("vtab_dsprites_location", rule=dsprites_location, random_crop=False, **sprites)
    yield _thirds("vtab_dsprites_orientation", rule=dsprites_orientation, **sprites)
    yield _norb("vtab_smallnorb_azimuth", 18, flip=False)
    yield _norb("vtab_smallnorb_elevation", 9)


TASKS: Mapping[str, VtabTask] = {task.name: task for task in _tasks()}


def write_list(task: VtabTask, examples: Mapping[str, Sequence[tuple[str, Any]]], out: str | Path) -> dict[str, int]:
    """Write VTAB-1k's images as the JSONL list that `normfree data prepare` reads; the number of images of each split.

    Args:
        examples: for each official split of `task.official` (path of the image, what the task's rule takes or the class
            index), in the order of TensorFlow Datasets.
    Raises:
        UserError: a split is missing or has another number of examples, or a label is not one of the task's classes.
    """
    for split, num in task.official.items():
        if len(examples.get(split, ())) != num:
            raise UserError(
                f"{task.name} needs all {num:,} examples of the official split {split}, in order, to find its first "
                f"{NUM_TRAIN}; got {len(examples.get(split, ())):,}"
            )
    counts, lines = {}, []
    for part, (split, low, high) in task.bounds_1k().items():
        for path, listed in examples[split][low:high]:
            label = listed if task.rule is None else task.rule(listed)
            if not 0 <= label < task.num_classes:
                raise UserError(f"{path} has the label {listed!r}; {task.name} has {task.num_classes} classes from 0")
            lines.append(json.dumps({"path": path, "label": int(label), "split": part}))
        counts[part] = high - low
    Path(out).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return counts


def score(accuracies: Mapping[str, float]) -> dict[str, float]:
    """The VTAB score, an unweighted mean over the 19 tasks under "all", and the mean of each group.

    Raises:
        UserError: a task is missing; a mean over fewer is not the score.
    """
    missing = sorted(TASKS.keys() - accuracies.keys())
    if missing:
        raise UserError(f"the VTAB score is a mean over 19 tasks; {', '.join(missing)} is missing")
    groups: dict[str, list[float]] = {"all": [], "natural": [], "specialized": [], "structured": []}
    for name, task in TASKS.items():
        groups["all"].append(accuracies[name])
        groups[task.group].append(accuracies[name])
    return {name: float(np.mean(values)) for name, values in groups.items()}
