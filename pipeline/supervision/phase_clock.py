"""Where the time of a run goes: each moment belongs to one phase, so the phases add up to the wall clock."""

import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

Phase = Literal["wait", "transfer", "compute", "save", "log", "evaluate", "other"]
PHASES: tuple[Phase, ...] = ("wait", "transfer", "compute", "save", "log", "evaluate", "other")
"""wait: for a batch; transfer: handing it to the device; compute: forward, backward, agreement, update; log: whoever reads
the records; other: what no block names.

These are the host's seconds. A GPU works on behind it: a copy from pinned memory is only queued under "transfer", and what
the host then waits for at the end of the step counts as "compute".
"""


WHERE = struct.Struct("<Bq")
"""As `Clock.board` holds it: the phase's place in `PHASES`, and the last finished step."""


class Clock:
    """`with clock("wait"):` charges the block to a phase; an inner block takes its time from the outer one.

    The same switches are the run's signs of life, for the watchdog: `phase`, `ticks`, `steps_done`, `first_step`.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self.phase: Phase = "other"
        self.ticks = 0
        """Grows with each switch of phase and each `tick`, and stands still while nothing happens."""
        self.steps_done: Callable[[], int] = lambda: 0
        """The last finished step; the loop says how to find it."""
        self.first_step = 0
        """What `steps_done` was when the start was over: only a step beyond it shows that a step does not take long."""
        self.board: Any = None
        """Memory that each switch writes the phase and the step into, for whoever looks at a process that has frozen."""
        self.begin_s = self._since_s = self._mark_s = now()
        self._sums_s: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def __call__(self, phase: Phase) -> Iterator[None]:
        outer = self.phase
        self._switch(phase)
        try:
            yield
        finally:
            self._switch(outer)

    def tick(self) -> None:
        """A sign of life inside a long phase."""
        self.ticks += 1

    def _switch(self, phase: Phase) -> None:
        now_s = self._now()
        self._sums_s[self.phase] += now_s - self._since_s
        self.phase, self._since_s = phase, now_s
        if self.board is not None:
            WHERE.pack_into(self.board, 0, PHASES.index(phase), self.steps_done())
        self.ticks += 1

    def take(self) -> tuple[float, dict[Phase, float]]:
        """Wall seconds since the last call, and the seconds of each phase; the sums begin anew."""
        self._switch(self.phase)
        wall_s, sums_s = self._since_s - self._mark_s, self._sums_s
        self._mark_s, self._sums_s = self._since_s, dict.fromkeys(PHASES, 0.0)
        return wall_s, sums_s

    def means(self, num: int) -> dict[str, float]:
        """Seconds for each of `num` updates since the last call, as `pipeline.records.Step` names them."""
        wall_s, spent_s = self.take()
        found = {f"{'data_wait' if phase == 'wait' else phase}_s": spent / num for phase, spent in spent_s.items()}
        return found | {"wall_s": wall_s / num, "step_s": (wall_s - spent_s["save"] - spent_s["evaluate"]) / num}

    @property
    def elapsed_s(self) -> float:
        """Since the clock was made."""
        return self._now() - self.begin_s
