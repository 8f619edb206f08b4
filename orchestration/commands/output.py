"""What commands print: lines, a bar of progress."""

import codecs
import contextlib
import io
import sys
import threading
import time
from collections.abc import Callable, Iterator

from pipeline.display import terminal

QUIET_S = 3.0
LINE_EVERY_S = 10.0


def plain_streams() -> None:
    """What a terminal's or a file's encoding lacks is printed as ASCII that looks like it, or is written out."""

    def likeness(error: UnicodeError) -> tuple[str, int]:
        assert isinstance(error, UnicodeEncodeError)
        lost = error.object[error.start : error.end]
        return "".join(_LIKENESS.get(c) or ascii(c)[1:-1] for c in lost), error.end

    codecs.register_error("likeness", likeness)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="likeness")


_LIKENESS = {"±": "+-", "×": "x", "━": "=", "–": "-", "—": "-", "…": "...", "→": "->",
             "≤": "<=", "≥": ">=", "·": ".", "λ": "lambda",
             **dict.fromkeys(map(chr, range(0x2800, 0x2900)), "*")}  # fmt: skip


def say(*lines: str) -> None:
    """Each on its line, without a character that would move the cursor: names of classes, files and keys come from outside."""
    for line in lines:
        print(terminal(line), flush=True)


def warn(line: str) -> None:
    """As `say`, on standard error: what is no result of the command."""
    print(terminal(line), file=sys.stderr, flush=True)


@contextlib.contextmanager
def doing(what: str) -> Iterator[None]:
    """Says what is going on, to stderr, once it takes longer than `QUIET_S`, and again now and then."""
    begin_s, over = time.monotonic(), threading.Event()

    def speak() -> None:
        wait_s = QUIET_S
        while not over.wait(wait_s):
            passed_s = time.monotonic() - begin_s
            warn(f"{what} ... ({passed_s:.0f} s)")
            wait_s = max(10.0, min(60.0, passed_s))

    speaker = threading.Thread(target=speak, name="doing", daemon=True)
    speaker.start()
    try:
        yield
    finally:
        over.set()
        speaker.join()


@contextlib.contextmanager
def progress_bar(title: str, unit: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on a terminal, a line now and then elsewhere; gives update(phase, done, total)."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    if not sys.stderr.isatty():
        yield from _progress_lines(title, unit)
        return
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[unit]}")]
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=None, unit=unit)

        def update(phase: str, done: int, total: int) -> None:
            files = phase == "copying"
            description = f"{title}: {phase}" if phase else title
            progress.update(task, description=description, completed=done, total=total, unit="files" if files else unit)

        yield update


def _progress_lines(title: str, unit: str) -> Iterator[Callable[[str, int, int], None]]:
    """For a log: a line when it begins to take long, then at most one every ten seconds."""
    shown_s = time.monotonic()
    with contextlib.ExitStack() as before:
        before.enter_context(doing(title))

        def update(phase: str, done: int, total: int) -> None:
            nonlocal shown_s
            before.close()
            if time.monotonic() - shown_s >= LINE_EVERY_S:
                shown_s = time.monotonic()
                what = f"{title}: {phase}" if phase else title
                warn(f"{what} {done:,} of {total:,} {unit}")

        yield update
