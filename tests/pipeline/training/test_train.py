"""The loop: what a run does when it is left alone, killed, stopped, or given to another number of processes."""

import dataclasses
import json
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.checkpoint import commit as checkpoint
from pipeline.checkpoint import load
from pipeline.checkpoint.saving_config import SavingConfig
from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.data.loading.datasets import DataConfig
from pipeline.duration import Duration
from pipeline.engine.deepspeed_engine import EngineConfig
from pipeline.engine.optim_config import OptimConfig
from pipeline.errors import UserError
from pipeline.models.backbone import ModelConfig
from pipeline.records import PassedOver, Saved
from pipeline.training.run import Run, dump_yaml
from pipeline.training.train import train
from tests.pipeline import processes


def make_run(digits: str, **changes: Any) -> Run:
    run = Run(
        name="test",
        seed=5,
        # Dropout and stochastic depth are on: their masks must survive a restart and another number of processes too.
        model=ModelConfig(name="nfnet_tiny", options={"drop_rate": 0.2, "stochastic_depth": 0.2}),
        data=DataConfig(url=digits, mix_blocks=4, block_mb=0.01),
        augment=AugmentConfig(image_px=16, area_min=0.5, flip=False),
        optim=OptimConfig(learning_rate=0.1, warmup=Duration(3, "steps"), ema_decay=0.9, weight_decay=1e-4),
        global_batch=16,
        micro_batch=8,
        duration=Duration(20, "steps"),
        save_every=Duration(5, "steps"),
        log_every_steps=1,
        keep_checkpoints=10,
    )
    return dataclasses.replace(run, **changes)


def start(
    run: Run, folder: Path, options: dict[str, Any] | None = None, num_processes: int = 1
) -> list[dict[str, Any]]:
    """Records of a run in processes of its own; one that kills itself counts as done."""
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(dump_yaml(run))
    arguments = (folder / "recipe.yaml", folder / "run", folder / "log.jsonl", options or {})
    try:
        processes.run("train_run.py", *arguments, num_processes=num_processes)
    except AssertionError:
        if not (options or {}).get("kill_at"):
            raise
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(records: list[dict[str, Any]]) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in records if r["kind"] == "Step"}


def state(folder: Path) -> tuple[dict[str, torch.Tensor], checkpoint.Commit]:
    commit = load.resolve(str(folder / "run"), str(folder / "cache"))
    whole = load.load_state(commit, str(folder / "cache"))
    return {f"{k}/{n}": t for k, tensors in whole.items() for n, t in tensors.items()}, commit


