"""What the processes of a fine-tuning trial agree on: when to save, whose scores are whose, what all of them used.

Most trials are one process, for which all of it is free.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from pipeline import distributed
from pipeline.distributed import World
from pipeline.training.evaluate import Scores
from transfer.measurement.resource_usage import Memory, Power

SAVE_SHARE = 0.05
"""A trial's state is saved once a pass over its images, while saving takes no more than this share of its time: a kill costs it
at most a pass, or, where passes are short, 20 times what a save takes."""
FIRST_SAVE_S = 0.1
"""What the first save of a trial is taken to cost; from then on it is measured."""


class SavePace:
    """Whether a save that is due is worth its time, agreed over all ranks: see `SAVE_SHARE`."""

    def __init__(self, me: World, now: Callable[[], float] = time.perf_counter) -> None:
        self._me, self._now = me, now
        self._cost_s = FIRST_SAVE_S
        self._since_s = now()
        """The end of the last save, or the start."""
        self._asked_s = self._since_s

    def __call__(self) -> bool:
        self._asked_s = self._now()
        is_worth = self._cost_s <= SAVE_SHARE * (self._asked_s - self._since_s)
        return bool(distributed.broadcast(self._me, is_worth))

    def saved(self) -> None:
        """The save that was allowed last is over."""
        self._since_s = self._now()
        self._cost_s = self._since_s - self._asked_s


def whole(scores: Scores, me: World) -> Scores:
    """A collective: each rank r of R has the places r, r + R, ... of a split, and all get it whole, in its order."""
    shares: list[Any] = distributed.gather(me, scores)

    def interleaved(columns: list[np.ndarray]) -> np.ndarray:
        out = np.empty((sum(map(len, columns)), *columns[0].shape[1:]), columns[0].dtype)
        for rank, column in enumerate(columns):
            out[rank :: len(columns)] = column
        return out

    return dataclasses.replace(
        shares[0],
        samples=interleaved([s.samples for s in shares]),
        labels=interleaved([s.labels for s in shares]),
        logits=interleaved([s.logits for s in shares]),
    )


def used(memory: Memory, power: Power, me: World) -> dict[str, Any]:
    """max_memory_bytes and watts over all processes: a GPU is one process's, the machine's processors are everybody's."""
    gathered: list[Any] = distributed.gather(me, (memory.max_bytes(), power.watts()))
    watts: dict[str, float] = dict(gathered[0][1])
    if "gpu" in watts:
        watts["gpu"] = sum(w.get("gpu", 0.0) for _, w in gathered)
    return {"max_memory_bytes": max(b for b, _ in gathered), "watts": watts}
