"""Where the time of a run goes: each moment belongs to one phase, so the phases add up to the wall clock.

A GPU works on behind the host, which hands it a copy or a pass and goes on. So its time is taken where it runs: a mark is
queued behind what was handed over, and a phase lasts until the device comes to it. What the device computes while the host
waits for a batch is computing; `wait` is what it stood still.
"""

import struct
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, Protocol, get_args

import torch

Phase = Literal["wait", "transfer", "compute", "save", "log", "evaluate", "other"]
PHASES: tuple[Phase, ...] = get_args(Phase)
"""wait: for a batch; transfer: handing it to the device; compute: forward, backward, agreement, update; log: whoever reads
the records; other: what no block names.
"""


WHERE = struct.Struct("<Bq")
"""As `Clock.board` holds it: the phase's place in `PHASES`, and the last finished step."""


class Timeline(Protocol):
    """Whoever works through what the host hands over."""

    def mark(self) -> Any:
        """Of this moment; waits for nothing."""

    def between(self, begin: Any, end: Any) -> float | None:
        """Seconds from one mark to the next, None before the second was come to."""


class DeviceTimeline:
    """A GPU's current stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def between(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float | None:
        return begin.elapsed_time(end) / 1000 if end.query() else None


class _Host:
    def __init__(self, now: Callable[[], float]) -> None:
        self.mark = now

    def between(self, begin: float, end: float) -> float:
        return end - begin


class Clock:
    """`with clock("wait"):` charges the block to a phase; an inner block takes its time from the outer one.

    The same switches are the run's signs of life, for the watchdog: `phase`, `ticks`, `steps_done`, `first_step`.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._timeline: Timeline = _Host(now)
        self.phase: Phase = "other"
        self.ticks = 0
        """Grows with each switch of phase and each `tick`, and stands still while nothing happens."""
        self.steps_done: Callable[[], int] = lambda: 0
        """The last finished step; the loop says how to find it."""
        self.first_step = 0
        """What `steps_done` was when the start was over: only a step beyond it shows that a step does not take long."""
        self.board: Any = None
        """Memory that each switch writes the phase and the step into, for whoever looks at a process that has frozen."""
        self.span: Callable[[Phase], AbstractContextManager[Any]] = lambda _: nullcontext()
        """Entered with each block, for whoever names it elsewhere."""
        self.begin_s = self._since = now()
        self._open: deque[tuple[Phase, Any, Any]] = deque()
        """Stretches whose ends the device has not come to."""
        self._sums_s: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def __call__(self, phase: Phase) -> Iterator[None]:
        outer = self.phase
        self._switch(phase)
        try:
            with self.span(phase):
                yield
        finally:
            self._switch(outer)

    def follow(self, timeline: Timeline) -> None:
        """From here on phases last as long as they do there."""
        self._switch(self.phase)
        self._timeline = timeline
        self._since = timeline.mark()

    def tick(self) -> None:
        """A sign of life inside a long phase."""
        self.ticks += 1

    def _switch(self, phase: Phase) -> None:
        now = self._timeline.mark()
        self._open.append((self.phase, self._since, now))
        self.phase, self._since = phase, now
        while self._open and (seconds := self._timeline.between(*self._open[0][1:])) is not None:
            self._sums_s[self._open.popleft()[0]] += seconds
        if self.board is not None:
            WHERE.pack_into(self.board, 0, PHASES.index(phase), self.steps_done())
        self.ticks += 1

    def take(self) -> tuple[float, dict[Phase, float]]:
        """Wall seconds since the last call, and the seconds of each phase; the sums begin anew.

        What a device has still to do is left to the next call: waiting for it would cost time.
        """
        self._switch(self.phase)
        sums_s, self._sums_s = self._sums_s, dict.fromkeys(PHASES, 0.0)
        return sum(sums_s.values()), sums_s

    def means(self, num: int) -> dict[str, float]:
        """Seconds for each of `num` updates since the last call, as `pipeline.records.Step` names them."""
        wall_s, spent_s = self.take()
        found = {f"{'data_wait' if phase == 'wait' else phase}_s": spent / num for phase, spent in spent_s.items()}
        return found | {"wall_s": wall_s / num, "step_s": (wall_s - spent_s["save"] - spent_s["evaluate"]) / num}

    @property
    def elapsed_s(self) -> float:
        """Since the clock was made."""
        return self._now() - self.begin_s
