"""Files of what the processes of a run wrote to their standard output and error: names, lines, which lines are errors.

    RUN/logs/rank-00003.20261128T210655Z.node7.4711.log      one process, from its start to its end
             rank-00003.20261128T210655Z.node7.4711.log.1    what came before, where that was more than MAX_BYTES

    2026-11-28T21:06:55.123Z out text                        a line: when it was whole, from where (`Line.source`), and what

Written by `orchestration.run.log_writer`; for a run in a bucket the objects have the same names there.
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

FOLDER = "logs"
MAX_BYTES = 8 << 20
"""Of a file; there are two a process."""
KEPT = 10
"""Processes of a rank whose files stay."""
_NAME = re.compile(r"rank-(\d{5})\.(\d{8}T\d{6}Z)\.([A-Za-z0-9_.-]{1,200}?)\.(\d{1,10})\.log(\.1)?", re.ASCII)
_LINE = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3})Z (out|err|own) (.*)", re.DOTALL)
_ERROR = re.compile(
    r"(?:\w+\.)*\w*(?:Error|Exception)\b(?:: |$)"
    r"|^normfree: (?:\S+: )?.*\b(?:failed|cannot|could not|was ended by|taken over|leave; stacks|is gone)\b"
    r"|^Fatal Python error|terminate called|[Ss]egmentation fault|core dumped"
    r"|CUDA error|[Oo]ut of memory|oom-kill|NCCL WARN|uncorrectable ECC|Xid \(",
)
_CONSEQUENCE = re.compile(
    r"[Cc]onnection (?:closed by peer|reset by peer|refused)|[Bb]roken pipe|recvBytes failed|sendBytes failed|gloo/transport"
    r"|remote process exited|peer closed|NCCL communicator was aborted|Socket [Tt]imeout|lost its connection to another rank"
)
GONE = "ended without a last word: killed, most likely for its memory, or it crashed"


@dataclass(frozen=True, order=True)
class LogName:
    """What a file's name says."""

    rank: int
    started: str
    host: str
    pid: int
    is_earlier: bool = False

    def __str__(self) -> str:
        return f"rank-{self.rank:05d}.{self.started}.{self.host}.{self.pid}.log{'.1' if self.is_earlier else ''}"


@dataclass(frozen=True)
class Line:
    time_s: float
    """Unix time by the clock of its machine."""
    source: str
    """out, err, or own: what the writer of the log has to say itself"""
    text: str


def parse_name(name: str) -> LogName | None:
    """None for what is no log of a rank."""
    found = _NAME.fullmatch(name)
    return LogName(int(found[1]), found[2], found[3], int(found[4]), found[5] is not None) if found else None


def too_old(names: Iterable[str], ranks: Collection[int]) -> list[LogName]:
    """Of a folder's names the logs of these ranks' processes but for each one's newest KEPT."""
    found = [name for text in names if (name := parse_name(text)) is not None]
    starts = {rank: sorted({name.started for name in found if name.rank == rank})[:-KEPT] for rank in ranks}
    return [name for name in found if name.started in starts.get(name.rank, ())]


def stamp(time_s: float) -> str:
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(time_s))


def format_line(line: Line) -> str:
    when = datetime.fromtimestamp(line.time_s, UTC).replace(tzinfo=None).isoformat(timespec="milliseconds")
    return f"{when}Z {line.source} {line.text}\n"


def parse_line(text: str) -> Line | None:
    """None for what is no line of a log, as the first one of a file that was cut."""
    found = _LINE.fullmatch(text)
    if found is None:
        return None
    try:
        when = datetime.fromisoformat(found[1]).replace(tzinfo=UTC)
    except ValueError:
        return None
    return Line(when.timestamp(), found[2], found[3])


def is_error(text: str) -> bool:
    """Whether a line speaks of a failure, as Python, libraries of ours and the system speak of them."""
    return _ERROR.search(text) is not None or GONE in text


def is_consequence(text: str) -> bool:
    """Whether a line speaks of the loss of another process: what that one met is the cause."""
    return _CONSEQUENCE.search(text) is not None
