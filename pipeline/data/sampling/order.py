"""Which sample at which position: a pure function of (blocks, seed, epoch). No files, no torch, no state.

    shards are cut into blocks      neighbours in a shard, about `block_bytes` together: one range request reads one
    epoch e: blocks permuted        b3 b9 b1 b7 b2 b8 b0 ...                       over all shards, by (seed, e)
             samples spread         each sample of the k-th block gets a key, uniform in [k, k + mix_blocks)
             sorted by key          the order

The position of a run is one integer, the samples consumed since its start: sample c of the run is position c mod N of epoch
c div N. Nothing here knows of ranks or workers, so the sequence is the same for any number of them.

At any moment the samples come from a sliding window of `mix_blocks` blocks from anywhere in the dataset, and one block enters
as one leaves: the shuffle is good, reading stays in large pieces, and a reader never has to fetch a whole window at once.
With `mix_blocks` 0 the order is the full permutation.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np

KEPT_CHUNKS = 4
_BLOCKS, _SAMPLES = 1, 2  # which random stream of an epoch
_UNIT_BITS = 20  # keys are whole numbers, 2^20 to a block: the same on every machine
_PIECE = 1 << 20


def permutation(num: int, *seed: int) -> np.ndarray:
    """A permutation of range(num) from integers, (num,) int64.

    Sorts raw words of PCG64 instead of calling `Generator.permutation`: NumPy promises never to change the former's stream
    (NEP 19), and makes no such promise for the latter. A stable sort breaks the (2^-64) ties the same way everywhere.
    """
    words = np.random.PCG64(list(seed)).random_raw(num)
    return np.argsort(words, kind="stable").astype(np.int64)


@dataclass(frozen=True, eq=False)
class Blocks:
    """Runs of neighbouring samples of one shard; arrays (num_blocks,). Samples are numbered in the order of the blocks."""

    first: np.ndarray
    """int64, number of the block's first sample."""
    count: np.ndarray

    @property
    def num_samples(self) -> int:
        return int(self.first[-1] + self.count[-1]) if len(self.first) else 0


def cut_blocks(shard: np.ndarray, offset: np.ndarray, block_bytes: int) -> Blocks:
    """Blocks of samples whose first bytes lie in the same `block_bytes` of their shard; 0 = each sample by itself.

    Args:
        shard: (num_samples,) number of each sample's shard; never falls.
        offset: (num_samples,) byte at which it starts there. Where offsets fall, a new block begins.
    """
    if block_bytes > 0:
        part = offset.astype(np.int64) // block_bytes
        starts = np.flatnonzero((np.diff(shard, prepend=-1) != 0) | (np.diff(part, prepend=-1) != 0))
    else:
        starts = np.arange(len(shard))
    starts = starts.astype(np.int64)
    return Blocks(starts, np.diff(starts, append=len(shard)))


@dataclass(frozen=True, eq=False)
class _Epoch:
    """One epoch in outline: which block is the k-th, how far each sample is moved, where each chunk of positions begins."""

    blocks: np.ndarray
    moves: np.ndarray
    """(num_samples,) uint32: 2^32 is the whole window."""
    chunk_starts: np.ndarray
    """(num_chunks + 1,) position of each chunk's first sample."""


