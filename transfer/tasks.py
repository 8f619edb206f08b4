"""Suites, tasks and protocols: what is measured, said completely before anything is run.

A suite (YAML) lists tasks, which are dataset cards, and methods with their settings. A protocol is everything that
decides a number besides the weights that it starts from, the data's bytes, the shots and the seed; numbers with
different protocol digests do not belong into one table.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline import storage
from pipeline.config import to_dict
from pipeline.data.augment import AugmentConfig
from pipeline.data.cards import Card, load_card
from pipeline.data.manifest import Manifest
from pipeline.errors import UserError

Method = Literal["ridge", "finetune"]
Init = Literal["pretrained", "scratch"]
METHODS: tuple[Method, ...] = ("ridge", "finetune")
INITS: tuple[Init, ...] = ("pretrained", "scratch")
METRIC = "top1"
SUBSET_RULE = "pipeline.data.subset 1: per class, first images of a fixed permutation held out, supports from the rest"


@dataclass(frozen=True, kw_only=True)
class RidgeSettings:
    """Few-shot ridge on frozen features (`transfer.probes`)."""

    shots: tuple[int, ...]
    l2: float = 1024.0
    """Fixed: the published procedure does not tune it (facts 4.2)."""


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings:
    """Full fine-tuning (`transfer.finetune`); the search space is learning_rates x num_steps, equal for both inits."""

    shots: tuple[int, ...]
    learning_rates: tuple[float, ...]
    num_steps: tuple[int, ...]
    batch: int = 64
    """Images of an update, at most: a smaller support is one batch."""
    area_min: float = 0.5
    """Smallest share of a training image that the random crop keeps."""
    clipping: float = 0.02
    weight_decay: float = 0.0


@dataclass(frozen=True, kw_only=True)
class TaskEntry:
    card: str
    holdout_per_class: int


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Tasks x methods x shots, with a number of seeds."""

    name: str
    title: str
    tasks: tuple[TaskEntry, ...]
    ridge: RidgeSettings | None
    finetune: FinetuneSettings | None
    num_seeds: int

    def digest(self) -> str:
        """SHA-256 over what is measured; the number of seeds is left out, because a sweep may be extended by seeds."""
        content = {k: v for k, v in to_dict(self).items() if k not in ("num_seeds", "title")}
        return sha256(content)

    def settings(self, method: Method) -> RidgeSettings | FinetuneSettings:
        found = self.ridge if method == "ridge" else self.finetune
        if found is None:
            raise UserError(f"the suite {self.name} has no method {method}")
        return found

    @property
    def methods(self) -> tuple[Method, ...]:
        return tuple(m for m in METHODS if getattr(self, m) is not None)


@dataclass(frozen=True)
class Task:
    """A prepared dataset as a task. The name of its test split is `transfer.splits.open_test`'s to give."""

    card: Card
    url: str
    data_digest: str
    num_classes: int
    holdout_per_class: int
    train_labels: np.ndarray = field(repr=False, compare=False)
    """(num_samples,) int64, of the train split."""
    train_split: str = "train"
    _test_split: str = "val"

    @property
    def name(self) -> str:
        return self.card.name

    def cannot(self, shots: int) -> str | None:
        """Why this many shots cannot be drawn, or None."""
        counts = np.bincount(self.train_labels, minlength=self.num_classes)
        fewest = int(counts.min())
        if fewest >= shots + self.holdout_per_class:
            return None
        return (
            f"{shots} shots and {self.holdout_per_class} held out need {shots + self.holdout_per_class} images of each "
            f"class; the smallest class of {self.name} has {fewest}"
        )


def open_task(entry: TaskEntry, data_root: str) -> Task:
    """The dataset `data_root`/<card> as a task. UserError if it is not prepared or lacks a split."""
    card = load_card(entry.card)
    manifest = Manifest.open(storage.join(data_root, card.name))
    for split in (Task.train_split, Task._test_split):
        if split not in manifest.splits:
            raise UserError(f"{manifest.url} has no split {split!r}; a task needs one to fit and one to test")
    return Task(
        card=card,
        url=manifest.url,
        data_digest=manifest.digest,
        num_classes=len(manifest.classes),
        holdout_per_class=entry.holdout_per_class,
        train_labels=manifest.split(Task.train_split).label,
    )


def protocol(
    task: Task,
    method: Method,
    settings: RidgeSettings | FinetuneSettings,
    *,
    model: Mapping[str, Any],
    augment: AugmentConfig,
) -> dict[str, Any]:
    """Everything that decides a number besides init, data bytes, shots and seed, in plain containers.

    Args:
        model: name and options of the architecture.
        augment: the preprocessing, training and evaluation.
    """
    own = {k: v for k, v in to_dict(settings).items() if k != "shots"}  # each shot count is a column of its own
    return {
        "version": 1,
        "task": task.name,
        "splits": {"fit": task.train_split, "test": task._test_split},
        "subset": SUBSET_RULE,
        "holdout_per_class": task.holdout_per_class,
        "selection": "highest accuracy on the held-out part, support of seed 0" if method == "finetune" else "none",
        "method": method,
        "settings": own,
        "head": "ridge on pooled pre-logits, whitened by the support" if method == "ridge" else "linear, zero init",
        "model": dict(model),
        "preprocessing": to_dict(augment),
        "metric": METRIC,
    }


