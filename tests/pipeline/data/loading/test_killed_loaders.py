"""Loader processes are functions of the position: those that are killed are replaced, and the batches are the same."""

import multiprocessing
import multiprocessing.forkserver
import multiprocessing.process
import multiprocessing.util
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.data.loading.batches import Batch
from pipeline.data.loading.datasets import DataConfig, TrainData
from pipeline.data.loading.loader_processes import MAX_DEATHS, LoadersKilled
from pipeline.data.process_pool import safe_context
from pipeline.distributed import World
from pipeline.places import MAX_SOCKET_FOLDER
from pipeline.supervision.stop_signals import A_SIGNAL, StopSignal
from pipeline.training.batch_fetcher import BatchFetcher, placeholder_batch

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
NUM = 24


def batches(url: str, num_workers: int) -> Iterator[Batch]:
    data = TrainData(DataConfig(url=url, num_workers=num_workers), AugmentConfig(image_px=8), seed=3)
    return data.batches(steps=range(NUM), global_batch=4, micro_batch=4, world=ALONE)


def kill_one() -> None:
    os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)


def kill_their_server() -> None:
    os.kill(multiprocessing.forkserver._forkserver._forkserver_pid, signal.SIGKILL)  # type: ignore[attr-defined]


@pytest.mark.parametrize("kill", [kill_one, pytest.param(kill_their_server, marks=pytest.mark.slow)])
def test_the_batches_of_a_run_whose_loaders_are_killed_are_those_of_one_without(kill: object, digits: str) -> None:
    made = []
    for number, batch in enumerate(batches(digits, 2)):
        made.append(batch)
        if number == 1:
            kill()  # type: ignore[operator]
    expected = list(batches(digits, 0))
    assert len(made) == len(expected) == NUM
    for ours, theirs in zip(made, expected, strict=True):
        assert torch.equal(ours.samples, theirs.samples) and torch.equal(ours.images, theirs.images)
    assert [b.notice for b in made if b.notice] == [n for n in (b.notice for b in made) if "was killed" in n] != []


class Dying:
    """A loader whose only process is killed when it has made one batch."""

    def __init__(self, first: int) -> None:
        self._next, self._workers = [first], [self]

    def is_alive(self) -> bool:
        return bool(self._next)

    def __next__(self) -> Batch:
        if not self._next:
            raise RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")
        number = torch.tensor([self._next.pop()])
        return Batch(torch.zeros(1), torch.zeros(1), number)


def test_loaders_that_are_killed_again_and_again_make_all_ranks_save_and_leave(
    digits: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "pipeline.data.loading.loader_processes._processes", lambda stream, *_, **__: Dying(stream._first)
    )
    stop = StopSignal()
    supply = BatchFetcher(batches(digits, 1), stop=stop, placeholder=placeholder_batch(4, 8), device=ALONE.device)
    assert [int(next(supply).samples) for _ in range(MAX_DEATHS)] == list(range(MAX_DEATHS))
    assert next(supply).is_placeholder and next(supply).is_placeholder
    assert stop.requested and "data.num_workers" in stop.reason != A_SIGNAL


def test_an_error_that_a_loader_passes_on_is_raised_as_it_is(digits: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data.loading.loader_processes.GONE_S", 0.1)
    data = TrainData(DataConfig(url=digits, num_workers=1), AugmentConfig(image_px=8), seed=3)
    data.pools[0] = np.full(697, 10**6)  # no such sample
    with pytest.raises(IndexError) as found:
        next(data.batches(steps=range(2), global_batch=4, micro_batch=4, world=ALONE))
    assert not isinstance(found.value, LoadersKilled)


def test_sockets_of_workers_have_short_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("b" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    monkeypatch.setitem(multiprocessing.process.current_process()._config, "tempdir", None)  # type: ignore[attr-defined]
    safe_context()
    assert len(multiprocessing.util.get_temp_dir()) <= MAX_SOCKET_FOLDER + len("/normfree-tmp-pool-12345678")
    assert tempfile.gettempdir() == str(long)
