"""What a run's folder says of the run, read from wherever it lies, without writing anything and without reading all of it.

The records of a run that trains on this machine are read from its own disk, where they are newer than in the bucket.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from orchestration.spool import mirror, rank_logs
from orchestration.spool.rank_logs import Line, LogName, parse_line, parse_name
from orchestration.spool.spool import MAIN, parse, records_folder
from pipeline import documents
from pipeline.errors import UserError
from pipeline.storage import listing, objects

MAX_RECORD_BYTES = 64 << 20
"""Of records in a bucket that are read: their beginning, and their end."""
MAX_HANGS = 20
LAST_STEPS = 20
STEP = b'"kind": "Step"'
HEAD_BYTES = 100
"""In which a line says what it is."""


@dataclass
class Records:
    """The records of a run, of its steps the last ones only: steps are nearly all of it."""

    events: list[dict[str, Any]] = field(default_factory=list)
    last_steps: list[dict[str, Any]] = field(default_factory=list)
    is_whole: bool = True
    """False: of very long records in a bucket the middle was not read."""


def records(url: str) -> Records:
    """Empty where the run has written none."""
    path = records_folder(url) / MAIN
    parts = [] if objects.is_local(url) else mirror.parts_of(url).get(MAIN, [])
    there = parts[-1][1] if parts else 0
    if path.exists() and path.stat().st_size >= there:
        with path.open("rb") as file:
            return _fold(file)
    first, rest, size = parts[:1], list[tuple[int, int, str]](), 0
    for part in reversed(parts[1:]):
        size += part[1] - part[0]
        if size > MAX_RECORD_BYTES:
            break
        rest.insert(0, part)
    chosen = first + rest
    found = _fold(line for part in chosen for line in mirror.read_part(*part).splitlines())
    found.is_whole = len(chosen) == len(parts)
    return found


def new_records(url: str) -> Iterator[Records]:
    """Asked again and again: what has been added since it was asked before; first nothing."""
    path, offset, is_first = records_folder(url) / MAIN, 0, True
    while True:
        data = b""
        parts = [] if objects.is_local(url) else mirror.parts_of(url).get(MAIN, [])
        if path.exists() and path.stat().st_size >= max(offset, parts[-1][1] if parts else 0):
            with path.open("rb") as file:
                file.seek(path.stat().st_size if is_first else offset)
                offset = file.tell()
                data = file.read()
        elif is_first and parts:
            offset = parts[-1][1]
        else:
            data = b"".join(mirror.read_part(*part) for part in parts if part[0] >= offset)
        whole = data[: data.rfind(b"\n") + 1]
        offset, is_first = offset + len(whole), False
        yield _fold(whole.splitlines())


def _fold(lines: Iterable[bytes]) -> Records:
    found, last = Records(), deque[bytes](maxlen=LAST_STEPS)
    for line in lines:
        if STEP in line[:HEAD_BYTES]:
            last.append(line)
        elif (value := _parse(line)) is not None:
            found.events.append(value)
    found.last_steps = [value for line in last if (value := _parse(line)) is not None]
    return found


def _parse(line: bytes) -> dict[str, Any] | None:
    value = parse(line)
    return value if value is not None and isinstance(value["kind"], str) and _is_time(value) else None


def _is_time(value: dict[str, Any]) -> bool:
    return isinstance(value.get("time_s"), int | float) and not isinstance(value.get("time_s"), bool)


def hangs(url: str) -> list[dict[str, Any]]:
    """The newest reports of frozen ranks, oldest first."""
    names = [i.name for i in listing.items(url) if i.name.startswith("hang-") and i.name.endswith(".json")]
    found = []
    for name in sorted(names)[-MAX_HANGS:]:
        try:
            report = documents.read(objects.join(url, name), dict[str, Any])
        except (UserError, FileNotFoundError):  # what is damaged is looked at by a person
            continue
        if _is_time(report):
            found.append({**report, "file": objects.join(url, name)})
    return found


def tracking(url: str) -> dict[str, dict[str, Any]]:
    """What trackers have of the run (`tracking.json`), by server; {} where it is not known."""
    places = [str(records_folder(url) / mirror.STATE), objects.join(url, mirror.FOLDER, mirror.STATE)]
    for place in places[: 1 if objects.is_local(url) else 2]:
        try:
            return documents.read(place, dict[str, dict[str, Any]])
        except (UserError, FileNotFoundError):
            continue
    return {}


class LogFile:
    """One log of a rank, read from where it was left."""

    def __init__(self, name: LogName, place: str) -> None:
        self.name, self._place = name, place
        self._offset_bytes = 0

    def lines(self) -> Iterator[Line]:
        """Those that are new and whole."""
        try:
            data = objects.read_bytes(self._place, max_bytes=rank_logs.MAX_BYTES * 2)
        except FileNotFoundError:
            return
        if len(data) < self._offset_bytes:  # it has begun anew, and what was in it is in the other file
            self._offset_bytes = 0
        new = data[self._offset_bytes :]
        whole = new[: new.rfind(b"\n") + 1]
        self._offset_bytes += len(whole)
        for raw in whole.decode(errors="backslashreplace").split("\n"):
            line = parse_line(raw)
            if line is not None:
                yield line


def log_files(url: str, rank: int | None = None) -> list[LogFile]:
    """The logs of a run's ranks; those on this machine where it trains the run, for they are ahead of the bucket's."""
    found: dict[LogName, str] = {}
    places = [] if objects.is_local(url) else [objects.join(url, rank_logs.FOLDER)]
    for place in [*places, str(records_folder(url) / rank_logs.FOLDER)]:
        for item in listing.items(place):
            name = parse_name(item.name)
            if name is not None and not item.is_folder and rank in (None, name.rank):
                found[name] = objects.join(place, item.name)
    return [LogFile(name, place) for name, place in sorted(found.items(), key=lambda pair: (pair[0].started, pair[0]))]


def is_run(names: Iterable[str]) -> bool:
    """Whether these are the names in a run's folder."""
    return bool({"run.yaml", MAIN, "checkpoints"} & set(names)) and "sweep.json" not in names
