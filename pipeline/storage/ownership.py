"""One owner at a time for a folder that is being written: a run, a sweep, a dataset; on a disk, a shared one or in a bucket.

    with ownership.hold(url, "run"):    the second process that asks is refused with a sentence that names the first

    FOLDER/owner.json    its processes, since when, a random token, and a beat every `BEAT_S` seconds; gone with the owner

An owner on this machine lives as long as one of its processes (number and time of start). Of one on another machine only the
beat is known: it is dead when the record has stood still for `LIMIT_S` on our clock, so the clocks of machines need not agree.
A dead owner is taken over. `pipeline.storage.conditional_put` lets one of several takers win.
"""

import contextlib
import dataclasses
import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

from pipeline.display import terminal
from pipeline.errors import UserError
from pipeline.storage import conditional_put, objects
from pipeline.storage.process_identity import Process, this_process

NAME = "owner.json"
BEAT_S = 10.0
LIMIT_S = 60.0
"""An owner on another machine whose record does not change for this long is dead."""
OLD_S = 1800.0
"""No two clocks differ by this much: a record whose last beat is older needs no watching."""
LEAVE_S = 180.0
"""Processes whose launcher was killed save and leave: so long the next start waits for them."""
POLL_S = 0.5
JOB = "NORMFREE_JOB"
"""The variable that names what starts processes again after they failed: no owner of the same job is a stranger."""


class InUse(UserError):
    """The folder has a living owner."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """The content of `owner.json`."""

    what: str
    token: str
    since_s: float
    beat_s: float
    """Unix time by the owner's clock."""
    processes: tuple[Process, ...]
    """The first one writes the record."""
    job: str = ""
    """Of which this is one attempt, and those before have ended or are about to."""

    @property
    def main(self) -> Process:
        return self.processes[0]

    def to_json(self) -> bytes:
        return (json.dumps(dataclasses.asdict(self), indent=1) + "\n").encode()


@dataclass(frozen=True)
class Holder:
    """What `hold` gives: proof of ownership that other processes can look for (`is_seen`)."""

    url: str
    token: str

    def is_seen(self) -> bool:
        """Whether this process finds the owner's record at its own `url`."""
        record = look(self.url)
        return record is not None and record.token == self.token


@contextlib.contextmanager
def hold(
    url: str,
    what: str,
    *,
    processes: Sequence[Process] = (),
    remedy: str = "give another folder with --out",
    leave: Callable[[int], None] = os._exit,
) -> Iterator[Holder]:
    """Own the folder `url` inside the block.

    Args:
        what: "run", "sweep", "dataset": for the sentence.
        processes: all that write there on behalf of this one, which is the first; default: this one alone.
        remedy: what else a second process could do.
        leave: ends the process when another one has taken the folder over, since this one stood still for so long.
    Raises:
        InUse: the folder has a living owner.
        UserError: it cannot be written.
    """
    now_s = time.time()
    mine = Record(
        what=what,
        token=secrets.token_hex(16),
        since_s=now_s,
        beat_s=now_s,
        processes=tuple(processes) or (this_process(),),
        job=os.environ.get(JOB, ""),
    )
    is_new = objects.is_local(url) and not objects.local_path(url).exists()
    with _writable(url):
        _claim(objects.join(url, NAME), url, mine, remedy)
    closed = threading.Event()
    thread = threading.Thread(target=_beat, args=(url, mine, closed, leave), name="owner", daemon=True)
    thread.start()
    _held[mine.token] = closed, thread
    try:
        yield Holder(url, mine.token)
    finally:
        _end_beat(mine.token)
        _release(url, mine, remove_folder=is_new)


_held: dict[str, tuple[threading.Event, threading.Thread]] = {}


def _end_beat(token: str) -> None:
    if token in _held:
        closed, thread = _held.pop(token)
        closed.set()
        thread.join(BEAT_S)


def _claim(place: str, url: str, mine: Record, remedy: str) -> None:
    seen, since_s, begin_s, is_reported = b"", time.monotonic(), time.monotonic(), False
    while True:
        before = conditional_put.read(place)
        if before is None:
            if conditional_put.replace(place, mine.to_json(), None):
                return
            continue  # somebody was quicker: see who
        owner = _parse(before[0])
        if owner is not None and owner.token == mine.token:
            return  # the answer to the write was lost on the way
        is_earlier = (
            owner is not None and mine.job != "" and owner.job == mine.job and time.monotonic() - begin_s < LEAVE_S
        )
        if before[0] != seen:
            beats = bool(seen) and owner is not None and not owner.main.is_here
            if owner is not None and not is_earlier and (beats or (owner.main.is_here and _lives_here(owner, begin_s))):
                raise InUse(f"{url} is in use: {_describe(owner)}; wait for its end, stop it, or {remedy}")
            seen, since_s = before[0], time.monotonic()
        if _is_dead(owner, time.monotonic() - since_s):
            if owner is not None and _is_mine(owner):
                _end_beat(owner.token)
            # Another machine that takes it over has watched it for a minute, and hears of us with its first beat.
            is_here = owner is not None and owner.main.is_here
            if conditional_put.replace(place, mine.to_json(), before, others_are_here=is_here):
                return
            continue
        if not is_reported:
            is_reported = True
            _say(_why_it_waits(url, owner))
        time.sleep(POLL_S)