def sha256(content: Any) -> str:
    """Hex digest of the canonical JSON of plain containers."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


def suites_dir() -> Path:
    return Path(__file__).parent / "suites"


def list_suites() -> list[str]:
    return sorted(p.stem for p in suites_dir().glob("*.yaml"))


def load_suite(name_or_path: str) -> Suite:
    """The suite of that name, or of the YAML file at that path. UserError for unknown names, keys and wrong values."""
    import yaml

    if "/" in name_or_path or name_or_path.endswith((".yaml", ".yml")):
        path = name_or_path
        if not storage.is_file(path):
            raise UserError(f"no suite at {path}; give the path of a YAML suite or one of {', '.join(list_suites())}")
    elif name_or_path in list_suites():
        path = str(suites_dir() / f"{name_or_path}.yaml")
    else:
        raise UserError(f"no suite is called {name_or_path!r}; {_nearest(name_or_path, list_suites())}")
    try:
        content = yaml.safe_load(storage.read_bytes(path).decode())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"the suite {path} is not YAML: {' '.join(str(error).split())}") from None
    return _suite(content, f"the suite {path}")


def _nearest(word: str, known: Iterable[str]) -> str:
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(known)}"


def _check_keys(content: Any, where: str, required: set[str], optional: set[str] | None = None) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise UserError(f"{where} must be a mapping of field to value, not {content!r}")
    known = required | (optional or set())
    for key in content:
        if key not in known:
            raise UserError(f"{where} has an unknown field {key!r}; {_nearest(str(key), known)}")
    missing = sorted(required - set(content))
    if missing:
        raise UserError(f"{where} lacks {', '.join(missing)}; set it")
    return content


def _suite(content: Any, where: str) -> Suite:
    content = _check_keys(content, where, {"name", "tasks", "methods"}, {"title", "num_seeds", "holdout_per_class"})
    holdout = _whole(content.get("holdout_per_class", 10), f"{where}: holdout_per_class")
    if not isinstance(content["tasks"], list) or not content["tasks"]:
        raise UserError(f"{where}: tasks must be a list of card names")
    entries = []
    for task in content["tasks"]:
        if isinstance(task, dict):
            task = _check_keys(task, f"{where}: tasks", {"card"}, {"holdout_per_class"})
        else:
            task = {"card": str(task)}
        card = load_card(str(task["card"]))  # unknown names are refused now, with the nearest ones
        own = _whole(task.get("holdout_per_class", holdout), f"{where}: holdout_per_class of {card.name}")
        entries.append(TaskEntry(card=str(task["card"]), holdout_per_class=own))
    methods = _check_keys(content["methods"], f"{where}: methods", set(), set(METHODS))
    if not methods:
        raise UserError(f"{where}: methods is empty; choose from {', '.join(METHODS)}")
    ridge, finetune = methods.get("ridge"), methods.get("finetune")
    return Suite(
        name=str(content["name"]),
        title=str(content.get("title", content["name"])),
        tasks=tuple(entries),
        ridge=None if ridge is None else _settings(RidgeSettings, ridge, f"{where}: ridge"),
        finetune=None if finetune is None else _settings(FinetuneSettings, finetune, f"{where}: finetune"),
        num_seeds=_whole(content.get("num_seeds", 3), f"{where}: num_seeds"),
    )


def _settings(kind: type[Any], content: Any, where: str) -> Any:
    fields = {f.name: f for f in dataclasses.fields(kind)}
    required = {n for n, f in fields.items() if f.default is dataclasses.MISSING}
    content = _check_keys(content, where, required, set(fields) - required)
    values: dict[str, Any] = {}
    for key, value in content.items():
        place = f"{where}: {key}"
        if key in ("shots", "num_steps", "learning_rates"):
            if not isinstance(value, list) or not value or len(set(value)) != len(value):
                raise UserError(f"{place} is {value!r}; give a list of different numbers")
            one = _number if key == "learning_rates" else _whole
            values[key] = tuple(sorted(one(v, place) for v in value))
        else:
            values[key] = _whole(value, place) if key == "batch" else _number(value, place, zero=True)
    return kind(**values)


def _whole(value: Any, where: str) -> int:
    if type(value) is not int or value < 1:
        raise UserError(f"{where} is {value!r}; set a whole number of 1 or more")
    return value


def _number(value: Any, where: str, *, zero: bool = False) -> float:
    # YAML reads 1e-5 as text: only 1.0e-5 is a number to it.
    try:
        number = float(value) if not isinstance(value, bool) else -1.0
    except (TypeError, ValueError):
        number = -1.0
    if not 0 <= number < float("inf") or (number == 0 and not zero):
        raise UserError(f"{where} is {value!r}; set a positive number")
    return number
