"""Random numbers that are a pure function of integers: the same on every machine, worker and NumPy version.

NumPy promises no stable stream for its distributions (NEP 19), and making one of its generators costs as much as drawing a
whole crop. BLAKE2b in counter mode costs a tenth of that and is the same everywhere.
"""

import hashlib
import struct

_BLOCK = struct.Struct("<8Q")


class Draws:
    """An endless stream of draws from a key of integers, such as (seed, epoch, sample)."""

    __slots__ = ("_block", "_key", "_words")

    def __init__(self, *key: int) -> None:
        self._key = struct.pack(f"<{len(key)}q", *key)
        self._block = 0
        self._words: list[int] = []

    def unit(self) -> float:
        """Uniform in [0, 1), 53 bits."""
        if not self._words:
            digest = hashlib.blake2b(self._key, salt=self._block.to_bytes(16, "little")).digest()
            self._words = list(_BLOCK.unpack(digest))
            self._block += 1
        return (self._words.pop() >> 11) * 2.0**-53

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self.unit()

    def below(self, count: int) -> int:
        """A whole number from 0 to count - 1."""
        return int(self.unit() * count)

    def coin(self) -> bool:
        return self.unit() < 0.5

    def signed(self, value: float) -> float:
        """`value` or its negative."""
        return value if self.coin() else -value

    def beta(self, alpha: float) -> float:
        """Beta(alpha, alpha) in [0, 1] for 0 < alpha <= 1 (Joehnk 1964: u^(1/a) / (u^(1/a) + v^(1/a)) where the sum is <= 1)."""
        if alpha == 1:
            return self.unit()
        while True:
            x, y = self.unit() ** (1 / alpha), self.unit() ** (1 / alpha)
            if 0 < x + y <= 1:
                return x / (x + y)
