"""Suites that grow in their sweep's folder, and the form of a suite as JSON Schema."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from pipeline.errors import UserError
from pipeline.yaml_files.parse import parse_yaml
from transfer.protocol.suite_files import grown, list_suites, load_suite, refuse_tasks, suite_of, suites_dir
from transfer.protocol.suite_schema import schema
from transfer.protocol.tasks import Suite


def suite(tasks: list[Any] | None = None, name: str = "mine", **methods: Any) -> Suite:
    content = {"name": name, "tasks": tasks or ["digits"], "methods": methods or {"ridge": {"shots": [1, 5]}}}
    return suite_of(content, "here")


def test_a_suite_grows_by_shots_methods_and_tasks() -> None:
    first = suite()
    second = suite(["mnist", "digits"], ridge={"shots": [10, 1]}, knn={"split": "full"})
    both = grown(first, second, "out")
    assert [t.name for t in both.tasks] == ["digits", "mnist"] and [m.name for m in both.methods] == ["ridge", "knn"]
    assert both.method("ridge").settings.shots == (1, 5, 10)
    # What is asked for again, in parts or whole, is there already.
    assert grown(both, first, "out").digest() == grown(both, second, "out").digest() == both.digest()
    assert grown(first, replace(first, num_seeds=9), "out").num_seeds == 9


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (suite(name="other"), "another suite \\(mine\\), not of other"),
        (suite(ridge={"shots": [1], "l2": 2.0}), "its method ridge differs in l2 \\(1024.0 there, 2.0 now\\)"),
        (suite(ridge={"split": "full"}), "its method ridge differs in split"),
        (suite([{"card": "digits", "holdout_per_class": 3}]), "its task digits differs in holdout_per_class"),
    ],
)
def test_what_is_called_the_same_must_be_the_same(asked: Suite, words: str) -> None:
    with pytest.raises(UserError, match=words):
        grown(suite(), asked, "out")


def test_a_teacher_is_a_setting_that_a_sweeps_folder_keeps_and_that_does_not_change() -> None:
    recipe = {"learning_rates": [0.1], "epochs": [1], "shots": [5]}
    teacher = {"model": "trunk:resnet_v2_tiny", "options": {"method": "batch_norm", "widths": [8, 8]}, "epochs": 2}
    taught, plain = suite(finetune={**recipe, "teacher": teacher}), suite(finetune=recipe)
    jsonschema.validate(
        {"name": "mine", "tasks": ["digits"], "methods": {"finetune": {**recipe, "teacher": teacher}}}, schema()
    )
    assert suite_of(taught.plain(), "out").digest() == taught.digest() != plain.digest()
    with pytest.raises(UserError, match="its method finetune differs in teacher"):
        grown(plain, taught, "out")


def test_a_task_may_lie_elsewhere_and_be_called_otherwise() -> None:
    one = suite(
        [{"card": "images", "data": "cats", "label": "cats"}, {"card": "images", "data": "/d/dogs", "label": "dogs"}]
    )
    assert [t.name for t in one.tasks] == ["cats", "dogs"]
    assert [t.place("root") for t in one.tasks] == ["root/cats", "/d/dogs"]
    assert (one.tasks[0].load_card().name, one.tasks[0].load_card().title) == ("cats", "cats")
    moved = suite([{"card": "images", "data": "s3://b/cats", "label": "cats"}])
    assert moved.digest() == suite([{"card": "images", "data": "cats", "label": "cats"}]).digest()
    assert grown(one, moved, "out").tasks[0].data == "s3://b/cats"


def test_the_schema_takes_our_suites_and_names_what_is_wrong() -> None:
    form = schema()
    jsonschema.Draft202012Validator.check_schema(form)
    check = jsonschema.Draft202012Validator(form)
    for name in list_suites():
        assert not list(check.iter_errors(parse_yaml((suites_dir() / f"{name}.yaml").read_bytes(), name))), name
    good: dict[str, Any] = {
        "name": "a",
        "tasks": [{"card": "digits"}],
        "methods": {"mine": {"kind": "ridge", "shots": [1]}},
    }
    assert check.is_valid(good)
    for bad in (
        {**good, "tasks": []},
        {**good, "seeds": 3},
        {**good, "methods": {"mine": {"shots": [1]}}},
        {**good, "methods": {"ridge": {"shot": [1]}}},
        {**good, "tasks": [{"card": "digits", "holdout": 3}]},
    ):
        assert not check.is_valid(bad)


def test_what_no_dataset_gives_is_refused_with_the_line_of_the_suite(tmp_path: Path, digits: str) -> None:
    (tmp_path / "s.yaml").write_text("name: s\ntasks:\n- digits\nmethods:\n  segment: {split: full}\n")
    path, root = str(tmp_path / "s.yaml"), str(Path(digits).parent)
    with pytest.raises(
        UserError, match=rf"^{path}, line 5: the suite s has nothing .* digits has no masks.*leave the method"
    ):
        refuse_tasks(load_suite(path), root, path)
    with pytest.raises(
        UserError, match=rf"^{path}, line 3: .* digits: not prepared; prepare it with: normfree data prepare"
    ):
        refuse_tasks(load_suite(path), str(tmp_path), path)
    with pytest.raises(UserError, match=r"^the suite demo has nothing"):
        refuse_tasks(load_suite("demo"), str(tmp_path), "demo")
