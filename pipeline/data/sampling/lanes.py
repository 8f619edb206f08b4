"""Which sample at which position, for datasets of any size: computed where it is asked for, from five integers and a seed.

    samples are numbered through the shards; a block is `block_samples` neighbours (it may cross a shard's border)
    epoch e: the blocks are permuted by a keyed bijection and dealt to L lanes of q blocks each
    tick k of a lane: part j of the block in slot k - j of the lane, for j = 0 ... W - 1, shuffled: always `block_samples`
    position p of the epoch: sample p div L of lane p mod L; the few samples that are in no block come last, one by one

A global batch holds equally many samples of each lane (L divides it), and goes to ranks lane by lane: a lane belongs to one
rank and its blocks to one host, which reads each of them once. At any moment W blocks of a lane are open. Slots count
cyclically within the lane, so W - 1 blocks of a lane are opened twice an epoch, at its begin and at its end.

Nothing of the size of the dataset is computed or held, and nothing here knows of ranks: `pipeline.data.sampling.order` has the
same laws. How well it mixes: with shards that were shuffled when they were written, as a full shuffle. With shards sorted by
class the variance of class counts in a batch is at most 1 + batch / (L * W) times that of a random draw.
"""

import functools
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.data.sampling.bijection import Bijection, keyed
from pipeline.errors import UserError

MIN_TURNS = 50
"""Blocks of a lane for each block of its window, at least: what is opened twice an epoch stays below a fiftieth."""
DEFAULT_LANES = 512
"""At most, where a run does not say: more hosts than lanes would read blocks twice."""
_PERMUTE, _SHUFFLE = 3, 4  # which random words of an epoch; 1 and 2 are those of `order`
_SLACK = 16  # blocks of a lane may be this much off, as a part, so that few samples are left over
_TRIED = 4096
_PIECE = 1 << 20


