"""Batches fetched on a thread when asked for: a rank whose data stall can still hear that it is to stop."""

import queue
import threading
import time
import weakref
from collections.abc import Iterator

import torch

from pipeline.data.loading.batches import Batch, UnreadableSample
from pipeline.data.loading.loader_processes import LoadersKilled
from pipeline.supervision.stop_signals import StopSignal

POLL_S = 0.1
PATIENCE_S = 2.0
"""After a stop was asked for, a batch that does not come within this time is done without."""


class BatchFetcher(Iterator[Batch]):
    """The batches of `source` in their order, each fetched when it is asked for; after a stop was asked for, a placeholder in
    place of one that is late. Where `source` cannot go on (`LoadersKilled`), it asks for the stop itself.

    A placeholder batch (`Batch.is_placeholder`) is black: all ranks make the same passes, and skip its step.
    """

    def __init__(self, source: Iterator[Batch], *, stop: StopSignal, placeholder: Batch, device: torch.device) -> None:
        self._stop, self._placeholder, self._is_late, self._is_over = stop, placeholder, False, False
        self._is_asked = False
        self._ready: queue.SimpleQueue[Item] = queue.SimpleQueue()
        self._wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()
        weakref.finalize(
            self, self._wanted.put, False
        )  # the thread holds nothing of this object, and ends when it goes
        arguments = (source, self._wanted, self._ready, device)
        threading.Thread(target=_fetch, args=arguments, name="batch-fetcher", daemon=True).start()

    def __next__(self) -> Batch:
        if self._is_over:
            raise StopIteration
        if not self._is_asked:
            self._is_asked = True
            self._wanted.put(True)
        asked_s: float | None = None
        while True:
            try:
                batch, error = self._ready.get(timeout=POLL_S)
            except queue.Empty:
                if not self._stop.requested:
                    continue
                asked_s = asked_s or time.monotonic()
                if self._is_late or time.monotonic() - asked_s >= PATIENCE_S:
                    self._is_late = True  # once is enough: the step is skipped already
                    return self._placeholder
                continue
            if isinstance(error, LoadersKilled):
                self._is_late = True  # and for good: all ranks leave with what they have
                self._stop.ask(str(error))
                return self._placeholder
            self._is_asked, self._is_over = False, batch is None
            if error is not None:
                raise error
            if batch is None:
                raise StopIteration
            return batch


Item = tuple[Batch | None, BaseException | None]


def _fetch(
    source: Iterator[Batch],
    wanted: queue.SimpleQueue[bool],
    ready: queue.SimpleQueue[Item],
    device: torch.device,
) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)  # a thread begins on the first one, and pinning memory would open it
    while wanted.get():
        try:
            ready.put((next(source), None))
        except StopIteration:
            return ready.put((None, None))
        except BaseException as error:
            return ready.put((None, error))


def placeholder_batch(num: int, px: int) -> Batch:
    """`num` black images of px pixels that count as one micro-batch without a readable sample."""
    labels = torch.zeros(num, dtype=torch.int64)
    loss = UnreadableSample(0, 0, "", "", "the run was asked to stop while it waited for data", "")
    return Batch(torch.zeros((num, px, px, 3), dtype=torch.uint8), labels, labels, lost=(loss,) * num)