@pytest.fixture(scope="module")
def unbroken(digits: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("unbroken")
    return folder, start(make_run(digits), folder)


def test_a_killed_run_started_again_ends_with_the_same_weights_bit_for_bit(
    digits: str, unbroken: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    run = make_run(
        digits, saving=SavingConfig(in_background=False)
    )  # the save of step 10 stands when step 13 is reached
    start(run, tmp_path, {"kill_at": 13})
    records = start(make_run(digits), tmp_path)
    assert [r["resumed_from"] for r in records if r["kind"] == "Started"][1].endswith("step_00000010")
    theirs, commit = state(unbroken[0])
    ours, again = state(tmp_path)
    assert (again.step, again.samples, again.num_updates) == (commit.step, 320, 20)
    assert set(ours) == set(theirs) and {k.split("/")[0] for k in ours} == {"weights", "momentum", "ema"}
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert losses(records) == losses(
        unbroken[1]
    )  # the steps after the restart repeat the unbroken run's losses exactly


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_killed_three_times_at_random_steps_it_still_ends_bit_for_bit_the_same(
    seed: int, digits: str, unbroken: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    steps = sorted(random.Random(seed).sample(range(1, 20), 3))
    for step in steps:  # one that lies before the newest checkpoint is reached again
        start(make_run(digits), tmp_path, {"kill_at": step})
    start(make_run(digits), tmp_path)
    ours, theirs = state(tmp_path)[0], state(unbroken[0])[0]
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


@pytest.mark.parametrize("stage", [0, 1])
def test_two_processes_compute_what_one_computes(
    stage: int, digits: str, unbroken: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    run = make_run(digits, engine=EngineConfig(zero_stage=stage))  # type: ignore[arg-type]
    records = start(run, tmp_path, num_processes=2)
    one, two = losses(unbroken[1]), losses(records)
    assert len(two) == 20 and all(abs(one[s] - two[s]) < 1e-4 for s in one)


def test_a_run_goes_on_with_another_number_of_processes_and_stage(
    digits: str, unbroken: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    sharded = make_run(digits, engine=EngineConfig(zero_stage=1))
    start(sharded, tmp_path, {"stop_at": 10, "stop_rank": 1}, num_processes=2)
    records = start(make_run(digits), tmp_path)
    stopped = next(r for r in records if r["kind"] == "Stopped")
    begun = [r for r in records if r["kind"] == "Started"][1]
    assert begun["step"] == stopped["step"] >= 10 and begun["num_ranks"] == 1
    one, other = losses(unbroken[1]), losses(records)
    assert all(abs(one[s] - other[s]) < 1e-4 for s in one)


def test_a_stop_signal_on_one_rank_saves_on_all_and_loses_nothing(digits: str, tmp_path: Path) -> None:
    records = start(make_run(digits, save_every=None), tmp_path, {"stop_at": 7, "stop_rank": 1}, num_processes=2)
    last = records[-1]
    assert last["kind"] == "Stopped" and last["step"] in (7, 8)
    assert state(tmp_path)[1].step == last["step"]


def test_the_plan_and_the_end_agree(unbroken: tuple[Path, list[dict[str, Any]]]) -> None:
    _, records = unbroken
    started = next(r for r in records if r["kind"] == "Started")
    done = records[-1]
    assert done["kind"] == "Finished" and done["samples"] == started["total_samples"] == 320
    assert (started["samples_per_epoch"] - started["dropped_samples"]) == 320
    steps = [r for r in records if r["kind"] == "Step"]
    assert [r["step"] for r in steps] == list(range(1, 21))
    for r in steps:
        a_rank = started["image_flops"] * r["images_per_s"] / started["num_ranks"]
        assert r["flops_share"] == pytest.approx(a_rank / started["device_flops"], rel=1e-9) and r["flops_share"] > 0
    evaluation = next(r for r in records if r["kind"] == "Evaluation")
    assert evaluation["num_samples"] == 697 and evaluation["weights"] == "ema"


def test_a_run_at_stage_3_begins_and_ends_and_counts_the_same_network(
    unbroken: tuple[Path, list[dict[str, Any]]], digits: str, tmp_path: Path
) -> None:
    """It empties the parameters: what is counted of a network is counted before."""
    plain = next(r for r in unbroken[1] if r["kind"] == "Started")
    config = EngineConfig(zero_stage=3, parity_check=False)
    run = make_run(digits, engine=config, duration=Duration(4, "steps"), save_every=None, eval_every=None)
    records = start(run, tmp_path)
    started, last = next(r for r in records if r["kind"] == "Started"), records[-1]
    for name in ("num_parameters", "image_flops"):
        assert started[name] == plain[name] > 0
    assert last["kind"] == "Finished" and all(r["flops_share"] > 0 for r in records if r["kind"] == "Step")


def test_a_finished_run_started_again_does_nothing(unbroken: tuple[Path, list[dict[str, Any]]], digits: str) -> None:
    folder, _ = unbroken
    before = sorted(p.name for p in (folder / "run" / "checkpoints").iterdir())
    kinds = [type(r).__name__ for r in train(make_run(digits), str(folder / "run"))]
    assert "Step" not in kinds and kinds[-1] == "Finished"
    assert sorted(p.name for p in (folder / "run" / "checkpoints").iterdir()) == before


def test_a_folder_that_holds_another_run_is_refused_by_the_field(
    unbroken: tuple[Path, list[dict[str, Any]]], digits: str
) -> None:
    folder, _ = unbroken
    with pytest.raises(UserError, match=r"seed = 5, this one has 6"):
        list(train(make_run(digits, seed=6), str(folder / "run")))


def test_saved_beside_training_or_with_training_standing_still_the_checkpoints_are_the_same(
    digits: str, unbroken: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    run = make_run(digits, eval_every=None, saving=SavingConfig(in_background=False))
    saved = [r for r in train(run, str(tmp_path / "run")) if isinstance(r, Saved)]
    assert [r.step for r in saved] == [5, 10, 15, 20]
    for record in saved:
        theirs = load.resolve(record.url.replace(str(tmp_path), str(unbroken[0])), str(tmp_path / "cache"))
        ours = checkpoint.read_commit(record.url)
        assert ours.files == theirs.files  # names, sizes, digests


def test_a_run_that_passed_over_a_damaged_checkpoint_reaches_its_step_and_leaves_it_as_it_was(
    digits: str, unbroken: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    shutil.copytree(unbroken[0] / "run", tmp_path / "run")
    bad = tmp_path / "run" / "checkpoints" / "step_00000020"
    file = next(bad.glob("*.safetensors"))
    damaged = file.read_bytes()[:-4] + b"oops"
    file.write_bytes(damaged)
    records = list(train(make_run(digits, keep_checkpoints=1), str(tmp_path / "run")))
    passed = next(r for r in records if isinstance(r, PassedOver))
    saved = next(r for r in records if isinstance(r, Saved))
    assert passed.url == str(bad) and saved.url == f"{bad}_02" and str(bad) in saved.note
    assert file.read_bytes() == damaged and "does not verify" in (bad / "DAMAGED").read_text()
    assert {p.name for p in bad.parent.iterdir()} == {bad.name, f"{bad.name}_02"}  # kept for inspection; the newest
    ours, theirs = state(tmp_path)[0], state(unbroken[0])[0]
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(digits: str, tmp_path: Path) -> None:
    for step in (5, 10):
        folder = tmp_path / "run" / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / checkpoint.COMMIT).write_text("{")
    with pytest.raises(UserError, match="holds 2 checkpoints and none verifies"):
        list(train(make_run(digits), str(tmp_path / "run")))


def test_fine_tuning_starts_from_the_weights_of_a_run_and_makes_a_new_head(
    digits: str, unbroken: tuple[Path, list[dict[str, Any]]]
) -> None:
    from pipeline.models.backbone import build_model

    url = str(unbroken[0] / "run")
    weights, _ = load.load_weights(url, "ema")
    model, note = build_model(ModelConfig(name="nfnet_tiny", init_from=url), 7, seed=0)
    assert model.state_dict()["head.weight"].shape[0] == 7 and "made anew" in note
    assert torch.equal(model.state_dict()["stem.0.weight"], weights["stem.0.weight"])
    same_size = ModelConfig(name="nfnet_tiny", options={"head_init": "zero"}, init_from=url)
    assert build_model(same_size, 10, seed=0)[0].state_dict()["head.weight"].any()
    renewed, note = build_model(dataclasses.replace(same_size, new_head=True), 10, seed=0)
    assert not renewed.state_dict()["head.weight"].any() and "made anew" in note


def test_the_command_says_what_is_wrong_and_leaves_with_two(digits: str, tmp_path: Path) -> None:
    command = ["python", "-m", "orchestration.cli", "pretrain", "nfnet_tiny_glyphs", "--out", str(tmp_path / "run")]
    import sys

    command[0] = sys.executable
    done = subprocess.run(
        [*command, "--data.url", digits, "--global_batch", "15", "--num-processes", "2"],
        capture_output=True,
        text=True,
        cwd=processes.ROOT,
        check=False,
    )
    assert done.returncode == 2 and "does not divide over 2 processes" in done.stderr
    said = [line for line in done.stderr.splitlines() if not line.startswith("loading PyTorch")]  # on a busy machine
    assert len(said) == 1 and not (tmp_path / "run").exists()
