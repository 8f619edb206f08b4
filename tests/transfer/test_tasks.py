"""Suites are strict, protocols have digests that every deciding field changes."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.augment import AugmentConfig
from pipeline.data.cards import load_card
from pipeline.data.subset import Subset, select
from pipeline.errors import UserError
from transfer.tasks import (
    FinetuneSettings,
    RidgeSettings,
    Task,
    TaskEntry,
    list_suites,
    load_suite,
    open_task,
    protocol,
    sha256,
)

SUITE = """
name: mine
tasks: [digits, {card: omniglot, holdout_per_class: 2}]
num_seeds: 4
methods:
  ridge: {shots: [5, 1]}
"""


def write(tmp_path: Path, text: str) -> str:
    (tmp_path / "suite.yaml").write_text(text)
    return str(tmp_path / "suite.yaml")


def test_every_suite_loads_and_searches_the_same_space_for_all_its_tasks() -> None:
    assert {"demo", "small_images"} <= set(list_suites())
    for name in list_suites():
        suite = load_suite(name)
        assert suite.name == name and suite.num_seeds >= 3 and suite.methods == ("ridge", "finetune")


def test_a_suite_of_ones_own(tmp_path: Path) -> None:
    suite = load_suite(write(tmp_path, SUITE))
    assert suite.tasks[0] == TaskEntry(card="digits", holdout_per_class=10)
    assert suite.tasks[1].holdout_per_class == 2
    assert suite.ridge == RidgeSettings(shots=(1, 5), l2=1024.0) and suite.finetune is None


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("num_seeds", "num_seds", "did you mean 'num_seeds'"),
        ("digits,", "digitz,", "digits"),
        ("ridge:", "rigde:", "did you mean 'ridge'"),
        ("shots: [5, 1]", "shots: [5, 1], l3: 2", "did you mean 'l2'"),
        ("[5, 1]", "[5, 5]", "different numbers"),
        ("[5, 1]", "[0]", "whole number"),
        ("num_seeds: 4", "num_seeds: 0", "whole number"),
        ("tasks: [digits", "task: [digits", "did you mean 'tasks'"),
    ],
)
def test_what_a_suite_gets_wrong_is_named(old: str, new: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        load_suite(write(tmp_path, SUITE.replace(old, new)))


def test_an_unknown_suite_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'small_images'"):
        load_suite("small_image")


def test_seeds_extend_a_sweep_and_everything_else_makes_another(tmp_path: Path) -> None:
    digest = load_suite(write(tmp_path, SUITE)).digest()
    assert load_suite(write(tmp_path, SUITE.replace("num_seeds: 4", "num_seeds: 9"))).digest() == digest
    for old, new in (("[5, 1]", "[5]"), ("per_class: 2", "per_class: 3"), ("digits, ", "")):
        assert load_suite(write(tmp_path, SUITE.replace(old, new))).digest() != digest


def make_task(**changes: object) -> Task:
    labels = np.repeat(np.arange(3), [8, 12, 9])
    task = Task(load_card("digits"), "nowhere", "d" * 64, 3, 4, labels)
    return dataclasses.replace(task, **changes)  # type: ignore[arg-type]


def test_shots_that_the_smallest_class_cannot_give_have_a_reason() -> None:
    task = make_task()
    assert task.cannot(4) is None
    reason = task.cannot(5)
    assert reason is not None and "need 9 images" in reason and "has 8" in reason
    with pytest.raises(UserError):
        select(task.train_labels, Subset(per_class=5, holdout_per_class=4))


def test_every_deciding_field_changes_the_protocol() -> None:
    settings = FinetuneSettings(shots=(1, 5), learning_rates=(0.1, 0.4), num_steps=(20,))
    model, augment = {"name": "nfnet_tiny", "options": {}}, AugmentConfig()

    def digest(
        task: Task = make_task(),  # noqa: B008
        settings: FinetuneSettings = settings,
        model: dict[str, object] = model,
        augment: AugmentConfig = augment,
    ) -> str:
        return sha256(protocol(task, "finetune", settings, model=model, augment=augment))

    others = [
        digest(make_task(holdout_per_class=3)),
        digest(make_task(_test_split="test")),
        digest(settings=dataclasses.replace(settings, learning_rates=(0.1,))),
        digest(settings=dataclasses.replace(settings, num_steps=(30,))),
        digest(settings=dataclasses.replace(settings, batch=16)),
        digest(settings=dataclasses.replace(settings, area_min=0.9)),
        digest(settings=dataclasses.replace(settings, clipping=0.1)),
        digest(model={"name": "nfnet_f0", "options": {}}),
        digest(model={"name": "nfnet_tiny", "options": {"activation": "relu"}}),
        digest(augment=AugmentConfig(image_px=64)),
        digest(augment=AugmentConfig(eval_resize="aspect")),
        digest(augment=AugmentConfig(flip=False)),
        sha256(protocol(make_task(), "ridge", RidgeSettings(shots=(1,)), model=model, augment=augment)),
    ]
    assert len({digest(), *others}) == len(others) + 1
    # Shots are columns of one table.
    assert digest(settings=dataclasses.replace(settings, shots=(1,))) == digest()


def test_a_task_is_a_prepared_dataset(digits: str, tmp_path: Path) -> None:
    root = str(Path(digits).parent)
    task = open_task(TaskEntry(card="digits", holdout_per_class=10), root)
    assert (task.name, task.num_classes, len(task.train_labels)) == ("digits", 10, 1100)
    with pytest.raises(UserError, match="normfree data prepare"):
        open_task(TaskEntry(card="digits", holdout_per_class=10), str(tmp_path))
