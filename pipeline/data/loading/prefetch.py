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

import numpy as np

from pipeline.data.format.index import PLACED
from pipeline.data.loading.shard_reader import ShardReader, Unreadable
from pipeline.storage import objects, range_reads

PORTION_SAMPLES = 4096
"""Planned at once, at most: of small images the budget would hold so many that planning them would stop everything else."""
AHEAD = 64
"""Micro-batches whose places in the index are looked up before their bytes are asked for: out of a store both take a request."""
OVERHEAD_BYTES = 1024
"""What Python needs around a sample that is held."""


class Place(NamedTuple):
    """A sample of a source, and the pass over it for which it is drawn (decides its augmentation)."""

    source: int
    sample: int
    view: int


def places_of(sources: np.ndarray, samples: np.ndarray, views: np.ndarray) -> list[Place]:
    """What was drawn, (n,) each, one by one."""
    return [Place(*p) for p in zip(sources.tolist(), samples.tolist(), views.tolist(), strict=True)]


Bytes = dict[tuple[int, int], Future[dict[int, bytes | Unreadable]]]
"""By source and sample."""


class Indexed(NamedTuple):
    """A micro-batch, and what the index says of its samples."""

    places: Sequence[Place]
    rows: np.ndarray
    """(n,) `PLACED`."""

    @property
    def num_bytes(self) -> int:
        return int(self.rows["size"].sum()) + OVERHEAD_BYTES * len(self.places)


@dataclass(frozen=True)
class Reading:
    """The bytes of a micro-batch, in its order."""

    places: Sequence[Place]
    rows: np.ndarray
    """What the index says of the samples, (n,) `PLACED`."""
    contents: list[bytes | Unreadable]
    wait_s: float
    """How long the reader of this waited for bytes."""
    notice: str
    """What the store's gate has to say since this reader began; a process may have read for another run before."""


class ReadAhead:
    """Iterates over the readings of micro-batches in order; at most about `budget_bytes` of samples are held."""

    def __init__(
        self, readers: Sequence[ShardReader], batches: Iterable[Sequence[Place]], *, budget_bytes: int, num_threads: int
    ) -> None:
        self._readers, self._batches = readers, batches
        self._budget_bytes, self._num_threads = budget_bytes, num_threads
        is_local = all(objects.is_local(reader.url) for reader in readers)
        self._gate = None if is_local else range_reads.gate(num_threads)
        self._num_before = self._gate.num_overloads if self._gate else 0

    def __iter__(self) -> Iterator[Reading]:
        # Of a store as many as its gate may ever let through.
        num_threads = self._gate.most if self._gate else self._num_threads
        pool = ThreadPoolExecutor(num_threads, thread_name_prefix="normfree-read")
        index_pool = ThreadPoolExecutor(1, thread_name_prefix="normfree-index")
        upcoming = self._indexed(index_pool)
        ahead: deque[tuple[Indexed, Bytes]] = deque()
        held_bytes, goal_bytes = 0, 1
        try:
            while True:
                if held_bytes <= goal_bytes // 2 or not ahead:
                    # The goal grows as batches are used: reading far ahead at once would keep the first ones waiting.
                    portion = self._portion(upcoming, goal_bytes - held_bytes)
                    ahead.extend(self._submit(pool, portion))
                    held_bytes += sum(batch.num_bytes for batch in portion)
                    goal_bytes = min(max(2 * held_bytes, 1 << 20), self._budget_bytes)
                if not ahead:
                    return
                batch, futures = ahead.popleft()
                begin = time.perf_counter()
                contents = [futures[p.source, p.sample].result()[p.sample] for p in batch.places]
                wait_s = time.perf_counter() - begin
                held_bytes -= batch.num_bytes
                del futures
                notice = self._gate.notice if self._gate and self._gate.num_overloads > self._num_before else ""
                yield Reading(batch.places, batch.rows, contents, wait_s, notice)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            index_pool.shutdown(wait=False, cancel_futures=True)

    def _indexed(self, pool: ThreadPoolExecutor) -> Iterator[Indexed]:
        upcoming, ahead = iter(self._batches), deque[Future[Indexed]]()
        while True:
            while len(ahead) < AHEAD and (places := next(upcoming, None)) is not None:
                ahead.append(pool.submit(self._look_up, places))
                if len(ahead) == 1:
                    break  # the first batch does not wait for those behind it to be drawn
            if not ahead:
                return
            yield ahead.popleft().result()

    def _look_up(self, places: Sequence[Place]) -> Indexed:
        rows = np.empty(len(places), PLACED)
        sources = np.array([place.source for place in places])
        samples = np.array([place.sample for place in places], np.int64)
        for source in np.unique(sources).tolist():
            rows[sources == source] = self._readers[source].index.rows(samples[sources == source])
        return Indexed(places, rows)

    def _portion(self, upcoming: Iterator[Indexed], room_bytes: int) -> list[Indexed]:
        """The next micro-batches, at least one if there is any, until they fill the room."""
        portion: list[Indexed] = []
        total = num = 0
        while total < room_bytes and num < PORTION_SAMPLES:
            batch = next(upcoming, None)
            if batch is None:
                break
            portion.append(batch)
            total, num = total + batch.num_bytes, num + len(batch.places)
        return portion

    def _submit(self, pool: ThreadPoolExecutor, portion: list[Indexed]) -> Iterator[tuple[Indexed, Bytes]]:
        futures: Bytes = {}
        for source, reader in enumerate(self._readers):
            wanted = {p.sample: row for batch in portion for p, row in zip(*batch, strict=True) if p.source == source}
            samples = list(wanted)
            for request in reader.requests(samples, np.array(list(wanted.values()), PLACED)) if wanted else ():
                future = pool.submit(reader.read, request)
                for sample in request.samples:
                    futures[source, sample] = future
        for batch in portion:
            yield batch, {(p.source, p.sample): futures[p.source, p.sample] for p in batch.places}