class Order:
    """The order of samples of one split, epoch after epoch.

    Args:
        blocks: from `cut_blocks`; samples have the numbers 0 ... num_samples - 1.
        mix_blocks: blocks that samples come from at any moment; 0 = all.
    """

    def __init__(self, blocks: Blocks, seed: int, mix_blocks: int = 256) -> None:
        self.blocks, self.seed = blocks, seed
        self._mix_blocks = mix_blocks
        self._chunk_blocks = max(1, mix_blocks // 8)
        self._epoch: tuple[int, _Epoch] | None = None
        self._chunks: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:  # what was computed stays behind when a worker gets a copy
        return {**self.__dict__, "_epoch": None, "_chunks": OrderedDict()}

    @property
    def num_samples(self) -> int:
        return self.blocks.num_samples

    def positions(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, samples), both (count,) int64, of the run's positions start ... start + count - 1."""
        epochs, samples = np.empty(count, np.int64), np.empty(count, np.int64)
        done = 0
        while done < count:
            epoch, offset = divmod(start + done, self.num_samples)
            if self._epoch is None or self._epoch[0] != epoch:
                self._epoch = (epoch, self._outline(epoch))
            outline = self._epoch[1]
            chunk = int(np.searchsorted(outline.chunk_starts, offset, side="right")) - 1
            members = self._chunk(epoch, outline, chunk)[offset - int(outline.chunk_starts[chunk]) :][: count - done]
            samples[done : done + len(members)], epochs[done : done + len(members)] = members, epoch
            done += len(members)
        return epochs, samples

    def _outline(self, epoch: int) -> _Epoch:
        words = np.random.PCG64([self.seed, epoch, _SAMPLES]).random_raw(self.num_samples)
        if self._mix_blocks == 0:
            return _Epoch(np.argsort(words, kind="stable"), np.empty(0, np.uint32), np.array([0, self.num_samples]))
        moves = (words >> np.uint64(32)).astype(np.uint32)
        del words
        order = permutation(len(self.blocks.first), self.seed, epoch, _BLOCKS)
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        sizes = np.zeros((len(order) + self._mix_blocks) // self._chunk_blocks + 1, np.int64)
        # Piece by piece, for ten million would take much memory at once.
        for begin in range(0, self.num_samples, _PIECE):
            piece = np.arange(begin, min(begin + _PIECE, self.num_samples))
            block = np.searchsorted(self.blocks.first, piece, side="right") - 1
            sizes += np.bincount(self._keys(place[block], moves[piece]) // self._per_chunk, minlength=len(sizes))
        return _Epoch(order, moves, np.concatenate([[0], np.cumsum(sizes)]))

    @property
    def _per_chunk(self) -> int:
        return self._chunk_blocks << _UNIT_BITS

    def _keys(self, place: np.ndarray, moves: np.ndarray) -> np.ndarray:
        """Sort keys of samples whose blocks have these places in the epoch, int64."""
        moved = moves.astype(np.uint64) * np.uint64(self._mix_blocks) >> np.uint64(32 - _UNIT_BITS)
        return (place << _UNIT_BITS) + moved.astype(np.int64)

    def _chunk(self, epoch: int, outline: _Epoch, chunk: int) -> np.ndarray:
        """The samples whose keys lie in a chunk, in order."""
        if self._mix_blocks == 0:
            return outline.blocks
        found = self._chunks.get((epoch, chunk))
        if found is None:
            end = (chunk + 1) * self._chunk_blocks
            places = np.arange(
                max(0, chunk * self._chunk_blocks - self._mix_blocks), min(end, len(outline.blocks)), dtype=np.int64
            )
            blocks = outline.blocks[places]
            count = self.blocks.count[blocks]
            begin = np.cumsum(count) - count
            numbers = np.repeat(self.blocks.first[blocks] - begin, count) + np.arange(int(count.sum()))
            keys = self._keys(np.repeat(places, count), outline.moves[numbers])
            inside = keys // self._per_chunk == chunk
            numbers = numbers[inside]
            found = numbers[np.lexsort((numbers, keys[inside]))]
            self._chunks[epoch, chunk] = found
            if len(self._chunks) > KEPT_CHUNKS:
                self._chunks.popitem(last=False)
        return found


def rank_share(positions: np.ndarray, *, rank: int, num_ranks: int, micro_batch: int) -> np.ndarray:
    """The positions of one global batch that one rank computes, (accumulation, micro_batch).

    Args:
        positions: (global_batch,), global_batch = accumulation * num_ranks * micro_batch.
    """
    return positions.reshape(-1, num_ranks, micro_batch)[:, rank]
