"""Batches fetched on a thread: a rank whose data stall can still hear that it is to stop.

CPU   each when it is asked for: decoding ahead would take its time from the step's, and no wait would show it
GPU   one ahead: while the device computes on a batch, the next is read, and copied on a stream beside
"""

import queue
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from pipeline.data.loading.batches import READ_BY_STEPS, Batch, UnreadableSample
from pipeline.data.loading.loader_processes import LoadersKilled
from pipeline.supervision.stop_signals import StopSignal

POLL_S = 0.1
PATIENCE_S = 2.0
"""After a stop was asked for, a batch that does not come within this time is done without."""


class SideStream:
    """A GPU's stream on which batches are copied while its main one computes."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def copy(self, batch: Batch) -> tuple[Batch, Any]:
        """The batch on the device, and when it will be there; waits for nothing, where the batch lies in pinned memory."""
        with torch.cuda.stream(self._stream):
            return batch.on(self._device), self._stream.record_event()

    def hand_over(self, batch: Batch, copied: Any) -> None:
        """What is queued on the current stream from here on finds the batch there."""
        current = torch.cuda.current_stream(self._device)
        current.wait_event(copied)
        for tensor in (getattr(batch, name) for name in READ_BY_STEPS):
            if tensor is not None:
                tensor.record_stream(current)  # else its memory went to the next copy while it is still read here


class BatchFetcher(Iterator[Batch]):
    """The batches of `source` in their order; after a stop was asked for, a placeholder in place of one that is late. Where
    `source` cannot go on (`LoadersKilled`), it asks for the stop itself.

    A placeholder batch (`Batch.is_placeholder`) is black: all ranks make the same passes, and skip its step.

    Args:
        side: None for that of a GPU, and none on a CPU.
    """

    def __init__(
        self,
        source: Iterator[Batch],
        *,
        stop: StopSignal,
        placeholder: Batch,
        device: torch.device,
        side: SideStream | None = None,
    ) -> None:
        self._side = SideStream(device) if side is None and device.type == "cuda" else side
        self._stop, self._placeholder, self._is_late, self._is_over = stop, placeholder, False, False
        self._is_asked = False
        self._ready: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        self._wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()
        weakref.finalize(
            self, self._wanted.put, False
        )  # the thread holds nothing of this object, and ends when it goes
        arguments = (source, self._wanted, self._ready, device, self._side)
        threading.Thread(target=_fetch, args=arguments, name="batch-fetcher", daemon=True).start()

    def __next__(self) -> Batch:
        if self._is_over:
            raise StopIteration
        self._ask()
        asked_s: float | None = None
        while True:
            try:
                batch, error, copied = self._ready.get(timeout=POLL_S)
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
            if self._side is not None:
                self._side.hand_over(batch, copied)
                self._ask()
            return batch

    def _ask(self) -> None:
        if not self._is_asked:
            self._is_asked = True
            self._wanted.put(True)


class _Item(NamedTuple):
    """A batch, or why there is none: an error, or none where the source is at its end."""

    batch: Batch | None = None
    error: BaseException | None = None
    copied: Any = None


def _fetch(
    source: Iterator[Batch],
    wanted: queue.SimpleQueue[bool],
    ready: queue.SimpleQueue[_Item],
    device: torch.device,
    side: SideStream | None,
) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)  # a thread begins on the first one, and pinning memory would open it
    while wanted.get():
        try:
            batch, copied = next(source), None
            if side is not None:
                batch, copied = side.copy(batch)
            ready.put(_Item(batch, copied=copied))
            del batch, copied  # while it waits here it would hold the memory of one that is used up
        except StopIteration:
            return ready.put(_Item())
        except BaseException as error:
            return ready.put(_Item(error=error))


def placeholder_batch(num: int, px: int) -> Batch:
    """`num` black images of px pixels that count as one micro-batch without a readable sample."""
    labels = torch.zeros(num, dtype=torch.int64)
    loss = UnreadableSample(0, 0, "", "", "the run was asked to stop while it waited for data", "")
    return Batch(torch.zeros((num, px, px, 3), dtype=torch.uint8), labels, labels, lost=(loss,) * num)
