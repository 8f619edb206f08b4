"""What of a run's spool a server has, and what it has not acknowledged yet: lines that wait, in order, each translated."""

import contextlib
import hashlib
import secrets
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestration.spool.spool import MAIN, Follower, Line
from orchestration.spool.state_file import ServerState
from orchestration.tracking.tracking_uri import server_name
from orchestration.tracking.translate import Translator
from orchestration.tracking.upload import Upload

MAX_PENDING = 2000  # lines; the rest of a long spool waits on disk
OTHERS = "system-*.jsonl"


def nothing_sent() -> dict[str, Any]:
    """In `tracking.json`: how many lines a new server has of the run's own spool, and of others by their file."""
    return {"acknowledged": 0, "beside": {}}


def state_of(run_dir: Path, uri: str, experiment: str | None, run_name: str | None) -> ServerState:
    """What the server at `uri` has of the run. A spool can go to many servers; the run has one name on all of them."""
    fresh = {"run_id": None, "token": _token(run_dir), **nothing_sent()}
    state = ServerState(run_dir / "tracking.json", server_name(uri, run_dir), fresh)
    for key, given, default in (("experiment", experiment, "normfree"), ("run_name", run_name, run_dir.name)):
        known = (there[key] for there in (state, *state.everywhere.values()) if there.get(key))
        state[key] = given or next(known, default)
    return state


def _token(run_dir: Path) -> str:
    """By which the run is known on a server: of its first line, so that two machines that import it mean one run."""
    with contextlib.suppress(OSError), (run_dir / MAIN).open("rb") as file:
        if (line := file.readline()).endswith(b"\n"):
            return hashlib.sha256(line).hexdigest()[:16]
    return secrets.token_hex(8)


@dataclass
class _Source:
    """One file of lines: the run's own, or what a node reports about itself."""

    name: str
    follower: Follower
    translator: Translator = field(default_factory=Translator)


class Backlog:
    """The lines of `run_dir`'s spools behind the ones that `state` counts as acknowledged."""

    def __init__(self, run_dir: Path, state: ServerState) -> None:
        self._run_dir, self._state = run_dir, state
        self.rewind()

    def rewind(self) -> None:
        """Start again at the first line."""
        main = _Source(MAIN, Follower(self._run_dir / MAIN))
        self._sources, self.translator = [main], main.translator
        self._pending: deque[tuple[str, int, Upload]] = deque()
        self.is_caught_up = False
        """All that is written has been taken in."""

    def __len__(self) -> int:
        return len(self._pending)

    def poll(self) -> None:
        """Take in what has been written, all of it or as much as fits: then `is_caught_up` is False."""
        if len(self._pending) >= MAX_PENDING:
            self.is_caught_up = False
            return
        known = {source.name for source in self._sources}
        for path in sorted(self._run_dir.glob(OTHERS)):
            if path.name not in known:
                self._sources.append(_Source(path.name, Follower(path)))
        self.is_caught_up = True
        for source in self._sources:
            lines: list[Line] = []
            while self.is_caught_up and (lines := source.follower.poll()):
                self.is_caught_up = len(self._pending) < MAX_PENDING
                for line in lines:
                    upload = source.translator.translate(line.value)
                    if line.number >= self._acknowledged(source.name):
                        self._pending.append((source.name, line.number, upload))

    def first(self, size: int) -> list[Upload]:
        return [self._pending[i][2] for i in range(min(size, len(self._pending)))]

    def acknowledge(self, num: int) -> None:
        """The server has the first `num` of the lines that wait."""
        for _ in range(num):
            source, number, _upload = self._pending.popleft()
            if source == MAIN:
                self._state["acknowledged"] = number + 1
            else:
                self._state["beside"][source] = number + 1

    @property
    def num_known(self) -> int:
        """Lines that the server has acknowledged, from any uploader of this folder."""
        return sum(self._acknowledged(source.name) for source in self._sources)

    def count_rest(self) -> int:
        """Lines that the server does not have, those on disk included; nothing can be polled afterwards."""
        num = len(self._pending)
        for source in self._sources:
            while lines := source.follower.poll():
                num += len(lines)
        return num

    def _acknowledged(self, source: str) -> int:
        return int(self._state["acknowledged"] if source == MAIN else self._state["beside"].get(source, 0))
