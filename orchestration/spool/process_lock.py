"""Is that process still the one I mean, and am I the only one here: questions of processes that outlive each other."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline import places


def started_at(pid: int | None) -> str | None:
    """When a living process started, None for one that is gone: a process number alone may have gone to another."""
    if pid is None:
        return None
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
    except (OSError, IndexError):
        return None
    try:  # no /proc here: the number must do
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "alive"


@contextlib.contextmanager
def only_one(path: Path, may_wait: Callable[[], bool], *, wait_s: float, poll_s: float = 0.5) -> Iterator[bool]:
    """Holds the lock file `path`, waiting while `may_wait()` and `wait_s` seconds longer; yields False if in vain.

    The lock goes with the process that holds it, however that one ends.
    """
    # Not "w", and behind no link: a lock that somebody else has put here must not empty a file of ours.
    with open(path, "a", opener=places.no_follow) as lock:
        deadline = float("inf")
        while time.monotonic() < deadline:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if deadline == float("inf") and not may_wait():
                    deadline = time.monotonic() + wait_s
                time.sleep(poll_s)
            except OSError:  # a file system without locks: better unguarded than not at all
                break
        else:
            yield False
            return
        yield True