def _why_it_waits(url: str, owner: Record | None) -> str:
    if owner is None:
        return f"{url} has an {NAME} that is not readable; looking for {LIMIT_S:.0f} s whether anybody writes it"
    if owner.main.is_here:
        return (
            f"{url} is in use: {_describe(owner)}; it leaves, for its launcher is gone or starts anew: waiting for it"
        )
    return f"{url} may be in use: {_describe(owner)}; looking for at most {LIMIT_S:.0f} s whether it still lives"


def _lives_here(owner: Record, begin_s: float) -> bool:
    """Whether it goes on: not one that leaves because its launcher is gone, which is waited for."""
    if not any(p.is_alive for p in owner.processes if p.is_here) or _is_mine(owner):
        return False
    return owner.main.has_launcher or time.monotonic() - begin_s > LEAVE_S


def look(url: str) -> Record | None:
    """Who owns the folder, alive or not; None where nobody does, or its record is not readable."""
    found = conditional_put.read(objects.join(url, NAME))
    return _parse(found[0]) if found else None


def is_alive(url: str, owner: Record) -> bool:
    """Whether the owner that `look` found lives. One on another machine whose record is old by our clock is watched for two
    beats: clocks differ."""
    if owner.main.is_here:
        return any(p.is_alive for p in owner.processes if p.is_here)
    age_s = time.time() - owner.beat_s
    if abs(age_s) <= LIMIT_S or age_s > OLD_S:
        return abs(age_s) <= LIMIT_S
    end_s = time.monotonic() + 2 * BEAT_S
    while time.monotonic() < end_s:
        time.sleep(POLL_S)
        again = look(url)
        if again is None or again.token != owner.token or again.beat_s != owner.beat_s:
            return again is not None
    return False


def _is_mine(owner: Record) -> bool:
    """A block of this very process, which was given up without being closed."""
    return owner.main.is_here and owner.main.pid == os.getpid()


def _is_dead(owner: Record | None, still_s: float) -> bool:
    if owner is not None and owner.main.is_here:
        return _is_mine(owner) or not any(p.is_alive for p in owner.processes if p.is_here)
    is_old = owner is not None and time.time() - owner.beat_s > OLD_S
    return is_old or still_s > LIMIT_S


def _describe(owner: Record) -> str:
    since = datetime.fromtimestamp(owner.since_s).strftime("%Y-%m-%d %H:%M:%S")
    return (
        f"a {owner.what} of process {owner.main.pid} on {owner.main.host} since {since}, "
        f"last sign of life {max(0.0, time.time() - owner.beat_s):.0f} s ago"
    )


def _beat(url: str, mine: Record, closed: threading.Event, leave: Callable[[int], None]) -> None:
    while not closed.wait(BEAT_S):
        try:
            owner = look(url)
            if owner is not None and owner.token != mine.token:
                if closed.is_set():
                    return
                _say(
                    f"{url} was taken over by {_describe(owner)}, for this process stood still; it leaves, and writes no more"
                )
                leave(2)
                return
            beat = dataclasses.replace(mine, beat_s=time.time())
            if not closed.is_set():
                objects.write_bytes(objects.join(url, NAME), beat.to_json())
        except Exception:  # the store is away, and clients raise what they like: the next beat tries again
            continue


def _release(url: str, mine: Record, *, remove_folder: bool) -> None:
    """What cannot be removed now is that of a dead owner soon."""
    with contextlib.suppress(Exception):
        if Holder(url, mine.token).is_seen():
            objects.remove(objects.join(url, NAME))
        if remove_folder:  # nothing was written: a run that is refused while it starts leaves no trace
            objects.local_path(url).rmdir()


@contextlib.contextmanager
def _writable(url: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if not objects.is_local(url):
            raise
        path = objects.local_path(url).absolute()
        why = "it is a file" if path.is_file() else error.strerror or str(error)
        raise UserError(f"{path} cannot be written ({why}); give a folder that can") from None


def _parse(data: bytes) -> Record | None:
    try:
        fields = json.loads(data)
        fields["processes"] = tuple(Process(**p) for p in fields["processes"])
        record = Record(**fields)
        return record if record.processes and record.beat_s + record.since_s > 0 else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _say(text: str) -> None:
    os.write(sys.stderr.fileno() if hasattr(sys.stderr, "fileno") else 2, f"normfree: {terminal(text)}\n".encode())