@dataclass(frozen=True, kw_only=True)
class LaneLayout:
    """How an epoch of `num_samples` is cut. Samples in no block are spread evenly over the dataset."""

    num_samples: int
    lanes: int
    window: int
    """Blocks of a lane that are open at a time."""
    blocks_per_lane: int
    block_samples: int

    def __getstate__(self) -> dict[str, Any]:  # what was computed stays behind when a worker gets a copy
        return {name: value for name, value in self.__dict__.items() if name != "singles"}

    @property
    def num_blocks(self) -> int:
        return self.lanes * self.blocks_per_lane

    @property
    def num_in_blocks(self) -> int:
        return self.num_blocks * self.block_samples

    @property
    def reread_share(self) -> float:
        """Of the dataset, what an epoch reads a second time."""
        return (self.window - 1) / self.blocks_per_lane

    @functools.cached_property
    def singles(self) -> np.ndarray:
        """Samples in no block, rising, (num_samples - num_in_blocks,) int64."""
        num = self.num_samples - self.num_in_blocks
        return (2 * np.arange(num, dtype=np.int64) + 1) * self.num_samples // (2 * max(num, 1))

    def samples(self, members: np.ndarray) -> np.ndarray:
        """Number among the samples in blocks -> number in the dataset; int64."""
        singles = self.singles
        return members + np.searchsorted(singles - np.arange(len(singles)), members, side="right")

    def block_of(self, samples: np.ndarray) -> np.ndarray:
        """Block of each sample, -1 for one in no block; int64."""
        singles = self.singles
        before = np.searchsorted(singles, samples, side="left")
        is_single = (
            singles[np.minimum(before, len(singles) - 1)] == samples if len(singles) else np.zeros(len(samples), bool)
        )
        return np.where(is_single, -1, (samples - before) // self.block_samples)

    def span(self, block: int) -> tuple[int, int]:
        """First sample of a block and the one after its last."""
        ends = np.array([block * self.block_samples, (block + 1) * self.block_samples - 1], np.int64)
        first, last = self.samples(ends).tolist()
        return first, last + 1


def lane_layout(
    num_samples: int, *, block_samples: int, lanes: int, window: int, min_turns: int = MIN_TURNS
) -> LaneLayout | None:
    """Lanes of blocks of about `block_samples`; None where the dataset is too small for them.

    Of the numbers of blocks near the one asked for, that which leaves the fewest samples in no block.
    """
    goal = num_samples // (lanes * block_samples)
    if goal < min_turns * window:
        return None
    slack = goal // _SLACK
    tried = np.arange(goal - slack, goal + slack + 1, dtype=np.int64)[:_TRIED]
    per_lane = int(tried[np.argmin(num_samples % (lanes * tried))])
    return LaneLayout(
        num_samples=num_samples,
        lanes=lanes,
        window=window,
        blocks_per_lane=per_lane,
        block_samples=num_samples // (lanes * per_lane),
    )


def choose_layout(num_samples: int, *, block_samples: int, lanes: int, window: int, batch: int) -> LaneLayout | None:
    """The layout of a run; with `lanes` 0 for as many lanes as dataset and batch allow. None = the set is small, shuffle it
    whole.

    Args:
        batch: different samples in a global batch.
    Raises:
        UserError: the lanes that were asked for do not fit the batch or the dataset.
    """
    if lanes:
        if batch % lanes:
            fitting = max(n for n in range(1, lanes + 1) if batch % n == 0)
            raise UserError(
                f"data.lanes is {lanes}, which does not divide the {batch} different samples of a global batch, so lanes "
                f"would wander from rank to rank; set it to a divisor, as {fitting}"
            )
        found = lane_layout(num_samples, block_samples=block_samples, lanes=lanes, window=window)
        if found is None:
            most = num_samples // (block_samples * window * MIN_TURNS)
            advice = (
                f"set it to at most {most}" if most else "set data.order to windowed, which suits a set of this size"
            )
            raise UserError(
                f"data.lanes is {lanes}, and {num_samples} samples in blocks of {block_samples} give a lane less than "
                f"{MIN_TURNS} times its window of {window} blocks; {advice}"
            )
        return found
    for candidate in range(min(DEFAULT_LANES, batch), 0, -1):
        if batch % candidate == 0:
            found = lane_layout(num_samples, block_samples=block_samples, lanes=candidate, window=window)
            if found is not None:
                return found
    return None


class LaneOrder:
    """The order of samples of one split, epoch after epoch; the interface of `pipeline.data.sampling.order.Order`."""

    def __init__(self, layout: LaneLayout, seed: int) -> None:
        self.layout, self.seed = layout, seed
        self._edges = np.arange(layout.window + 1) * layout.block_samples // layout.window
        self._part = np.repeat(np.arange(layout.window), np.diff(self._edges))
        self._ticks: OrderedDict[tuple[int, int, int], np.ndarray] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:  # what was computed stays behind when a worker gets a copy
        return {**self.__dict__, "_ticks": OrderedDict()}

    @property
    def num_samples(self) -> int:
        return self.layout.num_samples

    def lane_share(self, positions: np.ndarray) -> np.ndarray:
        """Where among all lanes each of the run's positions lies, 0 to 2^32; int64. Equal for the samples of a lane."""
        return (positions % self.num_samples % self.layout.lanes << 32) // self.layout.lanes

    def positions(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, samples), both (count,) int64, of the run's positions start ... start + count - 1."""
        return self.at(np.arange(start, start + count, dtype=np.int64))

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, samples), both (n,) int64, of any positions of the run; costs what their lanes cost."""
        epochs, places = np.divmod(positions, self.num_samples)
        samples = np.empty(len(positions), np.int64)
        for epoch in np.unique(epochs).tolist():
            rows = np.flatnonzero(epochs == epoch)
            in_blocks = places[rows] < self.layout.num_in_blocks
            samples[rows[in_blocks]] = self._in_blocks(epoch, places[rows[in_blocks]])
            if not in_blocks.all():
                key = np.random.PCG64([self.seed, epoch, _SHUFFLE]).random_raw(2)[0]
                singles = self.layout.singles
                singles = singles[np.argsort(keyed(singles, np.uint64(key)), kind="stable")]
                samples[rows[~in_blocks]] = singles[places[rows[~in_blocks]] - self.layout.num_in_blocks]
        return epochs, samples

    def _in_blocks(self, epoch: int, places: np.ndarray) -> np.ndarray:
        layout = self.layout
        index, lane = np.divmod(places, layout.lanes)
        tick, place = np.divmod(index, layout.block_samples)
        pairs, inverse = np.unique(lane * layout.blocks_per_lane + tick, return_inverse=True)
        wanted = [(epoch, *divmod(pair, layout.blocks_per_lane)) for pair in pairs.tolist()]
        missing = [tick for tick in wanted if tick not in self._ticks]
        step = max(1, _PIECE // (layout.window * layout.block_samples))
        for begin in range(0, len(missing), step):
            piece = missing[begin : begin + step]
            made = self._make_ticks(epoch, np.array([t[1:] for t in piece], np.int64))
            self._ticks.update(zip(piece, made, strict=True))
        rows = (
            np.stack([self._ticks[tick] for tick in wanted])
            if wanted
            else np.empty((0, layout.block_samples), np.int64)
        )
        # What the next batch needs again: the newest tick of each lane, and the one that it may be in.
        while len(self._ticks) > 2 * max(layout.lanes, len(wanted)):
            self._ticks.popitem(last=False)
        return rows[inverse, place]

    def _make_ticks(self, epoch: int, ticks: np.ndarray) -> np.ndarray:
        """(n, block_samples) samples of n ticks, given as (n, 2): lane, number."""
        layout, size = self.layout, self.layout.block_samples
        permute, shuffle = np.random.PCG64([self.seed, epoch, _SHUFFLE]).random_raw(2)
        lane, tick = ticks[:, :1], ticks[:, 1:]
        slots = (tick - np.arange(layout.window)) % layout.blocks_per_lane + lane * layout.blocks_per_lane
        blocks = Bijection(layout.num_blocks, self.seed, epoch, _PERMUTE)(slots.ravel()).reshape(slots.shape)
        members = blocks[..., None] * size + np.arange(size)  # (n, W, B)
        inner = np.argsort(keyed(members, permute), axis=2, kind="stable")
        chosen = (blocks[..., None] * size + inner)[:, self._part, np.arange(size)]
        order = np.argsort(keyed(chosen, shuffle), axis=1, kind="stable")
        return layout.samples(np.take_along_axis(chosen, order, axis=1))
