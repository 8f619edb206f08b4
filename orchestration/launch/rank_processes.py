"""The processes of an attempt on this host: who lives, who has been told to stop, and that none is started after a stop.

torch's agent starts and reaps them on its thread; the main thread signals them.
"""

import os
import signal
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestration.run import rank_end
from orchestration.run.rank_end import RankEnd
from pipeline.storage.process_identity import started_at


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """What is started."""

    module: str
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    processes: int
    """On this host."""
    grace_s: float


class Stopped(Exception):
    """No ranks may be started any more."""


class RankProcesses:
    """Of one attempt after the other."""

    def __init__(self, ends: Path) -> None:
        self._ends = ends
        self._lock = threading.Lock()
        """Held while ranks are started: a stop comes before that, or finds them."""
        self._started: dict[int, str] = {}
        """When each process started: its number alone may have gone to another."""
        self._told: dict[int, int] = {}
        self.none_more = threading.Event()

    def start(self, start: Callable[[], dict[int, Any]]) -> dict[int, Any]:
        """What `start` gives: process numbers by local rank. Raises Stopped."""
        with self._lock:
            if self.none_more.is_set():
                raise Stopped
            pids = start()
            self._started = {pid: started_at(pid) or "" for pid in pids.values()}
            self._told = {}
        return pids

    def stop(self) -> None:
        """From here on none is started."""
        with self._lock:
            self.none_more.set()

    def living(self) -> list[int]:
        return [pid for pid, started in list(self._started.items()) if started_at(pid) == started]

    def ask(self, times: int) -> None:
        """SIGTERM to each that has not had it `times` times: a second one goes on too, it means now."""
        for pid in self.living():
            if self._told.get(pid, 0) < times:
                self._told[pid] = times
                _send(pid, signal.SIGTERM)

    def kill(self) -> None:
        for pid in self.living():
            _send(pid, signal.SIGKILL)

    def kill_frozen(self) -> None:
        """One that froze (SIGSTOP) hears no SIGTERM, and torch's agent would wait for it after another has left."""
        living = self.living()
        if len(living) < len(self._started):
            for pid in living:
                if _is_stopped(pid):
                    _send(pid, signal.SIGKILL)

    def ends(self) -> list[RankEnd | None]:
        return [self.end_of(pid) for pid in list(self._started)]

    def end_of(self, pid: int) -> RankEnd | None:
        """None: it has not ended, or not well."""
        return rank_end.read(self._ends, pid)


def _send(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _is_stopped(pid: int) -> bool:
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    return False
