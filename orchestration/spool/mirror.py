"""A run whose folder is in an object store: its spool grows on local disk, and follows there in parts.

An object cannot be appended to, so each part `<run>/spool/<file>/<first byte>` holds the whole lines that were added since
the part before, and is never written again. Another machine that goes on with the run, or imports it, puts them together.
What the server has acknowledged (`tracking.json`) is copied before the lines are: it may then lag behind them, which
costs asking the server, and never run ahead of them, which would lose lines.
"""

import contextlib
import re
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestration.spool import rank_logs
from orchestration.spool.spool import is_spool
from orchestration.spool.state_file import read_state, write_state
from pipeline import documents
from pipeline.errors import UserError
from pipeline.storage import objects

FOLDER = "spool"
STATE = "tracking.json"
OURS = "/./"
"""In a server's name there: it is a file in this machine's folder of the run (`orchestration.tracking.uploader`)."""
FIRST_PUSH_S, PUSH_EVERY_S, LAST_PUSH_S = 10.0, 300.0, 30.0  # 2,000 parts a week
LOGS_EVERY_S = 30.0
"""Logs of ranks are objects that are written anew, where they have changed."""
PART_BYTES = 64 << 20
MAX_BYTES = 1 << 30
"""Of a spool that comes out of a store: a million steps and more. It is held in memory, once."""
_SPAN = re.compile(r"\d{15}-\d{15}", re.ASCII)


class Mirror:
    """Copies spools of the local folder `run_dir` to the run folder `url` while it is entered, on a thread of its own.

    `own` are the files that this machine writes; with `bring_others` those of other machines come the other way.
    Never raises: the local file is the record, and a store that is away is asked again later.
    """

    def __init__(self, run_dir: Path, url: str, *, own: tuple[str, ...], bring_others: bool = False) -> None:
        self.run_dir, self.url = run_dir, url
        self._own, self._bring_others = own, bring_others
        self.failure: str | None = None
        """Why the last push failed; the next one begins where it ended."""
        self._sent: dict[str, int] | None = None
        self._logs: dict[rank_logs.LogName, int] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Mirror":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """A last push, which is given LAST_PUSH_S."""
        self._end.set()
        self._thread.join(LAST_PUSH_S)

    def _run(self) -> None:
        is_last, pushed_s = self._end.wait(FIRST_PUSH_S), float("-inf")
        while True:
            try:
                self.push_logs()
                if is_last or time.monotonic() - pushed_s >= PUSH_EVERY_S:
                    self.push()
                    pushed_s = time.monotonic()
                self.failure = None
            except Exception as error:
                self.failure, self._sent = f"{type(error).__name__}: {error}", None
            if is_last:
                return
            is_last = self._end.wait(LOGS_EVERY_S)

    def push(self) -> None:
        if self._sent is None:
            self._sent = {name: _length(parts) for name, parts in parts_of(self.url).items()}
        state = self.run_dir / STATE
        if state.exists():
            objects.write_bytes(objects.join(self.url, FOLDER, STATE), state.read_bytes())
        for name in self._own:
            if (self.run_dir / name).exists():
                self._push_file(self.run_dir / name, self._sent)
        if self._bring_others:
            pull(self.url, self.run_dir, leave=self._own)

    def push_logs(self) -> None:
        """The ranks' on this machine, and once: of these ranks' processes on any, the oldest are deleted in the store."""
        found = {n: p for p in (self.run_dir / rank_logs.FOLDER).glob("rank-*") if (n := rank_logs.parse_name(p.name))}
        if found and not self._logs:
            folder = objects.join(self.url, rank_logs.FOLDER)
            for name in rank_logs.too_old(map(_last, objects.list_urls(folder)), {name.rank for name in found}):
                objects.remove(objects.join(folder, str(name)))
        for name, path in found.items():
            size = path.stat().st_size
            if self._logs.get(name) != size:
                push_log(path, self.url)
                self._logs[name] = size

    def _push_file(self, path: Path, sent: dict[str, int]) -> None:
        with path.open("rb") as file:
            while True:
                first = sent.get(path.name, 0)
                file.seek(first)
                data = file.read(PART_BYTES)
                whole = data[: data.rfind(b"\n") + 1]
                if not whole:
                    return
                last = first + len(whole)
                objects.write_bytes(objects.join(self.url, FOLDER, path.name, f"{first:015}-{last:015}"), whole)
                sent[path.name] = last


def traces(run_dir: Path, mirror: Mirror | None, names: Sequence[str]) -> list[Path]:
    """Traces of profiles in the run's local folder, where those that lie in a store are brought to."""
    for name in names:
        file = run_dir / "profiles" / name
        if mirror is not None and not file.exists():
            with contextlib.suppress(Exception):  # whoever sends it says that it is not there
                file.parent.mkdir(exist_ok=True)
                objects.download(objects.join(mirror.url, "profiles", name), file)
    return [run_dir / "profiles" / name for name in names]


