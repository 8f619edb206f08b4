"""Suites are strict, protocols have digests that every deciding field changes."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.sampling.subset import Subset, select
from pipeline.data.sources.cards import load_card
from pipeline.errors import UserError
from transfer.protocol.method_settings import (
    ALL_IMAGES,
    VTAB_IMAGES,
    FinetuneSettings,
    HyperruleSettings,
    KnnSettings,
    RidgeSettings,
    TeacherStage,
)
from transfer.protocol.methods import METHOD_KINDS, Method, as_before, parse_methods, sha256
from transfer.protocol.suite_files import list_suites, load_suite, suite_of
from transfer.protocol.tasks import Task, TaskEntry, open_task, task_protocol

KNN = KnnSettings(shots=(1,))
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
        assert suite.name == name and suite.num_seeds >= 3
        assert suite_of(suite.plain(), "x") == suite
    assert [m.name for m in load_suite("demo").methods] == ["ridge", "finetune"]


def test_a_suite_of_ones_own(tmp_path: Path) -> None:
    suite = load_suite(write(tmp_path, SUITE))
    assert suite.tasks[0] == TaskEntry(card="digits", holdout_per_class=10)
    assert suite.tasks[1].holdout_per_class == 2
    assert suite.methods == (Method(name="ridge", kind="ridge", settings=RidgeSettings(shots=(1, 5), l2=1024.0)),)


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
    assert task.cannot(KNN, 4) is None
    reason = task.cannot(KNN, 5)
    assert reason is not None and "need 9 images" in reason and "has 8" in reason
    with pytest.raises(UserError):
        select(task.train_labels, Subset(per_class=5, holdout_per_class=4))


def test_ridge_chooses_nothing_and_so_holds_out_what_its_shots_leave() -> None:
    task, ridge = make_task(), RidgeSettings(shots=(1, 5, 8))  # 8 images in the smallest class, 4 to hold out
    for shots, held in ((1, 4), (4, 4), (5, 3), (8, 0)):
        assert task.cannot(ridge, shots) is None and task.held_out(ridge, shots) == held
        found = task.parts(ridge, shots, 0)
        support = select(task.train_labels, found.final.subset)  # type: ignore[arg-type]
        assert len(support) == found.final.num and found.holdout.num == held * task.num_classes
        if held == 4:  # where both fit, its images are those of the methods that choose
            assert found == task.parts(KNN, shots, 0)
    assert "need 9 images" in str(task.cannot(ridge, 9))


def method(kind: str = "finetune", **settings: Any) -> Method:
    settings = {"shots": (1, 5), **settings} if "split" not in settings else settings
    if kind == "finetune":
        settings = {"learning_rates": (0.1, 0.4), "num_steps": (20,), **settings}
    return Method(name=kind, kind=kind, settings=METHOD_KINDS[kind][0](**settings))


def other_value(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, tuple):
        return (*value, 7)
    if isinstance(value, float):
        return value / 2 or 0.5
    return (
        {"paper": "code", "agc": "norm", "sgd": "adamw", "local": "frozen"}.get(value, "top5")
        if isinstance(value, str)
        else value + 1
    )


def digest_of(task: Task, method: Method, search: dict[str, Any] | None = None) -> str:
    return sha256(task_protocol(task, method, search or {}))


@pytest.mark.parametrize("kind", METHOD_KINDS)
def test_every_deciding_field_of_every_method_changes_the_protocol(kind: str) -> None:
    settings, preset = METHOD_KINDS[kind][0], METHOD_KINDS[kind][2]
    if settings is FinetuneSettings and not preset:
        preset = {"learning_rates": (0.1, 0.4), "num_steps": (20,)}
    few: Any = settings(**{**preset, "shots": (1, 5)})
    base = Method(name=kind, kind=kind, settings=few)
    digests = [digest_of(make_task(), base)]
    skipped = {
        "shots",
        "title",
        "split",
        "holdout_share",
        "search",
    }  # tests/transfer/search/test_optuna_search.py has the last
    for field in dataclasses.fields(settings):
        if field.name in skipped or (field.name in ("epochs", "num_steps") and not getattr(few, field.name)):
            continue
        odd = {"unclipped": ("stem",), "width": 128, "teacher": TeacherStage(model="nfnet_tiny", epochs=1.0)}
        value = odd.get(field.name) or other_value(getattr(few, field.name))
        changed = dataclasses.replace(few, **{field.name: value})
        digests.append(digest_of(make_task(), dataclasses.replace(base, settings=changed)))
    for split in ("full", "vtab1k"):
        whole: Any = settings(**{**preset, "split": split})
        digests.append(digest_of(make_task(), dataclasses.replace(base, settings=whole)))
    share: Any = settings(**{**preset, "split": "full", "holdout_share": 0.3})
    digests.append(digest_of(make_task(), dataclasses.replace(base, settings=share)))
    digests += [
        digest_of(make_task(holdout_per_class=3), base),
        digest_of(make_task(_test_split="test"), base),
        digest_of(make_task(card=dataclasses.replace(load_card("digits"), flip=True)), base),
        digest_of(make_task(), base, {"scheduler": "none"}),
    ]
    assert len(set(digests)) == len(digests)
    # Shots are columns of one table, and titles are for people.
    for field, value in (("shots", (1,)), ("title", "other")):
        same = dataclasses.replace(base, settings=dataclasses.replace(few, **{field: value}))
        assert digest_of(make_task(), same) == digests[0]


def test_methods_of_different_kinds_have_different_protocols_and_equal_ones_equal() -> None:
    stated = {kind: {"shots": [5]} for kind in METHOD_KINDS}
    stated["finetune"] |= {"learning_rates": [0.1], "num_steps": [10]}  # type: ignore[dict-item]
    methods, again = parse_methods(stated, "x"), parse_methods(stated, "x")
    digests = [digest_of(make_task(), m) for m in methods]
    assert len(set(digests)) == len(METHOD_KINDS) and digests == [digest_of(make_task(), m) for m in again]
    renamed = parse_methods({"mine": {"kind": "ridge", "shots": [5]}}, "x")[0]
    assert digest_of(make_task(), renamed) == digests[0]  # a name is not part of a protocol


def test_protocols_from_before_families_have_the_digest_that_they_had() -> None:
    """Written down by the code of 2026-11-29, revision 1913a00."""
    stated = {
        "hyperrule": ({"nesterov": True}, "f641fc566334"),
        "finetune": ({"learning_rates": [0.1], "num_steps": [10]}, "d298160c8aeb"),
        "nfnet": ({}, "f23beb41f159"),
        "nfnet_plain": ({}, "67029c4b49ec"),
        "convnets_at_scale": ({}, "8b7f14253859"),
        "ridge": ({}, "62d0b52811ba"),
        "knn": ({}, "36956742d97d"),
        "linear": ({}, "ee157bbb5ac3"),
        "logistic": ({}, "91e73bd6e7d9"),
    }
    for kind, (settings, digest) in stated.items():
        method = parse_methods({kind: {"shots": [5], "convert_icc": True, **settings}}, "x")[0]
        assert digest_of(make_task(), method)[:12] == digest


def test_a_sweep_from_before_goes_on_as_it_began_and_papers_methods_ignore_profiles() -> None:
    kept = {"ridge": {"kind": "ridge", "shots": [5]}, "hyperrule": {"kind": "hyperrule", "shots": [5]}}
    before = as_before({"name": "s", "methods": kept})["methods"]
    ridge, rule = parse_methods(before, "x")
    assert ridge.settings.convert_icc and rule.settings.convert_icc and rule.settings.nesterov  # type: ignore[attr-defined]
    stated = {kind: {"shots": [5]} for kind in METHOD_KINDS} | {
        "finetune": {"shots": [5], "learning_rates": [0.1], "num_steps": [1]}
    }
    converting = [m.kind for m in parse_methods(stated, "x") if m.settings.convert_icc]
    assert converting == ["finetune"]
    now = parse_methods({"ridge": {"shots": [5]}}, "x")[0]
    assert task_protocol(make_task(), now, {})["settings"]["convert_icc"] is False  # and the protocol says so


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("knm", {"shots": [5]}, "did you mean 'knn'"),
        ("knn", {"shots": [5], "k": [3]}, "did you mean 'ks'"),
        ("knn", {"split": "full", "shots": [5]}, "split rule few_shot"),
        ("linear", {"split": "vtab"}, "did you mean 'vtab1k'"),
        ("finetune", {"shots": [5], "learning_rates": [0.1]}, "num_steps or epochs"),
        ("hyperrule", {"shots": [5], "variant": "codes"}, "did you mean 'code'"),
        ("hyperrule", {"shots": [5], "resize": "no"}, "true or false"),
    ],
)
def test_what_a_method_gets_wrong_is_named(kind: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_methods({kind: settings}, "the suite")


def test_a_stated_budget_takes_the_place_of_a_recipes() -> None:
    found = parse_methods({"nfnet": {"shots": [5], "epochs": [3]}}, "x")[0].settings
    assert (
        isinstance(found, FinetuneSettings)
        and found.epochs == (3.0,)
        and found.num_steps == ()
        and found.sam_rho == 0.05
    )
    rule = parse_methods({"hyperrule": {"shots": [5]}}, "x")[0].settings
    assert isinstance(rule, HyperruleSettings) and rule.variant == "paper"


def test_all_images_are_split_by_class_and_fitted_together_again() -> None:
    task, settings = make_task(), method(split="full", holdout_share=0.25).settings
    parts = task.parts(settings, ALL_IMAGES, 0)
    first, held = (select(task.train_labels, p.subset) for p in (parts.search, parts.holdout) if p.subset)
    assert sorted([*first, *held]) == list(range(29)) and not set(first) & set(held)
    assert np.bincount(task.train_labels[held]).tolist() == [2, 3, 2]
    assert (parts.search.num, parts.holdout.num, parts.final.num) == (
        len(first),
        len(held),
        29,
    ) and parts.final.subset is None
    # With an official val split that one decides, and is fitted too.
    parts = make_task(val_split="val", num_val=6, _test_split="test").parts(settings, ALL_IMAGES, 0)
    assert [(p.split, p.num) for p in (parts.search, parts.holdout, parts.final)] == [
        ("train", 29),
        ("val", 6),
        ("train+val", 35),
    ]


def test_vtab_selects_on_200_fits_1000_and_takes_the_published_lists_only() -> None:
    labels = np.repeat(np.arange(2), 400)
    task = make_task(train_labels=labels, num_classes=2, val_split="val", num_val=200, _test_split="test")
    assert task.cannot(KNN, VTAB_IMAGES) is None
    parts = task.parts(method(split="vtab1k").settings, VTAB_IMAGES, 0)
    assert [(p.split, p.num, p.subset) for p in (parts.search, parts.holdout, parts.final)] == [
        ("train", 800, None),
        ("val", 200, None),
        ("train+val", 1000, None),
    ]
    assert "published" in str(make_task().cannot(KNN, VTAB_IMAGES))


def test_a_task_is_a_prepared_dataset(digits: str, tmp_path: Path) -> None:
    root = str(Path(digits).parent)
    task = open_task(TaskEntry(card="digits", holdout_per_class=10), root)
    assert (task.name, task.num_classes, len(task.train_labels)) == ("digits", 10, 1100)
    with pytest.raises(UserError, match="normfree data prepare"):
        open_task(TaskEntry(card="digits", holdout_per_class=10), str(tmp_path))
