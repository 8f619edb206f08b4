"""Does a resumed run go on as the one that was saved? What a checkpoint says of itself, held against what came of it.

    in the commit file (`Expected`)      compared with
    sums over the state of each kind     the same sums over the engine's after the restore: state is wrong, missing or exchanged
    digest of the next step's samples    those that the loader gave for it: another order, or another place in it
    losses, gradient norms before it     the first ones after it (`pipeline.engine.loss_window`): whatever else went wrong

The first two are exact, and a difference is a fault; the third is a test that can err. All ranks see the same numbers and come
to the same result. What ends the run is configured (`saving.stop_after_resume`).
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np

from pipeline import distributed
from pipeline.checkpoint.commit import Expected
from pipeline.checkpoint.saving_config import StopAfterResume
from pipeline.distributed import World
from pipeline.engine import loss_window
from pipeline.engine.update_stats import UpdateStats
from pipeline.errors import UserError
from pipeline.records import Deviation

TOLERANCE = 1e-6
"""Relative, of the sums: they are added up in fp64, in another order where the layout is another."""
KINDS = {
    "weights": "the weights",
    "momentum": "the optimiser's momentum",
    "momentum_buffer": "the optimiser's momentum",
    "exp_avg": "the optimiser's first moment",
    "exp_avg_sq": "the optimiser's second moment",
    "ema": "the averaged weights",
}


class ResumeCheck:
    """One rank's; every rank calls the same methods at the same steps."""

    def __init__(self, stop: StopAfterResume, world: World) -> None:
        self._stop, self._world = stop, world
        self._losses: deque[float] = deque(maxlen=loss_window.WINDOW)
        self._norms: deque[float] = deque(maxlen=loss_window.WINDOW)
        self._expected: Expected | None = None
        self._after: list[tuple[float, float]] = []
        self._next_samples = ""
        self._pending: list[Deviation] = []

    def expected(self, sums: dict[str, float], numbers: np.ndarray) -> Expected:
        """For a checkpoint of now; `sums`: of the engine's state, `numbers`: of the samples of all ranks at the next step."""
        return {
            "sums": {kind: total for kind, total in sums.items() if math.isfinite(total)},  # JSON takes no others
            "next_samples": digest(numbers),
            "losses": list(self._losses),
            "gradient_norms": list(self._norms),
        }

    def restored(self, step: int, expected: Expected | None, sums: dict[str, float], *, same_data: bool) -> None:
        """The state of a checkpoint was restored; `judge` says what was found.

        Args:
            expected: what the checkpoint says; None of one of an earlier version, of which nothing is known.
            sums: of the engine's state now.
            same_data: nothing was configured that gives the next step other samples than the checkpoint's run meant.
        """
        self._expected, self._after, self._next_samples = expected, [], ""
        self._losses.clear()
        self._norms.clear()
        if expected is None:
            return
        self._losses.extend(expected["losses"])
        self._norms.extend(expected["gradient_norms"])
        self._next_samples = expected["next_samples"] if same_data else ""
        for kind, was in expected["sums"].items():
            now = sums.get(kind, 0.0)
            if not math.isclose(now, was, rel_tol=TOLERANCE):
                what = KINDS.get(kind, kind)
                text = f"restored were other values of {what} than were saved (their sums are {now:.9g} and {was:.9g})"
                self._find(step, "state", text)

    def updated(self, step: int, stats: UpdateStats, numbers: Sequence[np.ndarray]) -> Iterator[Deviation]:
        """Takes in the update before `step`; `numbers`: this rank's samples of it."""
        if self._next_samples:
            self._compare_samples(step, stats, numbers)
        if stats.applied:
            if self._expected is not None:
                self._after.append((stats.loss, stats.gradient_norm))
                if len(self._after) == loss_window.FIRST:
                    self._compare_numbers(step)
            self._losses.append(stats.loss)
            self._norms.append(stats.gradient_norm)
        yield from self.judge()

    def _compare_samples(self, step: int, stats: UpdateStats, numbers: Sequence[np.ndarray]) -> None:
        due, self._next_samples = self._next_samples, ""
        if stats.num_lost:  # others took the places of those
            return
        parts = distributed.gather(self._world, np.concatenate(list(numbers)))
        if digest(np.concatenate(parts)) != due:
            text = f"step {step} got other samples than the checkpoint names: the order, or the place in it, is another"
            self._find(step, "samples", text)

    def _compare_numbers(self, step: int) -> None:
        assert self._expected is not None
        losses, norms = zip(*self._after, strict=True)
        logs = [math.log(max(n, 1e-30)) for n in self._expected["gradient_norms"]]
        found = {
            "losses": loss_window.compare(self._expected["losses"], losses),
            "gradient norms": loss_window.compare(logs, [math.log(max(n, 1e-30)) for n in norms]),
        }
        for what, result in found.items():
            if result is not None and result.deviates:
                was, now = result.expected, result.found
                if what != "losses":
                    was, now = math.exp(was), math.exp(now)
                text = (
                    f"the median of the first {loss_window.FIRST} {what} is {now:.4g}, where those before the checkpoint let "
                    f"{was:.4g} be expected: {result.score:.1f} times their noise, above {loss_window.LIMIT:g}"
                )
                self._find(step, what, text, score=result.score)
        self._expected = None

    def _find(self, step: int, what: str, text: str, *, score: float | None = None) -> None:
        self._pending.append(Deviation(step=step, what=what, text=text, is_certain=score is None, score=score))

    def judge(self) -> Iterator[Deviation]:
        """What was found since; UserError where the configuration ends the run for it."""
        found, self._pending = self._pending, []
        yield from found
        ends = [f for f in found if self._stop == "any" or (self._stop == "certain" and f.is_certain)]
        if ends:
            raise UserError(
                f"the run does not go on as it was saved: {ends[0].text}; do not train on with it: go on with the code and the "
                "data of before, or set saving.stop_after_resume to never to go on all the same"
            )


def digest(numbers: np.ndarray) -> str:
    """Of a step's samples, in whatever order ranks and micro-batches have them."""
    return hashlib.sha256(np.sort(numbers.astype("<i8")).tobytes()).hexdigest()[:32]
