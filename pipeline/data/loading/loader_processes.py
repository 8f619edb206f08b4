"""The batches of a stream, made in loader processes; killed ones are replaced."""

import time
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch.utils.data import DataLoader

from pipeline.data.loading.batches import Batch, BatchStream
from pipeline.data.process_pool import safe_context
from pipeline.errors import UserError

MAX_DEATHS = 3
"""So many ends of loader processes within FORGIVEN_BATCHES are no accident."""
FORGIVEN_BATCHES = 1000
GONE_S = 2.0
"""After an error in the talk with a loader process, for which its end may not be known yet."""


class LoadersKilled(UserError):
    """Loader processes were killed again and again."""


def load(stream: BatchStream, num_workers: int, *, pin: bool) -> Iterator[Batch]:
    """The batches of a stream, made in `num_workers` processes (0: in this one).

    Where one of them is killed (for its memory, as a rule), new ones go on from the same place: what they make is a function
    of the position. The next batch says so.

    Raises:
        LoadersKilled: that happened MAX_DEATHS times within FORGIVEN_BATCHES.
    """
    made, deaths = 0, list[int]()
    while True:
        loader = _processes(stream.starting_at(made), num_workers, pin=pin)
        notice = ""
        if deaths:
            notice = (
                f"a loader process was killed, most likely for its memory; others go on in its place "
                f"({len(deaths)} of at most {MAX_DEATHS - 1} times in {FORGIVEN_BATCHES:,} batches)"
            )
        try:
            while (batch := next(loader, None)) is not None:
                made += 1
                yield replace(batch, notice=notice or batch.notice)
                notice = ""
            return
        except Exception as error:
            if not _is_killed(loader):
                raise
            deaths = [*(d for d in deaths if made - d < FORGIVEN_BATCHES), made]
            if len(deaths) >= MAX_DEATHS:
                raise LoadersKilled(
                    f"loader processes were killed {len(deaths)} times, most likely for their memory: lower data.num_workers "
                    "or data.read_ahead_mb, or give the machine more memory; the same command goes on"
                ) from error
        finally:
            del loader  # its other processes end with it


def _is_killed(loader: Iterator[Batch]) -> bool:
    """Whether the error that came out of a loader is that one of its processes is gone, and not one that it passed on."""
    workers = getattr(loader, "_workers", [])
    end_s = time.monotonic() + GONE_S
    while not (gone := any(not worker.is_alive() for worker in workers)) and workers and time.monotonic() < end_s:
        time.sleep(0.05)
    return gone


def _processes(stream: BatchStream, num_workers: int, *, pin: bool) -> Iterator[Batch]:
    loader: DataLoader[Batch] = DataLoader(
        stream,
        batch_size=None,
        num_workers=num_workers,
        # An object store's client must not be inherited through fork (s3fs refuses, others hang).
        multiprocessing_context=safe_context() if num_workers else None,
        prefetch_factor=4 if num_workers else None,
        pin_memory=pin,
        # Its seeds, which nothing uses here, would be drawn from the process's numbers, whenever loaders are replaced.
        generator=torch.Generator(),
    )
    return iter(loader)
