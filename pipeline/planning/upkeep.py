"""Checkpoints against failures: how often to save, and what failures cost (Young 1974; Daly 2006).

With a save that costs C seconds of training, a mean time M between failures, and R seconds to be back, saving every T seconds
loses the share C / T + (T / 2 + R) / M. It is least at T = sqrt(2 C M) (Young, doi:10.1145/361147.361115); Daly
(doi:10.1016/j.future.2004.11.016, eq. 37) has the next terms, for T near M.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Upkeep:
    cost_s: float
    """Of a save, for training."""
    mean_time_s: float
    """Between failures of the whole job; infinite where none is expected."""
    restart_s: float

    def lost_share(self, every_s: float) -> float:
        """Of all time: saves, work done again, restarts."""
        return min(self.cost_s / every_s + (every_s / 2 + self.restart_s) / self.mean_time_s, 1.0)

    def best_s(self) -> float:
        """Daly's interval between the ends of saves."""
        c, m = self.cost_s, self.mean_time_s
        if math.isinf(m):
            return math.inf
        if c >= 2 * m:
            return m
        x = math.sqrt(c / (2 * m))
        return math.sqrt(2 * c * m) * (1 + x / 3 + x * x / 9) - c

    def longest_s(self, loss: float) -> float | None:
        """The rarest saving that loses no more than this share; None where no saving does."""
        if math.isinf(self.mean_time_s):
            return math.inf
        # T^2 / 2M - (loss - R / M) T + C = 0, the larger root.
        b = loss - self.restart_s / self.mean_time_s
        root = b * b - 2 * self.cost_s / self.mean_time_s
        return None if b <= 0 or root < 0 else self.mean_time_s * (b + math.sqrt(root))
