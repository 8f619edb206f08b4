"""Samples read on threads before they are asked for, within a bound of memory.

The future is known, so reading ahead guesses nothing. Requests are made for many micro-batches at once, so that neighbours
which are wanted at different times still travel together; the first portions are small, so that the first batch comes soon.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from pipeline.data.loading.shard_reader import ShardReader, Unreadable

PORTION_SAMPLES = 4096
"""Planned at once, at most: of small images the budget would hold so many that planning them would stop everything else."""
OVERHEAD_BYTES = 1024
"""What Python needs around a sample that is held."""


class Place(NamedTuple):
    """A sample of a source, and the pass over it for which it is drawn (decides its augmentation)."""

    source: int
    sample: int
    view: int


@dataclass(frozen=True)
class Reading:
    """The bytes of a micro-batch, in its order."""

    places: Sequence[Place]
    contents: list[bytes | Unreadable]
    wait_s: float
    """How long the reader of this waited for bytes."""


class ReadAhead:
    """Iterates over the readings of micro-batches in order; at most about `budget_bytes` of samples are held."""

    def __init__(
        self, readers: Sequence[ShardReader], batches: Iterable[Sequence[Place]], *, budget_bytes: int, num_threads: int
    ) -> None:
        self._readers, self._batches = readers, batches
        self._budget_bytes, self._num_threads = budget_bytes, num_threads

    def __iter__(self) -> Iterator[Reading]:
        pool = ThreadPoolExecutor(self._num_threads, thread_name_prefix="normfree-read")
        upcoming = iter(self._batches)
        ahead: deque[tuple[Sequence[Place], dict[tuple[int, int], Future[dict[int, bytes | Unreadable]]], int]] = (
            deque()
        )
        held_bytes, goal_bytes = 0, 1
        try:
            while True:
                if held_bytes <= goal_bytes // 2 or not ahead:
                    # The goal grows as batches are used: reading far ahead at once would keep the first ones waiting.
                    portion = self._portion(upcoming, goal_bytes - held_bytes)
                    ahead.extend(self._submit(pool, portion))
                    held_bytes += sum(size for _, size in portion)
                    goal_bytes = min(max(2 * held_bytes, 1 << 20), self._budget_bytes)
                if not ahead:
                    return
                places, futures, size = ahead.popleft()
                begin = time.perf_counter()
                contents = [futures[p.source, p.sample].result().get(p.sample) for p in places]
                wait_s = time.perf_counter() - begin
                held_bytes -= size
                del futures
                yield Reading(places, [_there(c) for c in contents], wait_s)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _portion(self, upcoming: Iterator[Sequence[Place]], room_bytes: int) -> list[tuple[Sequence[Place], int]]:
        """The next micro-batches, at least one if there is any, until they fill the room."""
        portion: list[tuple[Sequence[Place], int]] = []
        total = num = 0
        while total < room_bytes and num < PORTION_SAMPLES:
            places = next(upcoming, None)
            if places is None:
                break
            size = sum(int(self._readers[p.source].index.size[p.sample]) + OVERHEAD_BYTES for p in places)
            portion.append((places, size))
            total, num = total + size, num + len(places)
        return portion

    def _submit(
        self, pool: ThreadPoolExecutor, portion: list[tuple[Sequence[Place], int]]
    ) -> Iterator[tuple[Sequence[Place], dict[tuple[int, int], Future[dict[int, bytes | Unreadable]]], int]]:
        futures: dict[tuple[int, int], Future[dict[int, bytes | Unreadable]]] = {}
        for source, reader in enumerate(self._readers):
            wanted = dict.fromkeys(p.sample for places, _ in portion for p in places if p.source == source)
            for request in reader.requests(list(wanted)) if wanted else ():
                future = pool.submit(reader.read, request)
                for sample in request.samples:
                    futures[source, sample] = future
        for places, size in portion:
            yield places, {(p.source, p.sample): futures[p.source, p.sample] for p in places}, size


def _there(content: bytes | Unreadable | None) -> bytes | Unreadable:
    assert content is not None
    return content
