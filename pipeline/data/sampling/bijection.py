"""A keyed permutation of range(n) that is computed where it is asked for, without a table.

A Feistel network over two digits of mixed radix (Luby and Rackoff 1988), walked along its cycle until the value lies below n
(Black and Rogaway 2002). The arithmetic is part of the format of a run: `tests/pipeline/data/sampling/test_lanes.py` holds
stored values.
"""

import numpy as np

ROUNDS = 8
_STEP = np.uint64(0x9E3779B97F4A7C15)


def mix(words: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): a bijection of 64-bit words whose output looks random; uint64."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def keyed(numbers: np.ndarray, key: np.uint64) -> np.ndarray:
    """Words that look random, one for each number; another key gives others. uint64, wraps around."""
    return mix(numbers.astype(np.uint64) * _STEP + key)


class Bijection:
    """A permutation of range(num) from integers; about 1 us a value in arrays."""

    def __init__(self, num: int, *seed: int) -> None:
        self.num = num
        self._high = max(1, int(np.ceil(np.sqrt(num))))
        self._low = -(-num // self._high)
        # Raw words: NumPy promises never to change them (NEP 19).
        self._keys = np.random.PCG64(list(seed)).random_raw(ROUNDS)

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """(n,) int64 below `num` -> where each of them goes, (n,) int64."""
        found = np.array(values, np.int64)
        outside = np.ones(len(found), bool)
        while outside.any():  # hardly ever a second time: high x low is just above num
            found[outside] = self._once(found[outside])
            outside = found >= self.num
        return found

    def _once(self, values: np.ndarray) -> np.ndarray:
        high, low = np.divmod(values, self._low)
        for i, key in enumerate(self._keys):
            if i % 2:
                low = (low + (keyed(high, key) >> np.uint64(1)).astype(np.int64)) % self._low
            else:
                high = (high + (keyed(low, key) >> np.uint64(1)).astype(np.int64)) % self._high
        return high * self._low + low