def _last(url: str) -> str:
    return url.rsplit("/", 1)[-1]


def push_log(path: Path, url: str) -> None:
    """The log of a rank into the run folder `url`, whole."""
    objects.write_bytes(objects.join(url, rank_logs.FOLDER, path.name), path.read_bytes())


def pull(url: str, run_dir: Path, *, leave: tuple[str, ...] = ()) -> bool:
    """Brings the spools of the run folder `url` into `run_dir`, but for `leave`; True if that changed anything.

    A local spool that begins with all that the mirror holds is the newer one, and stays. One that has gone another way
    (this machine was cut off while another went on with the run) is put aside as `<name>.<time>.aside`.

    Raises:
        UserError: a spool of more than MAX_BYTES, or a part that holds more or less than its name says.
    """
    changed = False
    for name, parts in sorted(parts_of(url).items()):
        local = run_dir / name
        if name in leave or (local.exists() and local.stat().st_size == _length(parts)):
            continue
        if _length(parts) > MAX_BYTES:
            raise UserError(
                f"{objects.join(url, FOLDER, name)} holds {_length(parts)} bytes, more than the {MAX_BYTES} that are read of a "
                "spool; move it away to go on without it"
            )
        data = b"".join(read_part(*part) for part in parts)
        mine = local.read_bytes() if local.exists() else b""
        if mine.startswith(data):
            continue
        if mine and not data.startswith(mine):
            local.rename(local.with_name(f"{name}.{int(time.time())}.aside"))
        objects.write_bytes(local, data)
        changed = True
    state = objects.join(url, FOLDER, STATE)
    if changed and not leave and objects.exists(state):
        _merge_state(run_dir / STATE, documents.read(state, dict[str, dict[str, Any]]))
    return changed


def read_part(first: int, last: int, url: str) -> bytes:
    data = objects.read_bytes(url, max_bytes=last - first + 1)  # one more is enough to see that there is more
    if len(data) != last - first:
        raise UserError(f"{url} is not the {last - first} bytes that its name says; restore it, or move the spool away")
    return data


def _merge_state(path: Path, theirs: dict[str, Any]) -> None:
    """Their account of what the servers have, but for what only we can know: servers that we alone used, our own SQLite."""
    mine = read_state(path)
    known = {server: state for server, state in theirs.items() if server not in mine or OURS not in server}
    write_state(path, {**mine, **known})


def parts_of(url: str) -> dict[str, list[tuple[int, int, str]]]:
    """File -> its parts (first byte, byte after the last, URL), each beginning where the one before ends.

    Nothing but spools: what else somebody has put into the store (a program's name, say) does not come to this machine.
    """
    prefix = objects.join(url, FOLDER)
    found: dict[str, list[tuple[int, int, str]]] = {}
    for part in objects.list_urls(prefix):
        file, _, span = part.removeprefix(prefix).strip("/").partition("/")
        first, _, last = span.partition("-")
        if is_spool(file) and _SPAN.fullmatch(span):
            parts = found.setdefault(file, [])
            if int(first) == _length(parts) < int(last):
                parts.append((int(first), int(last), part))
    return found


def _length(parts: list[tuple[int, int, str]]) -> int:
    return parts[-1][1] if parts else 0
