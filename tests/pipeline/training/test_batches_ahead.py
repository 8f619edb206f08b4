"""Batches copied to a device one ahead, and time taken where the device is: on twins that tell what was asked of them."""

import itertools
import pickle
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.data.loading.batches import Batch
from pipeline.data.sampling.mixture import Mixture
from pipeline.supervision.phase_clock import Clock, DeviceTimeline
from pipeline.supervision.stop_signals import StopSignal
from pipeline.training import batch_fetcher
from pipeline.training.batch_fetcher import BatchFetcher, SideStream, placeholder_batch

ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def batch(number: int) -> Batch:
    return Batch(torch.full((2, 4, 4, 3), number, dtype=torch.uint8), torch.zeros(2), torch.tensor([number]))


class Twin(SideStream):
    """Of a GPU's stream: says what is done with it."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.copied = threading.Semaphore(0)

    def copy(self, batch: Batch) -> tuple[Batch, Any]:
        self.said.append(f"copy {int(batch.samples)}")
        self.copied.release()
        return batch.on(torch.device("cpu")), int(batch.samples)

    def hand_over(self, batch: Batch, copied: Any) -> None:
        assert int(batch.samples) == copied
        self.said.append(f"use {copied}")


def fetcher(source: Iterator[Batch], stop: StopSignal, side: SideStream | None) -> BatchFetcher:
    return BatchFetcher(source, stop=stop, placeholder=placeholder_batch(2, 4), device=torch.device("cpu"), side=side)


def test_while_a_batch_is_used_the_next_is_copied_and_no_other() -> None:
    twin, read = Twin(), list[int]()

    def source() -> Iterator[Batch]:
        for number in range(4):
            read.append(number)
            yield batch(number)

    batches = fetcher(source(), StopSignal(), twin)
    assert int(next(batches).samples) == 0 and twin.copied.acquire(timeout=30)
    for number in range(1, 4):
        assert twin.copied.acquire(timeout=30)  # nobody has asked for it yet
        assert len(read) == number + 1 and batches._wanted.empty()
        assert int(next(batches).samples) == number
    with pytest.raises(StopIteration):
        next(batches)
    uses = [word for word in twin.said if word.startswith("use")]
    assert uses == ["use 0", "use 1", "use 2", "use 3"]
    assert all(twin.said.index(f"copy {n + 1}") > twin.said.index(f"use {n}") for n in range(3))


def test_on_a_cpu_a_batch_is_read_when_it_is_asked_for() -> None:
    read = itertools.count()
    batches = fetcher((batch(next(read)) for _ in range(4)), StopSignal(), None)
    assert int(next(batches).samples) == 0
    assert batches._wanted.empty() and not batches._is_asked and batches._ready.empty()


def test_what_goes_wrong_ahead_is_raised_in_its_place_and_a_stop_ends_the_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batch_fetcher, "PATIENCE_S", 0.0)

    def broken() -> Iterator[Batch]:
        yield batch(0)
        raise ValueError("broken")

    batches = fetcher(broken(), StopSignal(), Twin())
    assert int(next(batches).samples) == 0
    with pytest.raises(ValueError, match="broken"):
        next(batches)

    stall, stop = threading.Event(), StopSignal()

    def stalled() -> Iterator[Batch]:
        yield batch(0)
        stall.wait()
        yield batch(1)

    batches = fetcher(stalled(), stop, Twin())
    assert int(next(batches).samples) == 0
    stop.ask()
    assert next(batches).is_placeholder
    stall.set()


class Device:
    """A timeline whose marks are come to when `now` is there: each lasts what was handed over before it."""

    def __init__(self) -> None:
        self.now = self.end = 0.0

    def work(self, seconds: float) -> None:
        self.end = max(self.end, self.now) + seconds

    def mark(self) -> float:
        self.end = max(self.end, self.now)
        return self.end

    def between(self, begin: float, end: float) -> float | None:
        return end - begin if end <= self.now else None


def test_a_wait_is_what_the_device_stood_still_and_not_what_it_computed_meanwhile() -> None:
    device, clock = Device(), Clock()
    clock.follow(device)
    clock.take()
    with clock("compute"):
        device.work(5.0)  # handed over; the host is through at once
    with clock("wait"):
        device.now += 6.0  # the host waits for a batch: the device computes for 5 s of it
    with clock("compute"):
        device.work(3.0)
    wall_s, spent_s = clock.take()
    assert wall_s == 6.0 and {k: v for k, v in spent_s.items() if v} == {"compute": 5.0, "wait": 1.0}
    device.now += 4.0
    wall_s, spent_s = clock.take()
    # The device was through after 3 s and nobody gave it more.
    assert wall_s == 4.0 and {k: v for k, v in spent_s.items() if v} == {"compute": 3.0, "other": 1.0}


class Remembers:
    """An order that keeps what it computed last, as they do: two at a time would spoil it."""

    num_samples, inside, most = 1000, 0, 0

    def positions(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        self.inside += 1
        self.most = max(self.most, self.inside)
        time.sleep(0.005)
        self.inside -= 1
        return np.zeros(count, np.int64), np.arange(start, start + count)


def test_the_account_of_a_run_and_its_batches_may_be_drawn_at_the_same_time() -> None:
    order: Any = Remembers()
    mixture = Mixture([order])
    threads = [threading.Thread(target=mixture.positions, args=(0, 8)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert order.most == 1
    assert pickle.loads(pickle.dumps(mixture)).positions(3, 2)[2].tolist() == [3, 4]  # as loader processes get it


@pytest.mark.gpu
@ON_GPU
def test_batches_come_from_a_stream_beside_and_waits_are_the_devices() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    clock = Clock()
    clock.follow(DeviceTimeline(device))
    source = (batch(number).pin_memory() for number in range(8))
    batches = BatchFetcher(source, stop=StopSignal(), placeholder=placeholder_batch(2, 4), device=device)
    matrix = torch.randn(4096, 4096, device=device)
    torch.cuda.synchronize(device)
    clock.take()
    sums = []
    for _ in range(8):
        with clock("wait"):
            found = next(batches)
        assert found.images.device == device and found.samples.device.type == "cpu"
        with clock("compute"):
            matrix = torch.linalg.vector_norm(matrix @ matrix) * 0 + matrix
            sums.append(found.images.float().mean())
    torch.cuda.synchronize(device)
    wall_s, spent_s = clock.take()
    assert torch.stack(sums).tolist() == list(range(8))
    assert spent_s["compute"] > spent_s["wait"] and wall_s > 0
