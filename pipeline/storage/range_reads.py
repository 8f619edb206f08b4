"""Parts of one version of an object: the read that goes on at the byte where it broke and never mixes two versions.

A version is what the store said of the object when the run first looked: its size and its ETag (local files: modification
time and inode). S3 gets the ETag with every request (If-Match), so the store itself refuses the bytes of a successor.
Other stores are asked again after each read.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.storage import clients, multipart_upload, objects, store_errors

MAX_TRIES_WITHOUT_PROGRESS = 5
MAX_TRIES = 20
PIECE_BYTES = 1 << 20

_clients: dict[tuple[object, ...], Any] = {}
_making = threading.Lock()


class ObjectChanged(OSError):
    """The object is not the version any more that the run began with."""


@dataclass(frozen=True)
class ObjectVersion:
    size_bytes: int
    tag: str
    """Changes when the content does; empty where a store has nothing of the kind."""


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
        for num_bytes in fill(fs, path, offset + filled, buffer[filled:], expected):
            filled += num_bytes

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
    without_progress = 0
    for attempt in range(MAX_TRIES):
        before = there()
        try:
            fetch_more()
            if there() != length:  # a connection that ended cleanly, and too early
                raise ConnectionError(f"{url}: {there()} bytes at offset {offset} where {length} should be")
            return
        except ObjectChanged:
            raise ObjectChanged(f"{url} was replaced during the run") from None
        except Exception as error:
            without_progress = 0 if there() > before else without_progress + 1
            is_last = attempt + 1 == MAX_TRIES or without_progress >= MAX_TRIES_WITHOUT_PROGRESS
            if is_last or clients.num_tries(error, url) == 1:
                clients.give_up(error, url)
        time.sleep(clients.FIRST_WAIT_S * 2 ** max(without_progress - 1, 0))
    raise AssertionError("unreachable")


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
