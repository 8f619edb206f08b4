"""Suites and tasks: what is measured, specified completely before anything is run.

A suite (YAML) lists tasks, which are dataset cards, and methods with their settings (`transfer.protocol.methods`).
"""

from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import numpy as np

from pipeline.data.format import manifest
from pipeline.data.format.manifest import Manifest
from pipeline.data.sampling.subset import Subset
from pipeline.data.sources.cards import Card, load_card
from pipeline.errors import UserError
from pipeline.field_types import Count, Form, Text
from pipeline.storage import objects
from transfer.protocol.imagenet_labels import ExtraTestSets, find_extra_test_sets
from transfer.protocol.method_settings import ALL_IMAGES, VTAB_IMAGES, RidgeSettings, Settings, Texts
from transfer.protocol.methods import HEADS, SPLIT_RULES, Method, plain_settings, sha256
from transfer.protocol.recipes import families
from transfer.protocol.truth import Truth

Init = Literal["pretrained", "scratch"]
INITS: tuple[Init, ...] = ("pretrained", "scratch")
METRIC = "top1"


@dataclass(frozen=True, kw_only=True)
class TaskEntry:
    card: Text
    """Name of one, or path of its YAML."""
    data: str = ""
    """The prepared dataset, under the data root where the path is not absolute; empty = it is called as the card."""
    label: Annotated[str, Form(r"[a-z0-9_]*", "lower-case letters, digits and _")] = ""
    """What the task is called, where one card serves several datasets; empty = as the card."""
    holdout_per_class: Count
    """Images of each class that no support has."""
    real_labels: str = ""
    """ReaL's label file, for ImageNet (`transfer.protocol.imagenet_labels`); under the data root where it is not absolute."""
    v2: str = ""
    """The prepared ImageNet-V2, likewise."""
    also: Texts = ()
    """Prepared datasets with all or some of the task's classes by name (ImageNet-A, R, Sketch), likewise: final trials are
    measured on their test images too, the choice being among the classes that are there."""
    corruptions: Texts = ()
    """Of ImageNet-C, made on the test images at severities 1 to 5, five passes each; [all] = every one that is offered."""

    @property
    def name(self) -> str:
        """The label, or the name of the card, which a path may lead to."""
        return self.label or load_card(self.card).name

    def load_card(self) -> Card:
        """With the label for its name and title, where there is one."""
        card = load_card(self.card)
        return replace(card, name=self.label, title=self.label) if self.label else card

    def place(self, data_root: str) -> str:
        """Of the prepared dataset."""
        data = self.data or load_card(self.card).name
        return data if "://" in data or data.startswith("/") else objects.join(data_root, data)

    def plain(self) -> dict[str, Any]:
        """As a suite's YAML holds it; what is not configured is omitted, so that digests of suites stay."""
        more = {k: v for k in ("data", "label", "real_labels", "v2") if (v := getattr(self, k))}
        more |= {k: list(v) for k in ("also", "corruptions") if (v := getattr(self, k))}
        return {"card": self.card, "holdout_per_class": self.holdout_per_class, **more}


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Tasks x methods x shots, with a number of seeds."""

    name: str
    title: str
    tasks: tuple[TaskEntry, ...]
    methods: tuple[Method, ...]
    num_seeds: int

    def digest(self) -> str:
        """SHA-256 over what is measured; the number of seeds is skipped, because a sweep may be extended by seeds."""
        tasks = [
            {k: v for k, v in t.plain().items() if k != "data"} for t in self.tasks
        ]  # its digest counts, not its place
        return sha256({"name": self.name, "tasks": tasks, "methods": [m.plain() for m in self.methods]})

    def plain(self) -> dict[str, Any]:
        """As a suite's YAML holds it."""
        return {
            "name": self.name,
            "title": self.title,
            "num_seeds": self.num_seeds,
            "tasks": [t.plain() for t in self.tasks],
            "methods": {m.name: {"kind": m.kind, **m.configured()} for m in self.methods},
        }

    def method(self, name: str) -> Method:
        found = next((m for m in self.methods if m.name == name), None)
        if found is None:
            raise UserError(
                f"the suite {self.name} has no method {name}; it has {', '.join(m.name for m in self.methods)}"
            )
        return found


@dataclass(frozen=True)
class Part:
    """Some training images: of a split, or of two with + between, all or a subset."""

    split: str
    subset: Subset | None
    num: int


@dataclass(frozen=True)
class Parts:
    """Which training images are used for what."""

    search: Part
    """Fitted to choose hyper-parameters,"""
    holdout: Part
    """which these decide."""
    final: Part
    """Fitted for the test."""


