"""Fine-tuning and its from-scratch twin: equal budget, a zero head, supports that never meet the held-out part."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.backbone import ModelConfig, build_model
from pipeline.config import Run, to_dict
from pipeline.data.augment import AugmentConfig
from pipeline.data.subset import select
from pipeline.errors import UserError
from transfer.cells import Sweep, plan
from transfer.finetune import Source, finetune_run
from transfer.ledger import Ledger
from transfer.spaces import candidates, grace_steps
from transfer.tasks import FinetuneSettings, Suite, Task, TaskEntry
from transfer.trials import run_finetune

SETTINGS = FinetuneSettings(shots=(1, 5), learning_rates=(0.1, 0.4), num_steps=(2, 4), batch=16)
SOURCE = Source(
    checkpoint_url="nowhere",
    digest="c" * 64,
    model="nfnet_tiny",
    options={"drop_rate": 0.2, "stochastic_depth": 0.1, "activation": "relu"},
    augment=AugmentConfig(image_px=16, crop="pad", flip=True, mean=(0.1, 0.1, 0.1)),
)


@pytest.fixture()
def sweep(digits: str, tmp_path: Path) -> Sweep:
    entry = TaskEntry(card="digits", holdout_per_class=3)
    suite = Suite(name="s", title="s", tasks=(entry,), ridge=None, finetune=SETTINGS, num_seeds=2)
    return Sweep(out=str(tmp_path), data_root=str(Path(digits).parent), source=SOURCE, suite=suite)


def make(task: Task, **changes: Any) -> Run:
    options: dict[str, Any] = {"init": "scratch", "shots": 5, "seed": 1, "selection_url": None}
    options["hyperparameters"] = {"learning_rate": 0.4, "num_steps": 4}
    return finetune_run(SOURCE, task, SETTINGS, **{**options, **changes})


def test_the_twins_differ_in_where_the_weights_come_from_and_in_nothing_else(sweep: Sweep) -> None:
    task = sweep.task("digits")
    pretrained, scratch = to_dict(make(task, init="pretrained")), to_dict(make(task))
    assert pretrained["model"].pop("init_from") == "nowhere" and scratch["model"].pop("init_from") is None
    pretrained["name"] = scratch["name"] = ""
    assert pretrained == scratch


def test_the_run_takes_resolution_from_pretraining_and_mirroring_from_the_task(sweep: Sweep) -> None:
    run = make(sweep.task("digits"))
    assert (run.augment.image_px, run.augment.mean) == (16, (0.1, 0.1, 0.1))
    assert run.augment.crop == "area" and not run.augment.flip  # a mirrored digit is no digit
    assert run.model.options == {"activation": "relu", "head_init": "zero"}
    assert run.global_batch == 16 and make(sweep.task("digits"), shots=1).global_batch == 10
    assert not run.save_final and run.save_every is None


def test_the_head_starts_at_zero(sweep: Sweep) -> None:
    config: ModelConfig = make(sweep.task("digits")).model
    model, _ = build_model(config, 10, seed=0)
    assert not any(p.any() for p in model.head.parameters())  # type: ignore[union-attr]


def test_supports_never_meet_the_held_out_part(sweep: Sweep) -> None:
    task = sweep.task("digits")
    search = make(task, seed=0)
    assert search.data.eval_split == "train" and search.data.eval_subset is not None
    held_out = set(select(task.train_labels, search.data.eval_subset))
    assert len(held_out) == 30
    for seed in range(5):
        run = make(task, seed=seed)
        assert run.data.subset is not None
        support = select(task.train_labels, run.data.subset)
        assert len(support) == 50 and not held_out & set(support)
        np.testing.assert_array_equal(np.bincount(task.train_labels[support]), 5)


def test_a_final_trial_needs_the_selection_record_and_its_choice(sweep: Sweep) -> None:
    task = sweep.task("digits")
    cell = next(c for c in plan(sweep)[0] if c.init == "scratch" and c.shots == 5)
    url = cell.selection_url(sweep.out)
    with pytest.raises(UserError, match="stays closed"):
        make(task, selection_url=url)
    cell.select(sweep.out, {"learning_rate": 0.4, "num_steps": 4}, [])
    run = make(task, selection_url=url)
    assert run.data.eval_split == "val" and run.data.eval_subset is None and run.eval_every is None
    with pytest.raises(ValueError, match="chose"):
        make(task, selection_url=url, hyperparameters={"learning_rate": 0.1, "num_steps": 4})


def test_the_head_is_new_even_where_the_old_one_would_fit(sweep: Sweep) -> None:
    assert make(sweep.task("digits")).model.new_head


def test_both_inits_search_one_space() -> None:
    assert len(candidates(SETTINGS)) == 4 and grace_steps(SETTINGS) == 1
    assert candidates(SETTINGS)[0]["num_steps"] == 4


def test_a_search_trial_reports_all_but_its_end_and_repeats_itself(sweep: Sweep) -> None:
    cell = next(c for c in plan(sweep)[0] if c.init == "scratch" and c.shots == 1)
    trial = next(t for t in cell.search if t.hyperparameters["num_steps"] == 2)
    reported: list[dict[str, Any]] = []
    first = run_finetune(sweep, trial, reported.append)
    second = run_finetune(sweep, trial, lambda row: None)
    assert [row["step"] for row in reported] == [1] and [row["step"] for row in first.history] == [1, 2]
    assert first.status == "ok" and first.num_test == 30 and first.images_seen == 20 and first.num_train == 10
    assert first.value == first.history[-1]["accuracy"]
    assert [r["loss"] for r in first.history] == [r["loss"] for r in second.history]
    assert Ledger(sweep.out).is_done(trial)
    assert copy.deepcopy(trial).digest == first.digest
