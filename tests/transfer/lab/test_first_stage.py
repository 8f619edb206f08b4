"""Trials that train another form of their network first, or on other data."""

from pathlib import Path
from typing import Any

import pytest

import pipeline.training.train as loop
from pipeline.errors import UserError
from pipeline.training.run import Run
from transfer.lab.build import sweep_of_experiment
from transfer.lab.experiment import Experiment
from transfer.sweep.cells import plan
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
