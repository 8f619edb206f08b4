"""What commands print: lines, a bar of progress."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator


def say(*lines: str) -> None:
    print(*lines, sep="\n")


@contextlib.contextmanager
def progress_bar(title: str, unit: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on a terminal, nothing elsewhere; gives update(phase, done, total)."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[unit]}")]
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(title, total=None, unit=unit)

        def update(phase: str, done: int, total: int) -> None:
            files = phase == "copying"
            description = f"{title}: {phase}" if phase else title
            progress.update(task, description=description, completed=done, total=total, unit="files" if files else unit)

        yield update


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
