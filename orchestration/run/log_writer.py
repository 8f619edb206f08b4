"""The process that writes a rank's log, and lets its words through to the console: rank 0's all, of others the first errors.

It reads two pipes (`orchestration.run.rank_log`) until nobody can write to them any more, so it has the last words of a process
that was killed. With `--url`, a run folder in an object store, the file is copied there when the process has ended; while it
trains, the uploader and the sampler of each machine do that (`orchestration.spool.mirror`).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import select
import signal
import socket
import sys
import time
from collections.abc import Sequence
from logging import LogRecord, makeLogRecord
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from orchestration.run.folded import Folded
from orchestration.spool.rank_logs import FOLDER, GONE, MAX_BYTES, Line, LogName, format_line, is_error, stamp, too_old
from pipeline import places
from pipeline.display import terminal
from pipeline.secrets import Hidden
from pipeline.storage.process_identity import started_at

READ_BYTES = 1 << 16
MAX_LINE_BYTES = 1 << 16
LOOK_EVERY_S = 1.0
EARLY_LINES = 10_000
"""Kept in memory before the run's folder is the run's."""
LAST_WORD_S = 5.0
"""Whoever said a sentence within this time before its end did not end without one."""


class Writer:
    """One process's log: its file, and what of it goes to the console."""

    def __init__(self, folder: Path, rank: int, pid: int, *, is_quiet: bool) -> None:
        """`is_quiet`: standard output is shown to a terminal by the rank itself."""
        self.folder, self.rank, self._pid, self._is_quiet = folder / FOLDER, rank, pid, is_quiet
        self._begin_s = time.time()
        self.name = LogName(rank, stamp(self._begin_s), _host(), pid)
        self._early: list[Line] | None = []
        self._handler: RotatingFileHandler | None = None
        self._parts = {"out": b"", "err": b""}
        self._held = b""
        self._has_failed = False
        self._hidden = Hidden(os.environ)
        self._folded = Folded(self.folder, rank)
        self._said_s = 0.0
        self.has_ended = False

    @property
    def path(self) -> Path:
        return self.folder / str(self.name)

    def take(self, source: str, data: bytes) -> None:
        """Bytes of a pipe: to the console as they come, to the log line by line."""
        if self.rank == 0 and source == "err":
            whole = re.sub(rb"\0[^\n]*\n", b"", self._held + data)
            shown, mark, rest = whole.partition(b"\0")  # the rest of such a line comes with the next bytes
            self._held = mark + rest
            _write(2, shown)
        elif self.rank == 0 and not self._is_quiet:
            _write(1, data)
        *lines, rest = (self._parts[source] + data).split(b"\n")
        if len(rest) > MAX_LINE_BYTES:
            lines, rest = [*lines, rest], b""
        self._parts[source] = rest
        for line in lines:
            self._line(source, line)

    def _line(self, source: str, raw: bytes) -> None:
        before, mark, words = raw.partition(b"\0")
        if before or not mark:
            self.keep(source, self._hidden.in_text(before.rpartition(b"\r")[2].decode(errors="backslashreplace")))
        if mark:
            self._obey(words.decode(errors="backslashreplace"))

    def _obey(self, words: str) -> None:
        command, _, rest = words.partition(" ")
        if command == "begin":
            self.open()
        elif command == "forget":
            self._early = None
        elif command == "note":
            self.keep("own", self._hidden.in_text(rest))
        elif command == "end":
            self.has_ended = True

    def keep(self, source: str, text: str) -> None:
        """A line of the log."""
        line = Line(time.time(), source, terminal(text))
        if source == "err" and text.startswith("normfree: "):
            self._said_s = line.time_s
        self._has_failed = self._has_failed or is_error(line.text)
        if self.rank != 0 and source != "own":
            self._folded.show(line.text)
        if self._handler is not None:
            self._emit(line)
        elif self._early is not None and len(self._early) < EARLY_LINES:
            self._early.append(line)

    def _emit(self, line: Line) -> None:
        assert self._handler is not None
        self._handler.emit(makeLogRecord({"msg": line}))

    def open(self) -> None:
        """The file, with what was said before."""
        if self._handler is not None or self._early is None:
            return
        early, self._early = self._early, None
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._prune()
            self._handler = _File(self.path)
            self._emit(Line(self._begin_s, "own", f"process {self._pid} on {socket.gethostname()}, rank {self.rank}"))
            for line in early:
                self._emit(line)

    def _prune(self) -> None:
        """The files of this rank's earlier processes, but for the newest."""
        for name in too_old((p.name for p in self.folder.glob("rank-*")), [self.rank]):
            (self.folder / str(name)).unlink(missing_ok=True)

    def process_is_gone(self) -> None:
        if self.has_ended:
            return
        self.has_ended = True
        self._flush()
        if time.time() - self._said_s > LAST_WORD_S:
            text = f"normfree: rank {self.rank} (process {self._pid} on {socket.gethostname()}) {GONE}"
            self.keep("own", text)
            if self.rank != 0:
                self._folded.show(text)
            else:
                _write(2, f"{text}\n".encode())

    def _flush(self) -> None:
        """Lines without an end."""
        for source, rest in self._parts.items():
            self._parts[source] = b""
            if rest:
                self._line(source, rest)

    def close(self) -> None:
        self._flush()
        if self._has_failed and self.folder.parent.exists():
            self.open()  # it ended before it could say that the folder is its own, and somebody will ask why
        if self._handler is not None:
            self._handler.close()
        self._folded.close()


