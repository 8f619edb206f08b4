"""Updates that are not finite: all ranks leave one out, three in a row send the run back, a fourth ends it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.checkpoint.saving_config import SavingConfig
from pipeline.data.loading.datasets import TrainData
from pipeline.engine.optim_config import OptimConfig
from pipeline.errors import UserError
from pipeline.training import rollback
from pipeline.training.run import Run
from pipeline.training.train import train
from tests.pipeline.training import test_train as loop


def a_run(digits: str, **changes: Any) -> Run:
    """20 steps, a checkpoint each 5, that stands when the next step begins."""
    run: Run = loop.make_run(digits, saving=SavingConfig(in_background=False))
    return dataclasses.replace(run, **changes)


def first_samples(run: Run, steps: range) -> list[int]:
    """One sample of each step, of the last rank's share."""
    data = TrainData(run.data, run.augment, seed=run.seed, global_batch=run.global_batch)
    return [int(data.draw(step, run.global_batch)[1][-1]) for step in steps]


def kinds(records: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [r for r in records if r["kind"] == kind]


@pytest.fixture(scope="module")
def without_three(digits: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """State of a run that was told from the beginning to leave the data of steps 7, 8 and 9 out."""
    folder = tmp_path_factory.mktemp("without")
    run = a_run(digits)
    loop.start(dataclasses.replace(run, data=dataclasses.replace(run.data, skip_steps=("7:10",))), folder)
    found: dict[str, torch.Tensor] = loop.state(folder)[0]
    return found


@pytest.mark.parametrize("num_processes", [1, 2])
def test_after_three_in_a_row_the_run_ends_as_if_their_data_had_never_been_there(
    num_processes: int, digits: str, without_three: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    run = a_run(digits)
    records = loop.start(run, tmp_path, {"poison": first_samples(run, range(7, 10))}, num_processes)
    assert [r["step"] for r in kinds(records, "Skipped")] == [8, 9, 10]
    (back,) = kinds(records, "RolledBack")
    assert (back["step"], back["from_step"]) == (5, 10) and back["checkpoint"].endswith("step_00000005")
    assert len(set(back["keys"])) == 48 and {len(r["keys"]) for r in kinds(records, "Skipped")} == {16}
    ours = loop.state(tmp_path)[0]
    if num_processes == 1:
        assert all(torch.equal(ours[k], without_three[k]) for k in without_three)
    assert all(torch.allclose(ours[k], without_three[k], atol=1e-5) for k in without_three)
    (entry,) = rollback.read(str(tmp_path / "run"))
    assert entry["steps"] == "7:10" and sorted(entry["keys"]) == sorted(back["keys"])
    page = json.loads((tmp_path / "run" / "ledger.json").read_text())["pages"][0]
    assert (page["used"], page["skipped"]) == (320, 48)
    assert page["manifest"] == page["used"] + page["skipped"] + page["dropped"]


def test_killed_after_a_rollback_it_still_leaves_those_data_out(
    digits: str, without_three: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    run = a_run(digits)
    loop.start(run, tmp_path, {"poison": first_samples(run, range(7, 10)), "kill_at": 8})
    records = loop.start(run, tmp_path, {"poison": first_samples(run, range(7, 10))})
    assert len(kinds(records, "RolledBack")) == 1 and len(kinds(records, "Started")) == 2
    ours = loop.state(tmp_path)[0]
    assert all(torch.equal(ours[k], without_three[k]) for k in without_three)


def test_a_fourth_ends_the_run(digits: str, tmp_path: Path) -> None:
    run = a_run(digits)
    options = {"poison": first_samples(run, range(7, 11))}
    records = loop.start(run, tmp_path, options)
    assert len(kinds(records, "RolledBack")) == 1 and not kinds(records, "Finished")
    _, said = json.loads(Path(f"{tmp_path / 'log.jsonl'}.rank0").read_text())
    assert "step 7 was not finite, after 3 others and going back" in said


def test_two_in_a_row_are_left_out_and_the_run_goes_on(digits: str, tmp_path: Path) -> None:
    run = a_run(digits)
    records = loop.start(
        run, tmp_path, {"poison": [*first_samples(run, range(7, 9)), *first_samples(run, range(10, 12))]}
    )
    assert [r["step"] for r in kinds(records, "Skipped")] == [8, 9, 11, 12]
    assert not kinds(records, "RolledBack") and kinds(records, "Finished")


def test_without_a_checkpoint_to_go_back_to_three_end_the_run(digits: str, tmp_path: Path) -> None:
    run = a_run(digits, optim=OptimConfig(learning_rate=1e30, clipping=0.0))
    with pytest.raises(UserError, match="steps 1 to 3 were not finite, and no checkpoint stands"):
        list(train(run, str(tmp_path / "run")))


def test_ranges_that_touch_are_one(tmp_path: Path) -> None:
    assert rollback.joined(["103:106", "7:9", "100:103", "8:10"]) == ("7:10", "100:106")
    (tmp_path / rollback.NAME).write_text("[{}]")
    with pytest.raises(UserError, match="does not list what the run skipped"):
        rollback.read(str(tmp_path))
