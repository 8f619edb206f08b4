"""All pairs of 64-bit hashes within a Hamming distance, without comparing each with each.

Multi-index hashing (Norouzi, Punjani, Fleet, CVPR 2012): cut into 4 blocks of 16 bits, two hashes within distance
r = 4 q + s differ by at most q bits in one of the first s + 1 blocks, or by at most q - 1 in one of the others. For each
block the hashes of one side are sorted; those of the other look up the block's value and its neighbours.
"""

import itertools
from collections.abc import Iterator

import numpy as np

_BLOCKS, _BLOCK_BITS = 4, 16
MAX_RADIUS = 11
"""Above, the neighbours of a block are so many that comparing all with all is faster."""
_CHUNK = 1 << 22  # candidate pairs at a time: some 100 MB


def hash_pairs(a: np.ndarray, b: np.ndarray, radius: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places in `a`, places in `b` and distances of all pairs with at most `radius` different bits, in order of (b, a).

    Args:
        a, b: uint64, (N,) and (M,). Equal hashes in both are worked on once.
    """
    if not 0 <= radius <= MAX_RADIUS:
        raise ValueError(f"radius {radius} must be from 0 to {MAX_RADIUS}")
    ua, of_a = np.unique(a, return_inverse=True)
    ub, of_b = np.unique(b, return_inverse=True)
    found = [np.zeros(0, np.int64)]
    for block in range(_BLOCKS):
        flips = radius // _BLOCKS - (block > radius % _BLOCKS)
        found += [ia * len(ub) + ib for ia, ib in _block_pairs(ua, ub, block, radius, flips)]
    pairs = np.unique(np.concatenate(found))
    ia, ib = np.divmod(pairs, max(1, len(ub)))
    distance = np.bitwise_count(ua[ia] ^ ub[ib]).astype(np.int64)
    places, left = _expand(of_a, ia, len(ua))
    ib, distance = ib[left], distance[left]
    in_b, left = _expand(of_b, ib, len(ub))
    in_a, distance = places[left], distance[left]
    order = np.lexsort((in_a, in_b))
    return in_a[order], in_b[order], distance[order]


def _block_pairs(
    ua: np.ndarray, ub: np.ndarray, block: int, radius: int, max_flips: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of places that agree in one block up to `max_flips` bits, and in all up to `radius`."""
    shift, mask = np.uint64(block * _BLOCK_BITS), np.uint64((1 << _BLOCK_BITS) - 1)
    block_a, block_b = ((values >> shift & mask).astype(np.int64) for values in (ua, ub))
    order = np.argsort(block_a, kind="stable")
    ordered = ua[order]  # so that what is compared with one hash lies side by side in memory
    starts = np.searchsorted(block_a[order], np.arange((1 << _BLOCK_BITS) + 1))
    for flips in range(max_flips + 1):
        for bits in itertools.combinations(range(_BLOCK_BITS), flips):
            value = block_b ^ sum(1 << bit for bit in bits)
            low, counts = starts[value], starts[value + 1] - starts[value]
            ends = np.cumsum(counts)
            begin = 0
            while begin < len(ub):
                done = ends[begin - 1] if begin else 0
                stop = max(begin + 1, int(np.searchsorted(ends, done + _CHUNK, side="right")))
                ib = np.repeat(np.arange(begin, stop), counts[begin:stop])
                within = np.arange(len(ib)) - np.repeat(
                    ends[begin:stop] - counts[begin:stop] - done, counts[begin:stop]
                )
                places = np.repeat(low[begin:stop], counts[begin:stop]) + within
                near = np.bitwise_count(ordered[places] ^ ub[ib]) <= radius
                yield order[places[near]], ib[near]
                begin = stop


def _expand(inverse: np.ndarray, groups: np.ndarray, num_groups: int) -> tuple[np.ndarray, np.ndarray]:
    """All members of each of `groups` (numbers in `inverse`): their places, and the place of their group in `groups`."""
    order = np.argsort(inverse, kind="stable")
    starts = np.searchsorted(inverse[order], np.arange(num_groups + 1))
    counts = starts[groups + 1] - starts[groups]
    left = np.repeat(np.arange(len(groups)), counts)
    within = np.arange(len(left)) - np.repeat(np.cumsum(counts) - counts, counts)
    return order[starts[groups][left] + within], left
