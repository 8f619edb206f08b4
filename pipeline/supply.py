"""Batches fetched on a thread, so that a rank whose data stall can still hear that it is to stop."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import torch

from pipeline.data.batches import Batch, Loss
from pipeline.stop import StopSignal

POLL_S = 0.1
PATIENCE_S = 2.0
"""After a stop was asked for, a batch that does not come within this time is done without."""


class Supply(Iterator[Batch]):
    """The batches of `source` in their order, one ahead; after a stop was asked for, a void one in place of one that is late.

    A void batch (`Batch.is_void`) is black, so that all ranks make the same passes; its step is left out on all of them.
    """

    def __init__(self, source: Iterator[Batch], *, stop: StopSignal, void: Batch, device: torch.device) -> None:
        self._stop, self._void, self._is_late, self._is_over = stop, void, False, False
        self._ready: queue.Queue[tuple[Batch | None, BaseException | None]] = queue.Queue(maxsize=1)
        closed = threading.Event()
        weakref.finalize(self, closed.set)  # the thread holds nothing of this object, and ends when it goes
        threading.Thread(target=_fetch, args=(source, self._ready, closed, device), name="supply", daemon=True).start()

    def __next__(self) -> Batch:
        asked_s: float | None = None
        while not self._is_over:
            try:
                batch, error = self._ready.get(timeout=POLL_S)
            except queue.Empty:
                if not self._stop.requested:
                    continue
                asked_s = asked_s or time.monotonic()
                if self._is_late or time.monotonic() - asked_s >= PATIENCE_S:
                    self._is_late = True  # once is enough: the step is void already
                    return self._void
                continue
            self._is_over = batch is None
            if error is not None:
                raise error
            if batch is not None:
                return batch
        raise StopIteration


def _fetch(source: Iterator[Batch], ready: queue.Queue[Any], closed: threading.Event, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)  # a thread begins on the first one, and pinning memory would open it
    while not closed.is_set():
        try:
            item: tuple[Batch | None, BaseException | None] = (next(source), None)
        except StopIteration:
            item = (None, None)
        except BaseException as error:
            item = (None, error)
        while not closed.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=POLL_S)
                break
        if item[0] is None:
            return


def void_batch(num: int, px: int) -> Batch:
    """`num` black images of px pixels that count as one micro-batch without a readable sample."""
    labels = torch.zeros(num, dtype=torch.int64)
    loss = Loss(0, 0, "", "", "the run was asked to stop while it waited for data", "")
    return Batch(torch.zeros((num, px, px, 3), dtype=torch.uint8), labels, labels, lost=(loss,) * num)