class _File(RotatingFileHandler):
    """Never through a link that somebody else has put there; what cannot be written is lost, and costs nothing else."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, maxBytes=MAX_BYTES, backupCount=1, encoding="utf-8", errors="backslashreplace")
        self.terminator = ""

    def _open(self) -> Any:
        return open(self.baseFilename, "a", encoding=self.encoding, errors=self.errors, opener=places.no_follow)

    def handleError(self, record: LogRecord) -> None: ...

    def format(self, record: LogRecord) -> str:
        assert isinstance(record.msg, Line)
        return format_line(record.msg)


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "_", socket.gethostname()) or "host"


def _write(number: int, data: bytes) -> None:
    """To the console, which may have gone."""
    view = memoryview(data)
    with contextlib.suppress(OSError):
        while view:
            view = view[os.write(number, view) :]


def follow(writer: Writer, read_out: int, read_err: int, drained: int, pid: int) -> None:
    """Until nobody can write any more."""
    since = started_at(pid)
    sources = {read_out: "out", read_err: "err"}
    while sources:
        ready = select.select(list(sources), [], [], LOOK_EVERY_S)[0]
        for number in ready:
            data = os.read(number, READ_BYTES)
            if data:
                writer.take(sources[number], data)
            else:
                del sources[number]
        if writer.has_ended and drained >= 0 and not select.select(list(sources), [], [], 0)[0]:
            os.close(drained)  # who waits for it sees its end
            drained = -1
        if not ready and not writer.has_ended and started_at(pid) != since:
            writer.process_is_gone()  # children of it may live on, with its streams
    if not writer.has_ended:
        writer.process_is_gone()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m orchestration.run.log_writer", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, metavar="DIR")
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--pid", type=int, required=True)
    parser.add_argument("--pipes", required=True, metavar="OUT,ERR,DRAINED")
    parser.add_argument("--url")
    parser.add_argument("--terminal", action="store_true")
    args = parser.parse_args(arguments)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # it ends when the rank has
        signal.signal(number, signal.SIG_IGN)
    read_out, read_err, drained = map(int, args.pipes.split(","))
    writer = Writer(args.folder, args.rank, args.pid, is_quiet=args.terminal)
    follow(writer, read_out, read_err, drained, args.pid)
    writer.close()
    if args.url and writer.path.exists():
        from orchestration.spool.mirror import push_log

        with contextlib.suppress(Exception):  # clients of stores raise what they like
            push_log(writer.path, args.url)
    return 0


if __name__ == "__main__":
    sys.exit(main())
