"""A stop that is asked for by a signal: noticed at once in any phase, obeyed where all ranks can, bounded by the grace period.

    before `with`       `listen`: a sentence, and the code that asks to be queued again
    start               nothing to save: this rank tells the others (`watchdog`), and all leave
    step, save          the flag goes into the step's collective; all save the same step and leave
    stalled data        the wait for a batch ends, the step is skipped on all ranks (`training.batch_fetcher`), then as above
    evaluation          given up by all ranks after the same batch (`training.evaluate`), then as above
    anything else       the process ends with the grace period; an older checkpoint stands

A thread hears of the signal, because Python runs handlers on the main thread alone, which may be waiting in a collective.
"""

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType

from pipeline.display import terminal
from pipeline.supervision.rank_environment import is_alone, is_main

EXIT_REQUEUE = 75
"""EX_TEMPFAIL: stopped by a signal; the same command resumes, so a scheduler may queue it again."""
SAME_REQUEST_S = 3.0
"""Schedulers and terminals signal a launcher and its children, and the launcher passes it on: within this time that is one."""
TELL_S, HEAR_S = 2.5, 1.5
"""A rank that leaves from the start, and those that hear of it, wait this long: all hear of it before they miss one."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
A_SIGNAL = "a stop signal (SIGTERM, SIGINT or SIGHUP)"
UNWIND_S = 5
"""A process that has nothing to save leaves within this time after a signal, cleaned up or not."""


def heeded(numbers: Sequence[signal.Signals] = SIGNALS) -> list[signal.Signals]:
    """Those that mean a stop here: a SIGHUP that is ignored (nohup) stays ignored."""
    return [n for n in numbers if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]


def listen(numbers: Sequence[signal.Signals] = (signal.SIGTERM, signal.SIGHUP)) -> None:
    """From the first moment of a process on, until a `StopSignal` takes over: a stop signal ends it with a sentence and
    `EXIT_REQUEUE`, its `with` blocks left in order where that takes no longer than UNWIND_S; a second one at once."""

    def leave(number: int, _frame: FrameType | None) -> None:
        for n in heeded(numbers):
            signal.signal(n, lambda *_: os._exit(EXIT_REQUEUE))
        signal.signal(signal.SIGALRM, lambda *_: os._exit(EXIT_REQUEUE))
        signal.alarm(UNWIND_S)
        if is_main():
            say(f"stopped by {signal.Signals(number).name}; nothing was left to save, the same command again goes on")
        raise SystemExit(EXIT_REQUEUE)

    for n in heeded(numbers):
        signal.signal(n, leave)


class StopSignal:
    """SIGTERM, SIGINT and SIGHUP, from `with` on; a second one leaves at once.

    Only the main thread may install handlers; a trial in a worker thread goes without.
    """

    def __init__(self, *, grace_s: float = 60.0, leave: Callable[[int], None] = os._exit) -> None:
        self.requested = False
        """This rank or another has been asked to stop. Ranks hear of it at different times: agree before acting on it."""
        self.reason = A_SIGNAL
        """Why this rank was asked to, as far as it knows."""
        self.is_starting = True
        self.told = threading.Event()
        """The watchdog has told the other ranks, or there are none."""
        if is_alone():
            self.told.set()
        self.grace_s, self._leave = grace_s, leave  # it does not come back, but in a test
        self._asked_s: float | None = None
        self._signalled_s: float | None = None
        self._heard_elsewhere = False
        self._before: dict[int, object] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "StopSignal":
        ours, signals_go_to = socket.socketpair()
        ours.setblocking(False)
        signals_go_to.setblocking(False)
        self._ours, self._theirs = ours, signals_go_to
        try:
            self._fd_before = signal.set_wakeup_fd(signals_go_to.fileno(), warn_on_full_buffer=False)
        except ValueError:
            return self
        self._thread = threading.Thread(target=self._watch, name="stop", daemon=True)
        self._thread.start()
        for number in heeded():
            self._before[number] = signal.signal(number, self._set)
        return self

    def _set(self, _number: int, _frame: FrameType | None) -> None:
        self.requested = True  # the thread does the rest; this is for whoever looks before it has run

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if self._thread is not None:
            signal.set_wakeup_fd(self._fd_before)
            self._theirs.send(b"x")
            self._thread.join()
            self._thread = None
        self._ours.close()
        self._theirs.close()

    def ask(self, reason: str = "") -> None:
        """Stop for another reason than a signal to this process: another rank was asked to, or cannot go on."""
        self.reason = reason or self.reason
        self._note()
        self._wake()

    def leave_start(self) -> None:
        """Another rank leaves from the start: no step can have been finished without it, so there is nothing to save."""
        self._heard_elsewhere = self.is_starting = True
        self.told.set()
        self.ask()

    @property
    def is_signalled(self) -> bool:
        """This very process got a signal, and did not only hear of another's."""
        return self._signalled_s is not None

    @property
    def left_s(self) -> float:
        """Until the grace period ends; infinite while nobody asked."""
        return float("inf") if self._asked_s is None else max(0.0, self._asked_s + self.grace_s - time.monotonic())

    def _wake(self) -> None:
        if self._thread is not None:
            self._theirs.send(b"\0")

    def started(self) -> None:
        """The start is over: from here on a stop saves. Does not come back where the process is leaving already."""
        with self._lock:
            if not self.requested or self._thread is None:
                self.is_starting = False
                return
        while True:
            time.sleep(1.0)

    def _note(self) -> None:
        with self._lock:
            self.requested = True
            self._asked_s = self._asked_s or time.monotonic()

    def _is_second(self) -> bool:
        """Enters a signal to this process; whether it means now."""
        self._note()
        self._signalled_s = self._signalled_s or time.monotonic()
        return time.monotonic() - self._signalled_s > SAME_REQUEST_S

    def _watch(self) -> None:
        """Until the end of `with`, or of the process."""
        while True:
            wait_s = None if self._asked_s is None else self.left_s
            if select.select([self._ours], [], [], wait_s)[0]:
                heard = self._ours.recv(64)
                if b"x" in heard:
                    return
                if any(number in SIGNALS for number in heard) and self._is_second():
                    say("a second signal: leaving now; the newest checkpoint stands")
                    return self._leave(EXIT_REQUEUE)
            if self._asked_s is not None and self.is_starting:
                return self._leave_start()
            if self._asked_s is not None and time.monotonic() - self._asked_s >= self.grace_s:
                say(f"the stop was not reached within the {self.grace_s:.0f} s of grace; leaving without it")
                return self._leave(EXIT_REQUEUE)

    def _leave_start(self) -> None:
        # The others are told first: one that misses a rank in a collective would take it for a failure.
        if self.told.wait(TELL_S) and not is_alone():
            time.sleep(HEAR_S if self._heard_elsewhere else TELL_S)
        if is_main():
            say("stopped by a signal while starting; there is nothing to save")
        self._leave(EXIT_REQUEUE)


def say(text: str) -> None:
    """One sentence on stderr, unbuffered and from any thread, for a process that may not come back. Nobody need read it."""
    line = f"normfree: {terminal(text)}\n"
    with contextlib.suppress(OSError, ValueError, AttributeError):
        try:
            number = sys.stderr.fileno()
        except (OSError, ValueError):  # not a file of the system
            sys.stderr.write(line)
        else:
            os.write(number, line.encode())
