"""Am I the only one here: a lock that goes with its process."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline import places


@contextlib.contextmanager
def only_one(path: Path, may_wait: Callable[[], bool], *, wait_s: float, poll_s: float = 0.5) -> Iterator[bool]:
    """Holds the lock file `path`, waiting while `may_wait()` and `wait_s` seconds longer; yields False if in vain.

    The lock goes with the process that holds it, however that one ends.
    """
    # Not "w", and behind no link: a lock that somebody else has put here must not empty a file of ours.
    with open(path, "a", opener=places.no_follow) as lock:
        deadline = float("inf")
        while time.monotonic() < deadline:
            if places.lock(lock.fileno(), wait=False) is not False:  # without locks: better unguarded than not at all
                break
            if deadline == float("inf") and not may_wait():
                deadline = time.monotonic() + wait_s
            time.sleep(poll_s)
        else:
            yield False
            return
        yield True
