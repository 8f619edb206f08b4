"""Fine-tuning and its from-scratch baseline: equal budget, a zero head, supports that never meet the held-out part."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nfnet.optim.schedule import step_rate
from pipeline.configuration import to_dict
from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.data.sampling.subset import select
from pipeline.errors import UserError
from pipeline.models.backbone import ModelConfig, build_model
from pipeline.training.run import Run
from transfer.measurement import predictions
from transfer.protocol.method_settings import ALL_IMAGES, FinetuneSettings
from transfer.protocol.methods import Method, parse_methods
from transfer.protocol.recipes.bit_hyperrule import hyperrule
from transfer.protocol.sealed_splits import open_test, openings
from transfer.protocol.tasks import Suite, Task, TaskEntry
from transfer.search.grids import candidates, grace_steps, image_area
from transfer.search.successive_halving import read_rung
from transfer.sweep.cells import Sweep, plan
from transfer.sweep.finetune import Backbone, finetune_run
from transfer.sweep.ledger import Ledger
from transfer.sweep.trials import run_finetune

SETTINGS = FinetuneSettings(shots=(1, 5), learning_rates=(0.1, 0.4), num_steps=(2, 4), batch=16)
METHOD = Method(name="finetune", kind="finetune", settings=SETTINGS)
SOURCE = Backbone(
    checkpoint_url="nowhere",
    digest="c" * 64,
    model="nfnet_tiny",
    options={"drop_rate": 0.2, "stochastic_depth": 0.1, "activation": "relu"},
    augment=AugmentConfig(image_px=16, crop="pad", flip=True, mean=(0.1, 0.1, 0.1)),
)


@pytest.fixture()
def sweep(digits: str, tmp_path: Path) -> Sweep:
    entry = TaskEntry(card="digits", holdout_per_class=3)
    suite = Suite(name="s", title="s", tasks=(entry,), methods=(METHOD,), num_seeds=2)
    root = str(Path(digits).parent)
    return Sweep(out=str(tmp_path), data_root=root, sources=(SOURCE,), suite=suite, scheduler="asha")


def make(task: Task, **changes: Any) -> Run:
    options: dict[str, Any] = {"init": "scratch", "shots": 5, "seed": 1, "test": None}
    options["hyperparameters"] = {"learning_rate": 0.4, "num_steps": 4}
    return finetune_run(SOURCE, task, changes.pop("method", METHOD), **{**options, **changes})


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
        open_test(task, url, trial="t")
    cell.select(sweep.out, {"learning_rate": 0.4, "num_steps": 4}, [])
    test = open_test(task, url, trial="t")
    run = make(task, test=test)
    assert run.data.eval_split == "val" and run.data.eval_subset is None and run.eval_every is None
    with pytest.raises(ValueError, match="chose"):
        make(task, test=test, hyperparameters={"learning_rate": 0.1, "num_steps": 4})


def test_the_head_is_new_even_where_the_old_one_would_fit(sweep: Sweep) -> None:
    assert make(sweep.task("digits")).model.new_head


def test_both_inits_search_one_space(sweep: Sweep) -> None:
    points = candidates(METHOD, sweep.task("digits"), 5)
    assert len(points) == 4 and grace_steps(points) == 1
    assert points[0]["num_steps"] == 4


def test_a_search_trial_reports_all_but_its_end_and_repeats_itself(sweep: Sweep) -> None:
    cell = next(c for c in plan(sweep)[0] if c.init == "scratch" and c.shots == 1)
    trial = next(t for t in cell.search if t.hyperparameters["num_steps"] == 2)
    reported: list[dict[str, Any]] = []
    first = run_finetune(sweep, trial, reported.append)
    second = run_finetune(sweep, trial, lambda row: None)
    assert first is not None and second is not None
    assert [row["step"] for row in reported] == [1] and [row["step"] for row in first.history] == [1, 2]
    assert first.status == "ok" and first.num_test == 30 and first.images_seen == 20 and first.num_train == 10
    assert first.value == first.history[-1]["accuracy"]
    assert [r["loss"] for r in first.history] == [r["loss"] for r in second.history]
    assert Ledger(sweep.out).is_done(trial)
    assert copy.deepcopy(trial).digest == first.digest


def final_of(sweep: Sweep, shots: int = 1, **point: Any) -> Any:
    cell = next(c for c in plan(sweep)[0] if c.init == "scratch" and c.shots == shots)
    point = point or {"learning_rate": 0.1, "num_steps": 2}
    cell.select(sweep.out, point, [])
    return cell.finals(point, 1)[0]


def test_a_final_trial_keeps_what_it_said_of_each_test_image_and_records_the_opening(sweep: Sweep) -> None:
    trial = final_of(sweep)
    found = run_finetune(sweep, trial, lambda row: None)
    assert found is not None and found.is_ok
    said = predictions.read(sweep.out, trial.digest)
    task = sweep.task("digits")
    assert said["sample"].tolist() == list(range(697)) and said["top5"].shape == (697, 5)
    assert {k: v.dtype.name for k, v in said.items()} == {
        **dict.fromkeys(("sample", "label", "predicted", "top5"), "int64"),
        "confidence": "float32",
        **dict.fromkeys(("credit", "credit5"), "float64"),
    }
    from pipeline.data.format.manifest import Manifest

    np.testing.assert_array_equal(said["label"], Manifest.open(task.url).split("val").label)
    np.testing.assert_array_equal(said["predicted"], said["top5"][:, 0])
    assert (said["predicted"] == said["label"]).mean() == pytest.approx(found.metrics["top1"], abs=1e-9) == found.value
    assert said["confidence"].min() > 0 and said["confidence"].max() <= 1
    assert set(found.metrics) >= {"top1", "top5", "mean_per_class", "auroc", "balanced_accuracy"}
    assert [(o.trial, o.task) for o in openings(sweep.out)] == [(trial.digest, "digits")]
    assert found.config_digest and found.config["model"]["name"] == "nfnet_tiny" and found.max_memory_bytes > 1 << 20
    assert not list(Path(sweep.out, "work").glob("*"))


def test_the_metric_of_the_protocol_selects_and_is_the_value(sweep: Sweep) -> None:
    method = Method(name="finetune", kind="finetune", settings=dataclasses.replace(SETTINGS, metric="auroc"))
    sweep = dataclasses.replace(sweep, suite=dataclasses.replace(sweep.suite, methods=(method,)))
    trial = final_of(sweep)
    found = run_finetune(sweep, trial, lambda row: None)
    assert found is not None and trial.metric == found.metric == "auroc"
    assert found.value == found.metrics["auroc"] != found.metrics["top1"]


def test_a_trial_in_parts_equals_one_in_one_piece(sweep: Sweep) -> None:
    sweep = dataclasses.replace(sweep, scheduler="halving")
    cell = next(c for c in plan(sweep)[0] if c.init == "scratch" and c.shots == 5)
    trial = next(t for t in cell.search if t.hyperparameters == {"learning_rate": 0.1, "num_steps": 4})
    for until in (1, 3):
        assert run_finetune(sweep, trial, lambda row: None, until=until) is None
        rung = read_rung(sweep.out, trial.digest, until)
        assert rung is not None and rung.rows[-1]["step"] == until
    parts = run_finetune(sweep, trial, lambda row: None)
    whole = run_finetune(dataclasses.replace(sweep, out=sweep.out + "/other"), trial, lambda row: None)
    assert parts is not None and whole is not None
    assert [r["step"] for r in parts.history] == [1, 3, 4] and [r["step"] for r in whole.history] == [4]
    assert parts.history[-1]["loss"] == whole.history[-1]["loss"] and parts.value == whole.value


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_the_run_of_the_hyperrule_has_the_rules_rates_at_every_step(variant: str, sweep: Sweep) -> None:
    method = parse_methods({"hyperrule": {"split": "full", "variant": variant}}, "x")[0]
    task = sweep.task("digits")
    (point,) = candidates(method, task, ALL_IMAGES)
    run = make(task, method=method, shots=ALL_IMAGES, hyperparameters=point)
    rule = hyperrule(1100, 64, variant=variant, flip=False)  # type: ignore[arg-type]
    falls = {"warmup_steps": rule.warmup_steps, "decay_steps": rule.decay_steps}
    for step in range(rule.steps):
        rate = run.optim.rate(step, total_steps=rule.steps, warmup_steps=rule.warmup_steps)
        assert rate == pytest.approx(step_rate(step, peak=rule.learning_rate, **falls), rel=1e-12), step
    assert (run.global_batch, run.augment.image_px, run.augment.resized_px) == (512, 128, 160)
    assert (run.optim.name, run.optim.momentum, run.optim.weight_decay) == (
        "momentum",
        0.9,
        0,
    )  # plain, as the code's SGD
    assert run.augment.crop == "resized" and not run.augment.flip and run.augment.mean == SOURCE.augment.mean


def test_a_support_below_the_rules_batch_is_gone_through_again_within_it(sweep: Sweep) -> None:
    method = parse_methods({"hyperrule": {"shots": [10]}}, "x")[0]
    task = sweep.task("digits")
    run = make(task, method=method, shots=10, hyperparameters=candidates(method, task, 10)[0])
    assert (run.data.repeats, run.global_batch) == (6, 510)  # 100 images: 512 would split the copies of one
    assert image_area(task) == 64  # of the images, whatever the card says


def test_the_papers_recipes_reach_the_run(sweep: Sweep) -> None:
    stated = {"nfnet": {"shots": [5]}, "nfnet_plain": {"shots": [5]}, "convnets_at_scale": {"split": "full"}}
    nfnet, plain, scale = parse_methods(stated, "x")
    task = sweep.task("digits")
    runs = []
    for method, shots in ((nfnet, 5), (plain, 5), (scale, ALL_IMAGES)):
        point = candidates(method, task, shots)[0]
        runs.append(make(task, method=method, shots=shots, hyperparameters=point))
    assert (runs[0].optim.sam_rho, runs[0].optim.ema_decay, runs[0].optim.weight_decay) == (0.05, 0.9999, 1e-5)
    assert runs[0].model.options["stochastic_depth"] == 0.1 and runs[0].model.options["drop_rate"] == 0.25
    assert runs[0].optim.warmup.value == 5000 and runs[0].duration.value == 15_000
    assert (runs[1].optim.sam_rho, runs[1].optim.weight_decay) == (0, 0) and "drop_rate" not in runs[1].model.options
    assert (runs[2].augment.image_px, runs[2].augment.evaluation_px, runs[2].data.repeats) == (384, 480, 4)
    # 50 passes in all, copies included: 1,100 images in batches of 2,048.
    assert runs[2].global_batch == 2048 and runs[2].duration.value == round(50 * 1100 / 2048)


def test_a_trial_that_diverges_fails_alike_with_and_without_a_checkpoint_to_go_back_to(sweep: Sweep) -> None:
    cell = next(c for c in plan(dataclasses.replace(sweep, scheduler="halving"))[0] if c.init == "scratch")
    points = {"learning_rate": 1e30, "num_steps": 9}
    errors = []
    for name, until in (("with", 1), ("without", 0)):
        own = dataclasses.replace(sweep, out=f"{sweep.out}/{name}", scheduler="halving")
        trial = dataclasses.replace(cell.search[0], hyperparameters=points)
        if until:
            run_finetune(own, trial, lambda row: None, until=until)
            assert list(Path(own.out).glob("work/*/checkpoints/*/commit.json"))
        with pytest.raises(UserError, match="were not finite") as raised:
            run_finetune(own, trial, lambda row: None)
        errors.append(str(raised.value))
    assert errors[0] == errors[1]
