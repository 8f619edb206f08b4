"""Where the ranks that are left do not divide the batch, fewer train and the others stand by."""

import dataclasses

import pytest

from orchestration.launch import agent
from orchestration.run import rank_end, spare_rank
from tests.pipeline.watched import make_run


@pytest.mark.parametrize(("num_ranks", "train"), [(4, 4), (3, 2), (7, 4), (1, 1)])
def test_as_many_train_as_divide_the_batch(num_ranks: int, train: int) -> None:
    assert spare_rank.usable(dataclasses.replace(make_run("data"), global_batch=16, micro_batch=4), num_ranks) == train


def test_ranks_that_are_left_take_more_micro_batches_and_no_larger_ones() -> None:
    run = agent.planned(make_run("no data", global_batch=16, micro_batch=0), 4)
    assert [run.batch_plan(ranks) for ranks in (4, 2, 1)] == [(4, 1), (4, 2), (4, 4)]


def test_ranks_that_train_see_a_world_of_their_number_and_the_others_do_not_train(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run = make_run("data")
    for name, text in {"WORLD_SIZE": "3", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, text)
    monkeypatch.setenv("RANK", "2")
    assert spare_rank.takes_part(run)  # without an agent a world that does not divide is the user's to mend
    monkeypatch.setenv(rank_end.FOLDER, "folder")
    assert not spare_rank.takes_part(run)
    monkeypatch.setenv("RANK", "0")
    assert spare_rank.takes_part(run) and spare_rank.place().size == 2
    assert "2 train, 1 stand by" in capfd.readouterr().err
