"""Replace an object only if nobody else has since: where the store can, in one request; else by writing and looking back.

S3 has conditions for a write (If-None-Match since 2024, If-Match since then); many compatible stores have them too, some answer
501, and older ones overlook them without a word. So each write is asked for twice: a store that knows conditions refuses the
second. On a disk a hard link makes a file only where there is none, on network file systems too.
"""

import contextlib
import errno
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline import places
from pipeline.storage import clients, multipart_upload, objects, store_errors

SETTLE_S, SETTLE_REMOTE_S = 1.0, 3.0
"""Where a write has no condition, two that meet are both there within this time, and the later one stands."""


def read(url: str) -> tuple[bytes, str] | None:
    """The object's bytes and the mark by which `replace` knows this version of it; None where there is none."""
    try:
        if objects.is_local(url) or not multipart_upload.takes_parts(clients.client(url)[0]):
            return objects.read_bytes(url), ""
        # The mark first: an object that changes in between has another one, and the write is refused.
        mark = clients.with_retries(url, lambda fs, path: str(fs.info(path)["ETag"]))
        return objects.read_bytes(url), mark
    except (FileNotFoundError, NotADirectoryError):
        return None


def replace(url: str, data: bytes, before: tuple[bytes, str] | None, *, others_are_here: bool = False) -> bool:
    """Write `data`, which no other writer may ever write, where `before` stands (None: nothing). False if it does no more.

    Args:
        others_are_here: who else may write is on this machine, so that a lock of its kernel on a disk decides at once.
    """
    if objects.is_local(url):
        return _replace_file(objects.local_path(url), data, before, others_are_here)
    if multipart_upload.takes_parts(clients.client(url)[0]):
        condition = {"IfMatch": before[1]} if before else {"IfNoneMatch": "*"}
        first = _put(url, data, condition)
        if first is not None:
            # A write whose answer was lost is refused when the client tries it again, and stands all the same.
            return (first and _put(url, data, condition) is False) or _stands(url, data)
    elif read(url) != before:
        return False
    objects.write_bytes(url, data)
    return _stands(url, data)


def _put(url: str, data: bytes, condition: dict[str, str]) -> bool | None:
    """Whether the store wrote it; None where it has no such conditions."""

    def put(fs: Any, path: str) -> bool | None:
        bucket, key, _ = fs.split_path(path)
        try:
            fs.call_s3("put_object", Bucket=bucket, Key=key, Body=data, **condition)
            clients.note_written(url)
            return True
        except OSError as error:
            answer = store_errors.answer_of(error)
            if answer.status in (404, 409, 412) and answer.code != "NoSuchBucket":
                return False
            if answer.status in (400, 501):
                return None
            raise

    return clients.with_retries(url, put)


def _stands(url: str, data: bytes) -> bool:
    time.sleep(SETTLE_S if objects.is_local(url) else SETTLE_REMOTE_S)
    found = read(url)
    return found is not None and found[0] == data


def _replace_file(path: Path, data: bytes, before: tuple[bytes, str] | None, others_are_here: bool) -> bool:
    path.parent.mkdir(parents=True, exist_ok=True)
    if before is None:
        new = path.parent / f"{objects.TEMP_PREFIX}{os.getpid()}-{secrets.token_hex(6)}"
        try:
            with new.open("xb") as file:
                file.write(data)
            os.link(new, path)
            return True
        except FileExistsError:
            return False
        except OSError as error:  # a file system without hard links
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV):
                raise
        finally:
            new.unlink(missing_ok=True)
    with _lock(path.parent) as is_locked:
        if read(str(path)) != before:
            return False
        objects.write_bytes(path, data)
    return (is_locked and others_are_here) or _stands(str(path), data)


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Keeps other processes of this machine out; False on a file system without such locks."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        yield places.lock(handle, wait=True) is True
    finally:
        os.close(handle)
