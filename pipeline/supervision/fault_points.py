"""Instrumented points of a run: places where a test, or a drill, may stop, slow or kill a process.

`reach` does nothing unless somebody has set `hook`, which is called with the point's name and may raise, sleep or not come
back. Every point that a save passes is in `POINTS`, in the order in which it is passed, so that a test can name them all.
Besides these there is `STEP`. What a process of a drill does at which point is in `pipeline.supervision.planned_faults`.
"""

from collections.abc import Callable

POINTS = (
    "copied",  # the state is in host memory, nothing is written
    "file opened",  # of each file: before its first byte
    "file piece",  # ... after each piece
    "file written",  # ... all bytes are on disk, under a temporary name
    "file named",  # ... under its name in the checkpoint (locally), or staged (for an object store)
    "upload",  # ... before it goes to the object store
    "uploaded",
    "part",  # before this rank's part record
    "part written",
    "commit",  # main rank: all part records are there, the commit file is not
    "committed",
    "retention",  # main rank: before anything is deleted
    "commit deleted",  # ... an old checkpoint has become invisible, its files are there
    "files deleted",
    "saved",
)

STEP = "step"
"""Before each step of the training, on the main thread of each rank."""

hook: Callable[[str], None] | None = None
num_reached = 0
"""Points of saves passed so far, on any thread: a save that waits for a store moves on when this grows."""


def reach(point: str) -> None:
    """Called by the code that trains and saves, on whatever thread it runs on."""
    if point not in POINTS and point != STEP:
        raise ValueError(f"{point!r} is not among the points of a run")
    global num_reached
    num_reached += point != STEP
    if hook is not None:
        hook(point)
