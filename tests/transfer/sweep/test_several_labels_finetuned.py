"""Fine-tuning on several labels an image: a loss of each by itself, and the numbers of what is kept."""

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import log_loss

from pipeline.errors import UserError
from pipeline.training.check_run import check_run
from tests.transfer import recompute
from tests.transfer.sweep.test_finetune import SOURCE
from transfer.measurement import predictions
from transfer.protocol.method_settings import FinetuneSettings
from transfer.protocol.methods import Method
from transfer.protocol.tasks import Suite, TaskEntry
from transfer.sweep.cells import Sweep, plan
from transfer.sweep.finetune import finetune_run
from transfer.sweep.trials import run_finetune

SETTINGS = FinetuneSettings(split="full", learning_rates=(0.1,), num_steps=(3,), batch=16)
METHOD = Method(name="finetune", kind="finetune", settings=SETTINGS)


def test_a_final_trial_trains_binary_and_is_measured_by_what_it_keeps(glyph_sets: str, tmp_path: Path) -> None:
    entry = TaskEntry(card="glyph_sets", holdout_per_class=1)
    suite = Suite(name="s", title="s", tasks=(entry,), methods=(METHOD,), num_seeds=1)
    root = str(Path(glyph_sets).parent)
    sweep = Sweep(out=str(tmp_path), data_root=root, sources=(SOURCE,), suite=suite)
    (cell,) = (c for c in plan(sweep)[0] if c.init == "scratch")
    cell.select(sweep.out, dict(cell.points[0]), [])
    (trial,) = cell.finals(dict(cell.points[0]), 1)
    found = run_finetune(sweep, trial, print)
    assert found is not None and found.is_ok and found.config["optim"]["loss"] == "binary" and found.num_train == 700
    kept = predictions.read(sweep.out, trial.digest)
    labels = np.unique(kept["truth"].sum(1))
    assert kept["scores"].shape == kept["truth"].shape == (300, 10) and labels.tolist() == [0, 1, 2, 3]
    assert found.metrics["map"] == pytest.approx(recompute.average_precision(kept["scores"], kept["truth"]), abs=1e-12)
    assert found.metrics["auroc"] == pytest.approx(recompute.auroc_of_labels(kept["scores"], kept["truth"]), abs=1e-12)
    # After three steps from a zero head: near ln 2, and the loss of the history is that of each label by itself.
    assert 0.2 < found.history[-1]["loss"] < 0.8
    assert log_loss(kept["truth"].ravel(), 1 / (1 + np.exp(-kept["scores"].ravel()))) < 0.7


def test_a_softmax_over_several_labels_is_refused_before_it_starts(glyph_sets: str, tmp_path: Path) -> None:
    from dataclasses import replace

    entry = TaskEntry(card="glyph_sets", holdout_per_class=1)
    suite = Suite(name="s", title="s", tasks=(entry,), methods=(METHOD,), num_seeds=1)
    sweep = Sweep(out=str(tmp_path), data_root=str(Path(glyph_sets).parent), sources=(SOURCE,), suite=suite)
    run = finetune_run(
        SOURCE,
        sweep.task("glyph_sets"),
        METHOD,
        init="scratch",
        shots=0,
        seed=0,
        hyperparameters={"learning_rate": 0.1, "num_steps": 20},
        test=None,
    )
    check_run(run)
    with pytest.raises(UserError, match="several labels; set it to binary"):
        check_run(replace(run, optim=replace(run.optim, loss="softmax")))
