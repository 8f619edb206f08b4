"""A whole run whose samples come in lanes: killed, rolled back, on two ranks."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.data.loading.datasets import DataConfig, TrainData
from pipeline.training.run import Run
from tests.pipeline.training import test_rollback
from tests.pipeline.training import test_train as loop

Done = tuple[dict[str, torch.Tensor], dict[int, float]]


def in_lanes(digits: str, **changes: Any) -> Run:
    data = DataConfig(url=digits, order="lanes", lanes=4, lane_blocks=1, block_mb=0.0025, **changes)
    assert TrainData(data, test_rollback.a_run(digits).augment, seed=5, global_batch=16).mixture.has_lanes
    return test_rollback.a_run(digits, data=data)


@pytest.fixture(scope="module")
def unbroken(digits: str, tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("unbroken")
    records = loop.start(in_lanes(digits), folder)
    return loop.state(folder)[0], loop.losses(records)


def test_killed_and_started_again_it_ends_bit_for_bit_the_same(digits: str, unbroken: Done, tmp_path: Path) -> None:
    loop.start(in_lanes(digits), tmp_path, {"kill_at": 13})
    records = loop.start(in_lanes(digits), tmp_path)
    ours = loop.state(tmp_path)[0]
    assert all(torch.equal(ours[k], unbroken[0][k]) for k in unbroken[0]) and loop.losses(records) == unbroken[1]


def test_two_ranks_that_go_back_end_as_one_that_never_had_those_data(digits: str, tmp_path: Path) -> None:
    run = in_lanes(digits)
    without = dataclasses.replace(run, data=dataclasses.replace(run.data, skip_steps=("7:10",)))
    loop.start(without, tmp_path / "without")
    poison = {"poison": test_rollback.first_samples(run, range(7, 10))}
    records = loop.start(run, tmp_path / "two", poison, num_processes=2)
    assert len(test_rollback.kinds(records, "RolledBack")) == 1
    ours, theirs = loop.state(tmp_path / "two")[0], loop.state(tmp_path / "without")[0]
    assert all(torch.allclose(ours[k], theirs[k], atol=1e-5) for k in theirs)
