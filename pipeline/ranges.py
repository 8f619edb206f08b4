"""Parts of one version of an object: the read that goes on at the byte where it broke and never mixes two versions.

A version is what the store said of the object when the run first looked: its size and its ETag (local files: modification
time and inode). S3 gets the ETag with every request (If-Match), so the store itself refuses the bytes of a successor.
Other stores are asked again after each read.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pipeline import storage

MAX_TRIES_WITHOUT_PROGRESS = 5
MAX_TRIES = 20
PIECE_BYTES = 1 << 20


class ObjectChanged(OSError):
    """The object is not the version any more that the run began with."""


@dataclass(frozen=True)
class Version:
    size_bytes: int
    tag: str
    """Changes when the content does; empty where a store has nothing of the kind."""


def version(url: str) -> Version:
    """The object's present version, asked of the store itself; FileNotFoundError if there is none."""
    if storage.is_local(url):
        return _local_version(os.stat(storage.local_path(url)))
    return _remote_version(storage.with_retries(url, lambda fs, path: fs.info(path, refresh=True)))


def versions(folder: str, names: Iterable[str]) -> dict[str, Version]:
    """Versions of the objects `names` under `folder`; those that are not there are left out.

    One listing for all of an object store's; what a listing does not show is asked for by name, because listings may be stale.
    """
    names = list(names)
    found: dict[str, Version] = {}
    if not storage.is_local(folder) and len(names) > 1:
        listed = storage.with_retries(folder, _listing)
        by_name = {name.rpartition("/")[2]: info for name, info in listed.items()}
        found = {name: _remote_version(by_name[name]) for name in names if name in by_name and "/" not in name}
    for name in names:
        if name not in found:
            try:
                found[name] = version(storage.join(folder, name))
            except (FileNotFoundError, NotADirectoryError):
                continue
    return found


def read(url: str, offset: int, length: int, expected: Version) -> bytes:
    """`length` bytes from `offset` of this version of the object, fewer where it ends before.

    Raises:
        ObjectChanged: it is another version by now.
        FileNotFoundError: it is gone.
        OSError: the store did not answer, again and again.
    """
    length = max(0, min(length, expected.size_bytes - offset))
    if not length:
        return b""
    if not storage.is_local(url):
        return _read_remote(url, offset, length, expected)
    # Opened for each request: a file that stays open would hide that another took its name. It costs some 10 us.
    file = os.open(storage.local_path(url), os.O_RDONLY)
    try:
        if _local_version(os.fstat(file)) != expected:
            raise ObjectChanged(f"{url} was replaced during the run")
        return os.pread(file, length, offset)
    finally:
        os.close(file)


def _read_remote(url: str, offset: int, length: int, expected: Version) -> bytes:
    got = bytearray()
    without_progress = 0
    for attempt in range(MAX_TRIES):
        before = len(got)
        try:
            fs, path = storage.client(url)
            _append(fs, path, offset + len(got), offset + length, expected, got)
            if len(got) < length:  # a connection that ended cleanly, and too early
                raise ConnectionError(f"{url}: {len(got)} bytes at offset {offset} where {length} should be")
            return bytes(got)
        except ObjectChanged:
            raise ObjectChanged(f"{url} was replaced during the run") from None
        except Exception as error:
            storage.refuse_the_users_mistake(error, url)
            without_progress = 0 if len(got) > before else without_progress + 1
            is_last = attempt + 1 == MAX_TRIES or without_progress >= MAX_TRIES_WITHOUT_PROGRESS
            if is_last or not storage.is_transient(error):
                raise
        time.sleep(storage.FIRST_WAIT_S * 2 ** max(without_progress - 1, 0))
    raise AssertionError("unreachable")


def _append(fs: Any, path: str, start: int, end: int, expected: Version, into: bytearray) -> None:
    """Adds the bytes start ... end of an object to `into` as they arrive, so that what came before an error stays."""
    if "s3" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,)):
        asyncio.run_coroutine_threadsafe(_append_s3(fs, path, start, end, expected, into), fs.loop).result()
        return
    for begin in range(start, end, PIECE_BYTES):
        into += fs.cat_file(path, start=begin, end=min(begin + PIECE_BYTES, end))
    if _remote_version(fs.info(path)) != expected:
        raise ObjectChanged


async def _append_s3(fs: Any, path: str, start: int, end: int, expected: Version, into: bytearray) -> None:
    bucket, key, _ = fs.split_path(path)
    condition = {"IfMatch": expected.tag} if expected.tag else {}
    try:
        answer = await fs._call_s3("get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{end - 1}", **condition)
    except Exception as error:
        if "PreconditionFailed" in _code(error):
            raise ObjectChanged from error
        raise
    async with answer["Body"] as body:
        while piece := await body.read(PIECE_BYTES):
            into += piece


def _listing(fs: Any, path: str) -> dict[str, dict[str, Any]]:
    fs.invalidate_cache()
    return fs.find(path, detail=True)


def _code(error: BaseException) -> str:
    """S3's own word for an error; s3fs keeps it in the cause."""
    for each in (error, error.__cause__):
        answer = getattr(each, "response", None)
        if isinstance(answer, dict):
            code = str(answer.get("Error", {}).get("Code", ""))
            return "PreconditionFailed" if code == "412" else code
    return ""


def _local_version(stat: os.stat_result) -> Version:
    return Version(stat.st_size, f"{stat.st_mtime_ns}-{stat.st_ino}")


def _remote_version(info: dict[str, Any]) -> Version:
    tag = next((str(info[name]) for name in ("ETag", "etag", "generation", "mtime", "created") if info.get(name)), "")
    return Version(int(info["size"]), tag)
