"""A stop that is asked for by a signal."""

from __future__ import annotations

import signal
from types import FrameType


class StopSignal:
    """SIGTERM and SIGINT set a flag; the loop reads it at a step's end, all ranks agree, and the run saves and leaves.

    Only the main thread may install handlers; a trial in a worker thread goes without.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._set)
        except ValueError:
            pass
        return self

    def _set(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:  # a second Ctrl-C means now
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
