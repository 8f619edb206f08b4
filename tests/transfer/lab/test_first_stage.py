"""Trials that train another form of their network first, or on other data, or a teacher."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import pipeline.training.train as loop
from pipeline.errors import UserError
from pipeline.training.run import Run
from transfer.lab.build import sweep_of_experiment
from transfer.lab.experiment import Experiment
from transfer.protocol.method_settings import TeacherStage
from transfer.protocol.methods import sha256
from transfer.sweep.cells import plan
from transfer.sweep.failures import TrialFailed
from transfer.sweep.sources import FirstStage
from transfer.sweep.trials import run_finetune

ASKED: dict[str, Any] = {
    "name": "two steps",
    "methods": ("group_norm",),
    "trunk": "reactnet_tiny",
    "trunk_options": {"binary_weights": True},
    "epochs": 1.0,
    "shots": 2,
    "batches": (16,),
    "image_px": 16,
    "weight_decay": 0.0,
}


@pytest.mark.parametrize("card", ["", "digits"])
def test_the_trial_starts_from_what_was_trained_first_and_held_out_images_are_not_seen(
    card: str, digits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = FirstStage(
        card=card, epochs=0.5 if not card else 0.02, options={"binary_weights": False}, weight_decay=0.25
    )
    sweep, _ = sweep_of_experiment(Experiment(**ASKED, first=first), data=digits, out=str(tmp_path))
    (cell,) = plan(sweep)[0]
    cell.select(sweep.out, dict(cell.points[0]), [], "one point")
    runs: list[tuple[Run, str]] = []
    real = loop.train

    def train(run: Run, out: str, **options: Any) -> Any:
        runs.append((run, out))
        return real(run, out, **options)

    monkeypatch.setattr(loop, "train", train)
    found = run_finetune(sweep, cell.finals(dict(cell.points[0]), 1)[0], lambda row: None)
    assert found is not None and found.is_ok
    (before, place), (run, _) = runs
    assert before.model.options["binary_weights"] is False and run.model.options["binary_weights"] is True
    assert (before.optim.weight_decay, run.optim.weight_decay) == (0.25, 0.0)
    assert before.data.eval_split is None and before.data.subset == (None if card else run.data.subset)
    assert before.model.init_from is None and run.model.init_from == place and run.model.new_head == bool(card)
    assert not list((tmp_path / "work").iterdir())


def test_a_first_stage_is_another_source_and_its_data_are_looked_for_before_anything_trains(
    digits: str, tmp_path: Path
) -> None:
    with_it = Experiment(**ASKED, first=FirstStage(epochs=1.0))
    digests = {
        sweep_of_experiment(e, data=digits, out=str(tmp_path))[0].source.backbone_digest
        for e in (Experiment(**ASKED), with_it)
    }
    assert len(digests) == 2
    with pytest.raises(UserError, match=r"experiment two steps trains on .*/absent first, which cannot be had"):
        sweep_of_experiment(
            Experiment(**ASKED, first=FirstStage(card="absent", epochs=1.0)), data=digits, out=str(tmp_path)
        )
    with pytest.raises(UserError, match="no 'binary_weight'"):
        sweep_of_experiment(
            Experiment(**ASKED, first=FirstStage(epochs=1.0, options={"binary_weight": False})),
            data=digits,
            out=str(tmp_path),
        )


TAUGHT: dict[str, Any] = {
    **ASKED,
    "methods": ("group_norm", "group_norm:taught=true"),
    "teacher": TeacherStage(
        model="trunk:resnet_v2_tiny", options={"method": "batch_norm", "widths": (8, 8, 8)}, epochs=0.5
    ),
}


@pytest.mark.parametrize("card", ["", "digits"])
def test_a_teacher_is_trained_before_and_teaches_every_stage_on_the_trials_own_images(
    card: str, digits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Experiment(**TAUGHT, first=FirstStage(card=card, epochs=0.02 if card else 0.5))
    sweep, lines = sweep_of_experiment(asked, data=digits, out=str(tmp_path))
    assert [line.shown for line in lines] == ["group_norm", "group_norm taught True"]
    taught = plan(sweep)[0][1]
    taught.select(sweep.out, dict(taught.points[0]), [], "one point")
    runs: list[tuple[Run, str, str]] = []
    real = loop.train

    def train(run: Run, out: str, **options: Any) -> Any:
        runs.append((run, out, options["teacher"]))
        return real(run, out, **options)

    monkeypatch.setattr(loop, "train", train)
    found = run_finetune(sweep, taught.finals(dict(taught.points[0]), 1)[0], lambda row: None)
    assert found is not None and found.is_ok
    (teacher, place, no_teacher), (_, _, of_first), (run, _, of_trial) = runs
    assert (no_teacher, of_first, of_trial) == ("", "" if card else place, place)
    assert (teacher.data.subset, teacher.data.eval_split) == (run.data.subset, None)
    assert (teacher.model.name, teacher.model.init_from) == ("trunk:resnet_v2_tiny", None)
    assert not list((tmp_path / "work").iterdir())


def test_a_teacher_is_another_measurement_of_its_own_lines_alone(digits: str, tmp_path: Path) -> None:
    longer = replace(TAUGHT["teacher"], epochs=2.0)
    before, first, other = (
        {
            cell.method: cell.any_trial.digest
            for cell in plan(sweep_of_experiment(e, data=digits, out=str(tmp_path))[0])[0]
        }
        for e in (
            Experiment(**{**TAUGHT, "methods": ("group_norm",), "teacher": None}),
            Experiment(**TAUGHT),
            Experiment(**{**TAUGHT, "teacher": longer}),
        )
    )
    ((name, digest),) = before.items()
    assert first.pop(name) == other.pop(name) == digest
    assert len({*first.values(), *other.values()}) == 2
    method = sweep_of_experiment(Experiment(**ASKED), data=digits, out=str(tmp_path))[0].suite.methods[0]
    assert (
        sha256(method.plain()) == "b420a9ee1c1552adc19bc9703ebd8410811059cab99fd6d61477b90be2abc768"
    )  # as before there were teachers


def test_a_teacher_that_cannot_be_is_refused_before_anything_trains(digits: str, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="group_norm:taught=true is taught, and the experiment has no teacher; give it one"
    ):
        Experiment(**{**TAUGHT, "teacher": None})
    with pytest.raises(UserError, match="no 'groups' with the method batch_norm"):
        TeacherStage(model="trunk:resnet_v2_tiny", options={"groups": 4}, epochs=1.0)
    with pytest.raises(UserError, match="the teacher at batch 1: batch_norm: statistics over one sample"):
        asked = Experiment(**{**TAUGHT, "batches": (1,)})
        sweep_of_experiment(asked, data=digits, out=str(tmp_path))


def test_a_teacher_that_diverges_is_no_result_of_its_trial(digits: str, tmp_path: Path) -> None:
    wild = replace(TAUGHT["teacher"], learning_rate=1e30, epochs=4.0)
    sweep, _ = sweep_of_experiment(Experiment(**{**TAUGHT, "teacher": wild}), data=digits, out=str(tmp_path))
    cell = plan(sweep)[0][1]
    cell.select(sweep.out, dict(cell.points[0]), [], "one point")
    with pytest.raises(TrialFailed, match=r"the teacher diverged .*; lower teacher\.learning_rate") as failed:
        run_finetune(sweep, cell.finals(dict(cell.points[0]), 1)[0], lambda row: None)
    assert failed.value.cause == "error"
