"""The write-ahead spool: what a run said about itself, one JSON line a record, on local disk before anybody acts on it.

The trainer only appends here; whether a tracking server lives, answers or forgets is no concern of its. The uploader
(`orchestration.tracking.mlflow_client`) follows the file, and anybody may read it years later. Each line is
`{"attempt": n, "kind": ..., ...}`; an attempt is one start of the command on the same run folder, and opens with a line
of kind "Attempt". Lines are only ever added.
"""

import json
import os
import re
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

from pipeline import places
from pipeline.display import terminal
from pipeline.records import Record
from pipeline.secrets import public
from pipeline.storage import objects

MAIN = "records.jsonl"
"""The spool of a run, in its folder; each node's own is next to it (`orchestration.spool.system_metrics`)."""
PIECE_BYTES = 4 << 20  # the spool of a long run is larger than what a reader should hold at once
MAX_LINE_BYTES = 64 << 20


def is_spool(name: str) -> bool:
    """Whether that is the name of a run's spool, or of one of its nodes'."""
    return re.fullmatch(r"records\.jsonl|system-[A-Za-z0-9_.-]{1,200}\.jsonl", name) is not None


def records_folder(url: str) -> Path:
    """The folder for records and their books: the run or sweep folder, or for one in an object store one on this machine.

    The spool is local by law: an object store cannot be appended to.
    """
    return (
        objects.local_path(url) if objects.is_local(url) else places.private_folder("spools", places.name_of_url(url))
    )


class Line(NamedTuple):
    """One readable line of a spool."""

    number: int
    """Counted from 0, unreadable lines included, so that a number names a place in the file for good."""
    value: dict[str, Any]


class Spool:
    """Appends records to `path`, each on disk (past this process's buffers) when `append` returns.

    A failing disk costs telemetry and not the run: lost records are counted in `num_lost` and reported once on stderr.
    """

    def __init__(self, path: str | os.PathLike[str], facts: Mapping[str, Any] | None = None) -> None:
        """`facts` are what the attempt's first line says about where it runs (`pipeline.provenance`)."""
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.attempt = 1 + max((_attempt(line.value) for line in read(self.path)), default=0)
        self.num_lost = 0
        torn = is_torn(self.path)
        self._file: IO[str] = os.fdopen(
            places.no_follow(str(self.path), os.O_WRONLY | os.O_APPEND | os.O_CREAT), "a", encoding="utf-8"
        )
        if torn:
            self._write("\n")  # whoever was killed while writing must not swallow our first line
        who = {"time_s": time.time(), "host": socket.gethostname(), "pid": os.getpid()}
        self._append({"kind": "Attempt", **who, **(facts or {})})

    def append(self, record: Record) -> None:
        self._append(record.as_dict())

    def append_failure(self, error: str) -> None:
        """The last line of a run that ended by an error of its own, so that the tracker can tell it from a kill."""
        self._append({"kind": "Failed", "time_s": time.time(), "error": error})

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, value: dict[str, Any]) -> None:
        text = json.dumps({"attempt": self.attempt, **value}, default=str)
        if "://" in text:  # a password in a URL is for the one who opens it, and not for a file that travels
            text = json.dumps(_without_passwords(json.loads(text)))
        self._write(text + "\n")

    def _write(self, text: str) -> None:
        try:
            self._file.write(text)
            self._file.flush()
        except OSError as error:
            self.num_lost += 1
            if self.num_lost == 1:
                print(
                    terminal(f"records are being lost: cannot write {self.path} ({error}); free the disk"),
                    file=sys.stderr,
                )


class Follower:
    """Reads a spool as it grows. A last line without its end of line is still being written, and waits."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.num_unreadable = 0
        self._offset_bytes = 0
        self._number = 0

    def poll(self) -> list[Line]:
        """The next readable lines; [] when all whole lines that are there have been read, or while there is no file."""
        lines: list[Line] = []
        while not lines and (whole := self._next()):
            lines = self._parse_all(whole)
        return lines

    def _next(self) -> bytes:
        """About PIECE_BYTES of whole lines, which may all be unreadable."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset_bytes)
                data = file.read(PIECE_BYTES)
                while data and b"\n" not in data and (more := file.read(PIECE_BYTES)):
                    if len(data) > MAX_LINE_BYTES:  # nobody's record: what follows of it is one unreadable line
                        self._offset_bytes += len(data)
                        data = b""
                    data += more  # one line may be longer than a piece
        except FileNotFoundError:
            return b""
        whole = data[: data.rfind(b"\n") + 1]
        self._offset_bytes += len(whole)
        return whole

    def _parse_all(self, whole: bytes) -> list[Line]:
        lines = []
        for raw in whole.split(b"\n")[:-1]:
            value = parse(raw)
            if value is None:
                self.num_unreadable += 1
            else:
                lines.append(Line(self._number, value))
            self._number += 1
        return lines


def read(path: str | os.PathLike[str]) -> Iterator[Line]:
    """The readable lines of a spool; none if there is no file.

    A torn line (its writer was killed) is passed over, wherever later attempts have left it in the file.
    """
    follower = Follower(path)
    while lines := follower.poll():
        yield from lines


def parse(raw: bytes) -> dict[str, Any] | None:
    """A line of a spool; None for what is none."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and "kind" in value else None


def _attempt(value: dict[str, Any]) -> int:
    """0 for a line that somebody else wrote, whose number is none."""
    number = value.get("attempt")
    return number if type(number) is int and 0 <= number < 1 << 53 else 0


def _without_passwords(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_passwords(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_passwords(part) for part in value]
    return public(value) if isinstance(value, str) and "://" in value else value


def is_torn(path: Path) -> bool:
    """Whether the last line of a file lacks its end: its writer was killed."""
    try:
        with path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"
    except OSError:  # no file, or an empty one
        return False
