"""Parts of one version of an object: the read that goes on at the byte where it broke and never mixes two versions.

A version is what the store said of the object when the run first looked: its size and its ETag (local files: modification
time and inode). S3 gets the ETag with every request (If-Match), so the store itself refuses the bytes of a successor.
Other stores are asked again after each read.

How many requests a process has under way is found by measuring (`Gate`), and a store that asks for patience gets it.
"""

import contextlib
import itertools
import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.storage import clients, multipart_upload, objects, store_errors

MAX_TRIES_WITHOUT_PROGRESS = 5
MAX_TRIES = 20
PIECE_BYTES = 1 << 20
PATIENCE_S = 40.0
"""A read is given up when a store has asked for patience for so long; the watchdog's 60 s without a step come later."""
MAX_WAIT_S = 5.0
ROUND_S, GAIN, HOLD_ROUNDS = 0.5, 1.1, 10
"""Of requests before their rate says anything; what more of them must bring; rounds until that is tried again if they do not."""

_clients: dict[tuple[object, ...], Any] = {}
_making = threading.Lock()


class ObjectChanged(OSError):
    """The object is not the version any more that the run began with."""


@dataclass(frozen=True)
class ObjectVersion:
    size_bytes: int
    tag: str
    """Changes when the content does; empty where a store has nothing of the kind."""


