"""Which sample at which position: a pure function of (shard sizes, seed, epoch). No files, no torch, no state.

    epoch e:   shards permuted by (seed, e)          s7 s2 s9 s0 | s4 s1 s8 s3 | ...
    window w:  `window_shards` neighbours            [   w = 0   ] [   w = 1   ]
               their samples permuted by (seed, e, w)

The position of a run is one integer, the samples consumed since its start: sample c of the run is position c mod N of epoch
c div N. Nothing here knows of ranks or workers, so the sequence is the same for any number of them. A window bounds how
many shards a reader has open at once, and how much has to be computed to start anywhere.

A reader that streams from object storage wants small windows; mixing within a window is exact (uniform over its samples),
and which shards meet in a window changes every epoch. Shards are written in shuffled order (`pipeline.data.prepare`), so
even a window of one shard sees all classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


def permutation(num: int, *seed: int) -> np.ndarray:
    """A permutation of range(num) from integers, (num,) int64.

    Sorts raw words of PCG64 instead of calling `Generator.permutation`: NumPy promises never to change the former's stream
    (NEP 19), and makes no such promise for the latter. A stable sort breaks the (2^-64) ties the same way everywhere.
    """
    words = np.random.PCG64(list(seed)).random_raw(num)
    return np.argsort(words, kind="stable").astype(np.int64)


@dataclass(frozen=True)
class Order:
    """The order of samples of one split.

    Samples are numbered shard by shard: shard k holds the numbers sum(shard_counts[:k]) ... + shard_counts[k] - 1.
    """

    shard_counts: tuple[int, ...]
    seed: int
    window_shards: int = 16

    @property
    def num_samples(self) -> int:
        return sum(self.shard_counts)

    def positions(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, samples), both (count,) int64, of the run's positions start ... start + count - 1."""
        per_epoch = self.num_samples
        epochs, samples = [], []
        while count > 0:
            epoch, offset = divmod(start, per_epoch)
            take = min(count, per_epoch - offset)
            samples.append(self._within_epoch(epoch, offset, take))
            epochs.append(np.full(take, epoch, dtype=np.int64))
            start, count = start + take, count - take
        return np.concatenate(epochs), np.concatenate(samples)

    def _within_epoch(self, epoch: int, offset: int, count: int) -> np.ndarray:
        counts = np.asarray(self.shard_counts, dtype=np.int64)
        first_of_shard = np.cumsum(counts) - counts
        shards = permutation(len(counts), self.seed, epoch)
        pieces = []
        begin = 0
        for window, i in enumerate(range(0, len(shards), self.window_shards)):
            members = shards[i : i + self.window_shards]
            end = begin + int(counts[members].sum())
            if begin < offset + count and offset < end:
                numbers = np.concatenate([first_of_shard[s] + np.arange(counts[s]) for s in members])
                mixed = numbers[permutation(len(numbers), self.seed, epoch, window)]
                pieces.append(mixed[max(offset - begin, 0) : offset + count - begin])
            begin = end
        return np.concatenate(pieces)


def rank_share(positions: np.ndarray, *, rank: int, num_ranks: int, micro_batch: int) -> np.ndarray:
    """The positions of one global batch that one rank computes, (accumulation, micro_batch).

    Args:
        positions: (global_batch,), global_batch = accumulation * num_ranks * micro_batch.
    """
    return positions.reshape(-1, num_ranks, micro_batch)[:, rank]