@dataclass(frozen=True)
class Task:
    """A prepared dataset as a task. The name of its test split is `transfer.protocol.sealed_splits.open_test`'s to give."""

    card: Card
    url: str
    data_digest: str
    num_classes: int
    holdout_per_class: int
    train_labels: np.ndarray = field(repr=False, compare=False)
    """(num_samples,) int64, of the train split."""
    train_split: str = "train"
    _test_split: str = "val"
    val_split: str = ""
    """An official split to choose on, where the test split is another one."""
    num_val: int = 0
    extra_tests: ExtraTestSets = field(default_factory=ExtraTestSets)
    """What its final trials are measured by besides its own test split."""
    truth: Truth = field(default_factory=Truth)
    """What its images say. Of several labels `train_labels` are numbers of sets, and `num_classes` counts labels; of pixels it
    counts their classes."""

    @property
    def name(self) -> str:
        return self.card.name

    def metric(self, settings: Settings) -> str:
        """Of `transfer.metrics`."""
        return self.truth.metric(settings.metric, {"accuracy": METRIC}.get(self.card.metric, self.card.metric))

    @property
    def fewest(self) -> int:
        """Training images of the smallest class, or where an image has no class, of all of them."""
        if self.truth.kind != "one":
            return len(self.train_labels)
        return int(np.bincount(self.train_labels, minlength=self.num_classes).min())

    def held_out(self, settings: Settings, shots: int) -> int:
        """Images of each class that no support has. A method that chooses nothing leaves alone what its shots leave, and
        so it has the supports of the other methods wherever these can be drawn."""
        if isinstance(settings, RidgeSettings):
            return max(0, min(self.holdout_per_class, self.fewest - shots))
        return self.holdout_per_class

    def cannot(self, settings: Settings, shots: int) -> str | None:
        """Why this many shots (or the images of another split rule) cannot be drawn, or None."""
        if (reason := self.truth.cannot(settings, shots, self.metric(settings), self.name)) is not None:
            return reason
        fewest, held = self.fewest, self.held_out(settings, shots)
        if shots == VTAB_IMAGES:
            if self.val_split and (len(self.train_labels), self.num_val) == (800, 200):
                return None
            return f"{self.name} is not VTAB-1k's published 800 and 200 images; prepare a card vtab_... (transfer.protocol.vtab)"
        if shots == ALL_IMAGES and self.val_split:
            return None
        if shots == ALL_IMAGES:
            return None if fewest >= 2 else f"a class of {self.name} has {fewest} images, too few to hold one out"
        if fewest >= shots + held:
            return None
        return (
            f"{shots} shots and {held} held out need {shots + held} images of each class; the smallest class of {self.name} "
            f"has {fewest}"
        )

    def parts(self, settings: Settings, shots: int, seed: int) -> Parts:
        """The split rule of a protocol, resolved on this task."""
        num, train = len(self.train_labels), self.train_split
        if shots in (VTAB_IMAGES, ALL_IMAGES) and self.val_split:
            return Parts(
                Part(train, None, num),
                Part(self.val_split, None, self.num_val),
                Part(f"{train}+{self.val_split}", None, num + self.num_val),
            )
        if shots == ALL_IMAGES:
            first = Subset(per_class=0, holdout_share=settings.holdout_share)
            counts = np.bincount(self.truth.strata(self.train_labels))
            held = int(sum(max(1, round(int(c) * settings.holdout_share)) for c in counts if c))
            return Parts(
                Part(train, first, num - held),
                Part(train, replace(first, part="holdout"), held),
                Part(train, None, num),
            )
        held = self.held_out(settings, shots)
        support = Subset(per_class=shots, holdout_per_class=held)
        drawn = shots * self.num_classes
        return Parts(
            Part(train, support, drawn),
            Part(train, replace(support, part="holdout"), self.num_classes * held),
            Part(train, replace(support, seed=seed), drawn),
        )


def not_prepared(entry: TaskEntry, data_root: str) -> str | None:
    """Why there is nothing to measure yet, and what makes it; None where the dataset is there."""
    url = entry.place(data_root)
    if objects.exists(objects.join(url, manifest.NAME)):
        return None
    source = "" if load_card(entry.card).kind == "embedded" else " --source SOURCE"
    return f"not prepared; prepare it with: normfree data prepare {entry.card}{source} --out {url}"


def open_task(entry: TaskEntry, data_root: str) -> Task:
    """The dataset of a suite's task, `data_root`/<card> if it says nothing else. UserError: not prepared, or lacks a split."""
    card = entry.load_card()
    found = Manifest.open(entry.place(data_root))
    test = "test" if "test" in found.splits else "val"
    for split in (Task.train_split, test):
        if split not in found.splits:
            raise UserError(f"{found.url} has no split {split!r}; a task needs one to fit and one to test")
    val = "val" if test == "test" and "val" in found.splits else ""
    return Task(
        card=card,
        url=found.url,
        data_digest=found.digest,
        num_classes=len(found.outputs),
        truth=Truth.of_dataset(found),
        holdout_per_class=entry.holdout_per_class,
        train_labels=found.split(Task.train_split).label,
        _test_split=test,
        val_split=val,
        num_val=found.split(val).num_samples if val else 0,
        extra_tests=find_extra_test_sets(
            found,
            test,
            real_labels=entry.real_labels,
            v2=entry.v2,
            also=entry.also,
            corruptions=entry.corruptions,
            data_root=data_root,
        ),
    )


def task_protocol(task: Task, method: Method, search: dict[str, Any]) -> dict[str, Any]:
    """Everything that decides a number besides backbone, data bytes, shots and seed, in plain containers.

    Args:
        search: how candidates are drawn and stopped; {} where there is nothing to search.
    """
    rule, metric = method.settings.split, task.metric(method.settings)
    hidden = ("shots", "title", "split", "metric")  # each number of shots is a column of its own
    settings = {k: v for k, v in plain_settings(method.settings).items() if k not in hidden}
    extra_tests, truth = task.extra_tests.digests(), task.truth.text(method.settings)
    return {
        "version": 2,
        "task": task.name,
        "splits": {"fit": task.train_split, "test": task._test_split},
        "split_rule": [rule, SPLIT_RULES[rule]],
        "holdout": task.holdout_per_class if rule == "few_shot" else settings.pop("holdout_share"),
        "selection": f"highest {metric} on the held-out part" if search else "none",
        "search": search,
        "method": method.kind,
        "settings": settings,
        **({"families": families.plain()} if method.kind == "by_family" else {}),
        "head": HEADS.get(method.kind, "linear, zero init"),
        "preprocessing": {"from": "the backbone", "flip": task.card.flip},
        "metric": metric,
        **({"beside": extra_tests} if extra_tests else {}),
        **({"truth": truth} if truth else {}),
    }