class Gate:
    """How many requests for ranges a process has under way: `first`, more (at most `most`) for as long as more bring more bytes
    a second and somebody waits for them; half as many, and none for a while, when a store asks for patience or does not answer.
    """

    def __init__(self, first: int, most: int) -> None:
        self.first, self.limit, self.most = first, first, most
        self.num_overloads, self.notice = 0, ""  # what a run should say of it, anew for ten times as many
        self._changed = threading.Condition()
        self._under_way, self._open_at_s, self._wait_s, self._halved_at_s = 0, 0.0, clients.FIRST_WAIT_S, 0.0
        self._base: tuple[int, float] | None = None  # requests and the bytes a second that they brought
        self._hold, self._bytes, self._num, self._is_short = 0, 0, 0, False
        self._begin_s = time.monotonic()

    @contextlib.contextmanager
    def request(self) -> Iterator[float]:
        """A place among those under way inside the block; when that began."""
        with self._changed:
            while (left_s := self._open_at_s - time.monotonic()) > 0 or self._under_way >= self.limit:
                self._is_short |= left_s <= 0
                self._changed.wait(left_s if left_s > 0 else None)
            self._under_way += 1
        try:
            yield time.monotonic()
        finally:
            with self._changed:
                self._under_way -= 1
                self._changed.notify()

    def brought(self, num_bytes: int) -> None:
        """A request ended well."""
        with self._changed:
            self._wait_s = clients.FIRST_WAIT_S
            self._bytes, self._num = self._bytes + num_bytes, self._num + 1
            spent_s = time.monotonic() - self._begin_s
            if spent_s < ROUND_S or self._num < 2 * self.limit:
                return
            if self._is_short:  # else more requests would have nothing to bring
                self._try_more(self._bytes / spent_s)
                self._changed.notify_all()
            self._begin_round()

    def overloaded(self, began_s: float) -> None:
        """A request that began then was told to come later, or had no answer in time."""
        with self._changed:
            self.num_overloads += 1
            if str(self.num_overloads).strip("0") == "1":
                self.notice = (
                    f"the object store asks for patience; requests put off or unanswered so far: {self.num_overloads}"
                )
            if began_s < self._halved_at_s:  # under way together with one that told us already
                return
            now_s = self._halved_at_s = time.monotonic()
            self.limit, self._base = max(1, self.limit // 2), None
            self._open_at_s = now_s + self._wait_s * (1 + random.random()) / 2  # processes come back one by one
            self._wait_s = min(2 * self._wait_s, MAX_WAIT_S)
            self._begin_round()

    def _try_more(self, rate: float) -> None:
        if self._base is not None and self.limit > self._base[0] and rate < GAIN * self._base[1]:
            self.limit, self._hold = self._base[0], HOLD_ROUNDS
            return
        self._base, self._hold = (self.limit, rate), self._hold - 1
        if self._hold <= 0:
            self.limit = min(self.most, max(self.limit + 1, self.limit * 3 // 2))

    def _begin_round(self) -> None:
        self._bytes, self._num, self._is_short = 0, 0, False
        self._begin_s = time.monotonic()


_gates: dict[int, Gate] = {}  # by process: a fork begins anew


def gate(first: int | None = None) -> Gate:
    """This process's, for all stores. With `first`: one that begins so, unless it is there."""
    with _making:  # threads that read at the same time share one
        found = _gates.get(os.getpid())
        if found is None or first not in (None, found.first):
            first = first or 8
            found = _gates[os.getpid()] = Gate(first, max(first, min(4 * first, clients.MAX_CONNECTIONS)))
        return found


def version(url: str) -> ObjectVersion:
    """The object's present version, asked of the store itself; FileNotFoundError if there is none."""
    if objects.is_local(url):
        return _local_version(os.stat(objects.local_path(url)))
    return _remote_version(clients.with_retries(url, lambda fs, path: fs.info(path, refresh=True)))


def versions(folder: str, names: Iterable[str]) -> dict[str, ObjectVersion]:
    """Versions of the objects `names` under `folder`; those that are not there are skipped.

    One listing for all of an object store's; what a listing does not show is asked for by name, because listings may be stale.
    """
    names = list(names)
    found: dict[str, ObjectVersion] = {}
    if not objects.is_local(folder) and len(names) > 1:
        listed = clients.with_retries(folder, _listing)
        by_name = {name.rpartition("/")[2]: info for name, info in listed.items()}
        found = {name: _remote_version(by_name[name]) for name in names if name in by_name and "/" not in name}
    for name in names:
        if name not in found:
            try:
                found[name] = version(objects.join(folder, name))
            except (FileNotFoundError, NotADirectoryError):
                continue
    return found


def read_into(url: str, offset: int, buffer: memoryview, expected: ObjectVersion) -> None:
    """Fill `buffer` with the bytes from `offset` of this version of the object.

    S3 is asked by a client without an event loop, which writes what arrives straight into the buffer: less than half the
    processor time of a gigabyte, where the buffer is used again.

    Raises:
        ObjectChanged: it is another version by now.
        FileNotFoundError: it is gone.
        OSError: it ends before the buffer does, or the store did not answer, again and again.
    """
    if not buffer:
        return
    if objects.is_local(url):
        _read_local(url, offset, buffer, expected)
        return
    filled = 0

    def fetch_more() -> None:
        nonlocal filled
        fs, path = clients.client(url)
        fill = _fill_s3 if multipart_upload.takes_parts(fs) else _fill_any
        before, shared = filled, gate()
        with shared.request() as began_s:
            try:
                for num_bytes in fill(fs, path, offset + filled, buffer[filled:], expected):
                    filled += num_bytes
            except Exception as error:
                if store_errors.is_overload(error):
                    shared.overloaded(began_s)
                raise
        shared.brought(filled - before)

    _until(url, len(buffer), lambda: filled, fetch_more, offset)


def _read_local(url: str, offset: int, buffer: memoryview, expected: ObjectVersion) -> None:
    # Opened for each request: a file that stays open would hide that another took its name. It costs some 10 us.
    file = os.open(objects.local_path(url), os.O_RDONLY)
    try:
        if _local_version(os.fstat(file)) != expected:
            raise ObjectChanged(f"{url} was replaced during the run")
        filled = 0
        while filled < len(buffer):
            num_bytes = os.preadv(file, [buffer[filled:]], offset + filled)
            if not num_bytes:
                raise OSError(f"{url}: {filled} bytes at offset {offset} where {len(buffer)} should be")
            filled += num_bytes
    finally:
        os.close(file)


def _until(url: str, length: int, there: Callable[[], int], fetch_more: Callable[[], None], offset: int) -> None:
    """Calls `fetch_more` until `length` bytes are there; what came before an error stays."""
    without_progress, progress_s = 0, time.monotonic()
    for attempt in itertools.count():
        before = there()
        try:
            fetch_more()
            if there() != length:  # a connection that ended cleanly, and too early
                raise ConnectionError(f"{url}: {there()} bytes at offset {offset} where {length} should be")
            return
        except ObjectChanged:
            raise ObjectChanged(f"{url} was replaced during the run") from None
        except Exception as error:
            now_s = time.monotonic()
            without_progress, progress_s = (0, now_s) if there() > before else (without_progress + 1, progress_s)
            is_last = attempt + 1 >= MAX_TRIES or without_progress >= MAX_TRIES_WITHOUT_PROGRESS
            if is_throttled := store_errors.is_throttled(error):
                is_last = now_s - progress_s > PATIENCE_S
            if is_last or clients.num_tries(error, url) == 1:
                clients.give_up(error, url)
            if is_throttled:
                continue  # the gate waits, for all requests of this process
        time.sleep(clients.FIRST_WAIT_S * 2 ** max(without_progress - 1, 0))


def _fill_s3(fs: Any, path: str, start: int, buffer: memoryview, expected: ObjectVersion) -> Iterator[int]:
    """Yields the number of bytes that each piece brought, so that what came before an error counts."""
    from botocore.exceptions import ClientError
    from s3fs.errors import translate_boto_error

    bucket, key, _ = fs.split_path(path)
    condition = {"IfMatch": expected.tag} if expected.tag else {}
    wanted = f"bytes={start}-{start + len(buffer) - 1}"
    try:
        answer = _plain_client(fs).get_object(Bucket=bucket, Key=key, Range=wanted, **condition, **fs.req_kw)
    except ClientError as error:
        if store_errors.answer_of(error).status == 412:
            raise ObjectChanged from error
        raise translate_boto_error(error) from error
    with contextlib.closing(answer["Body"]) as body:
        while buffer and (num_bytes := body.readinto(buffer[:PIECE_BYTES])):
            buffer = buffer[num_bytes:]
            yield num_bytes


def _plain_client(fs: Any) -> Any:
    """botocore's own client with what s3fs was given: credentials, endpoint, time limits. One a process; threads share it."""
    import botocore.session
    from botocore import UNSIGNED
    from botocore.config import Config

    # What the environment says counts too: botocore reads it when a client is made, and a process may change its store.
    said = tuple(
        os.environ.get(n) for n in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_PROFILE")
    )
    mark = (os.getpid(), fs._fs_token, said)
    with _making:
        if mark not in _clients:
            keys = {"aws_access_key_id": fs.key, "aws_secret_access_key": fs.secret, "aws_session_token": fs.token}
            given = {"endpoint_url": fs.endpoint_url, "use_ssl": fs.use_ssl, **({} if fs.anon else keys)}
            options = {**{k: v for k, v in given.items() if v is not None}, **fs.client_kwargs}
            settings = {**fs.config_kwargs, **({"signature_version": UNSIGNED} if fs.anon else {})}
            session = botocore.session.Session(**fs.kwargs)
            _clients[mark] = session.create_client("s3", config=Config(**settings), **options)
        return _clients[mark]


def _fill_any(fs: Any, path: str, start: int, buffer: memoryview, expected: ObjectVersion) -> Iterator[int]:
    """As `_fill_s3`, of a store that is not asked for a version: it is asked again afterwards."""
    for begin in range(0, len(buffer), PIECE_BYTES):
        into = buffer[begin : begin + PIECE_BYTES]
        piece = fs.cat_file(path, start=start + begin, end=start + begin + len(into))
        into[: len(piece)] = piece
        yield len(piece)
        if len(piece) < len(into):
            break
    if _remote_version(fs.info(path)) != expected:
        raise ObjectChanged


def _listing(fs: Any, path: str) -> dict[str, dict[str, Any]]:
    fs.invalidate_cache()
    return fs.find(path, detail=True)


def _local_version(stat: os.stat_result) -> ObjectVersion:
    return ObjectVersion(stat.st_size, f"{stat.st_mtime_ns}-{stat.st_ino}")


def _remote_version(info: dict[str, Any]) -> ObjectVersion:
    tag = next((str(info[name]) for name in ("ETag", "etag", "generation", "mtime", "created") if info.get(name)), "")
    return ObjectVersion(int(info["size"]), tag)
