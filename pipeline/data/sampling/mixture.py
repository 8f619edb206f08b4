"""Several datasets in given shares: which source at which position of the run, as pure as the order within each.

A period of 1,000 positions holds each source as often as its weight says, spread evenly, so that the share realised between
any two positions is off by a few samples at most. Source i is read in its own order and starts its own next epoch when it
is through: each of its samples comes once before any comes twice.
"""

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.data.sampling.lanes import LaneOrder
from pipeline.data.sampling.order import Order
from pipeline.errors import UserError

PERIOD = 1000


def shares(weights: Sequence[float]) -> np.ndarray:
    """How many of PERIOD positions each source gets, by largest remainder; (num_sources,) int64, summing to PERIOD."""
    exact = np.asarray(weights, float) / sum(weights) * PERIOD
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: PERIOD - counts.sum()]] += 1
    return counts


class Mixture:
    """The sequence of a run over one or more sources. Threads may ask at the same time: a run's account, and its batches."""

    def __init__(self, orders: Sequence[Order | LaneOrder], weights: Sequence[float] = (1.0,)) -> None:
        if len(orders) != len(weights) or not all(w > 0 for w in weights):
            raise UserError(f"{len(orders)} sources have the weights {list(weights)}; give each one above 0")
        self.orders = tuple(orders)
        self._lock = threading.Lock()  # of the orders, which keep what they computed last
        counts = shares(weights)
        if (counts == 0).any():
            raise UserError(
                f"a source has less than {1 / PERIOD:.1%} of the weights {list(weights)}; raise it or leave it out"
            )
        spread = np.concatenate([(np.arange(n) + 0.5) / n for n in counts])
        self._source = np.repeat(np.arange(len(counts)), counts)[np.argsort(spread, kind="stable")]
        self._before = np.zeros((len(counts), PERIOD + 1), np.int64)
        for source in range(len(counts)):
            self._before[source, 1:] = np.cumsum(self._source == source)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    @property
    def num_samples(self) -> int:
        return sum(order.num_samples for order in self.orders)

    def consumed(self, source: int, position: int) -> int:
        """Samples of a source among the run's first `position`."""
        if len(self.orders) == 1:
            return position
        periods, rest = divmod(position, PERIOD)
        return int(periods * self._before[source, PERIOD] + self._before[source, rest])

    @property
    def has_lanes(self) -> bool:
        return any(isinstance(order, LaneOrder) for order in self.orders)

    def by_lane(self, start: int, count: int, chosen: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As `positions`, those of a global batch sorted by lane, and of these the chosen ones only, which is all that is
        computed.

        A source without lanes is small, and is spread over all places.
        """
        periods = np.arange(start, start + count, dtype=np.int64)
        sources = np.zeros(count, np.int64) if len(self.orders) == 1 else self._source[periods % PERIOD]
        places, lanes = np.empty(count, np.int64), np.empty(count, np.int64)
        for source, order in enumerate(self.orders):
            mine = sources == source
            places[mine] = self.consumed(source, start) + np.arange(int(mine.sum()))
            spread = (np.arange(int(mine.sum())) << 32) // max(int(mine.sum()), 1)
            lanes[mine] = order.lane_share(places[mine]) if isinstance(order, LaneOrder) else spread
        rows = np.argsort(lanes, kind="stable")[chosen]
        epochs, samples = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
        for source, order in enumerate(self.orders):
            mine = sources[rows] == source
            wanted = places[rows[mine]]
            if isinstance(order, LaneOrder):
                with self._lock:
                    epochs[mine], samples[mine] = order.at(wanted)
            elif len(wanted):
                begin = int(wanted.min())
                found = self._of(order, begin, int(wanted.max()) - begin + 1)
                epochs[mine], samples[mine] = (a[wanted - begin] for a in found)
        return sources[rows], epochs, samples

    def positions(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(sources, epochs, samples), each (count,) int64; epochs and sample numbers are those of the source."""
        if len(self.orders) == 1:
            return (np.zeros(count, np.int64), *self._of(self.orders[0], start, count))
        sources = self._source[np.arange(start, start + count) % PERIOD]
        epochs, samples = np.empty(count, np.int64), np.empty(count, np.int64)
        for source, order in enumerate(self.orders):
            mine = sources == source
            if mine.any():
                epochs[mine], samples[mine] = self._of(order, self.consumed(source, start), int(mine.sum()))
        return sources, epochs, samples

    def _of(self, order: Order | LaneOrder, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        with self._lock:
            return order.positions(start, count)
