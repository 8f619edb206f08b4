"""Several datasets in given shares: which source at which position of the run, as pure as the order within each.

A period of 1,000 positions holds each source as often as its weight says, spread evenly, so that the share realised between
any two positions is off by a few samples at most. Source i is read in its own order and starts its own next epoch when it
is through: each of its samples comes once before any comes twice.
"""

from collections.abc import Sequence

import numpy as np

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
    """The sequence of a run over one or more sources."""

    def __init__(self, orders: Sequence[Order], weights: Sequence[float] = (1.0,)) -> None:
        if len(orders) != len(weights) or not all(w > 0 for w in weights):
            raise UserError(f"{len(orders)} sources have the weights {list(weights)}; give each one above 0")
        self.orders = tuple(orders)
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

    @property
    def num_samples(self) -> int:
        return sum(order.num_samples for order in self.orders)

    def consumed(self, source: int, position: int) -> int:
        """Samples of a source among the run's first `position`."""
        if len(self.orders) == 1:
            return position
        periods, rest = divmod(position, PERIOD)
        return int(periods * self._before[source, PERIOD] + self._before[source, rest])

    def positions(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(sources, epochs, samples), each (count,) int64; epochs and sample numbers are those of the source."""
        if len(self.orders) == 1:
            return (np.zeros(count, np.int64), *self.orders[0].positions(start, count))
        sources = self._source[np.arange(start, start + count) % PERIOD]
        epochs, samples = np.empty(count, np.int64), np.empty(count, np.int64)
        for source, order in enumerate(self.orders):
            mine = sources == source
            if mine.any():
                epochs[mine], samples[mine] = order.positions(self.consumed(source, start), int(mine.sum()))
        return sources, epochs, samples
