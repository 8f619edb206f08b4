"""What a rank's process and its libraries write to standard output and error is kept: a file a process in the run's folder.

    file descriptors 1 and 2  ->  pipes  ->  `orchestration.run.log_writer`, a process of its own  ->  the file, and the console

The descriptors and not Python's streams, so that the words of C libraries and of a dying interpreter are there too; a process
of its own, so that nothing of what a rank that is killed has written is lost. It does not depend on who started the rank.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import traceback
from collections.abc import Iterator
from typing import TextIO

from orchestration import child_process
from orchestration.spool.spool import records_folder
from pipeline.display import terminal
from pipeline.storage import objects
from pipeline.supervision import process_exit
from pipeline.supervision.rank_environment import Place, place

MARK = b"\0"
"""Begins a line that is for the writer of the log and nobody else."""
DRAIN_S = 2.0
PIPE_BYTES = 1 << 20
F_SETPIPE_SZ = 1031
"""linux/fcntl.h"""


class RankLog:
    """The log of this process, as far as the process itself is concerned; without a writer it does nothing."""

    def __init__(self) -> None:
        self.terminal: TextIO | None = None
        """The terminal that standard output was: for what only a terminal can show. None where it was none."""
        self._has_begun = False
        self._to: int | None = None
        self._drained = -1
        self._before: tuple[int, int] | None = None

    def begin(self) -> None:
        """From now on the run's folder is this run's, and the log is written; what was said before stands at its head."""
        if not self._has_begun:
            self._has_begun = True
            self._tell(b"begin")

    def forget(self) -> None:
        """A run that is refused while it starts leaves no trace."""
        if not self._has_begun:
            self._tell(b"forget")

    def note(self, error: BaseException) -> None:
        """Where an error came from, for the log alone."""
        for line in "".join(traceback.format_exception(error)).splitlines():
            self._tell(b"note " + line.encode(errors="backslashreplace"))

    def _tell(self, words: bytes) -> None:
        if self._to is not None:
            with contextlib.suppress(OSError):
                os.write(self._to, MARK + words[: select.PIPE_BUF - 2] + b"\n")

    def start(self, out: str, here: Place) -> None:
        """From here on this process writes into its log."""
        read_out, write_out = os.pipe()
        read_err, write_err = os.pipe()
        self._drained, drained = os.pipe()
        _flush()
        words = ["--folder", os.path.abspath(records_folder(out)), "--rank", str(here.rank), "--pid", str(os.getpid())]
        words += ["--pipes", f"{read_out},{read_err},{drained}"]
        words += [] if objects.is_local(out) else ["--url", out]
        if here.is_main and os.isatty(1):
            self.terminal = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="replace")
            words += ["--terminal"]
        fds = read_out, read_err, drained
        child_process.start("orchestration.run.log_writer", words, on_parent_death=None, own_session=True, pass_fds=fds)
        self._before, self._to = (os.dup(1), os.dup(2)), os.dup(write_err)
        for pipe, number in ((write_out, 1), (write_err, 2)):
            _widen(pipe)
            os.dup2(pipe, number)
            os.close(pipe)
        for pipe in fds:
            os.close(pipe)

    def stop(self, error: BaseException | None) -> None:
        """The streams are what they were; returns when the console has what was written, or after DRAIN_S."""
        if self._before is None:
            return
        if error is not None:
            self.note(error)
        _flush()
        for number, before in zip((1, 2), self._before, strict=True):
            os.dup2(before, number)
            os.close(before)
        self._tell(b"end")
        select.select([self._drained], [], [], DRAIN_S)
        assert self._to is not None
        os.close(self._drained)
        os.close(self._to)
        self._before = self._to = None


@contextlib.contextmanager
def kept(out: str) -> Iterator[RankLog]:
    """The log of this rank of the run in `out`, in a process that is a rank's own; elsewhere one that keeps nothing."""
    log = RankLog()
    if process_exit.is_own and sys.platform == "linux":
        try:
            log.start(out, place())
        except OSError as error:  # no more processes or files: the run is worth more than its log
            print(terminal(f"normfree: no log of this process is kept ({error})"), file=sys.stderr)
    try:
        yield log
    except BaseException as error:
        log.stop(error)
        raise
    log.stop(None)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()


def _widen(pipe: int) -> None:
    import fcntl

    with contextlib.suppress(OSError):
        fcntl.fcntl(pipe, F_SETPIPE_SZ, PIPE_BYTES)
