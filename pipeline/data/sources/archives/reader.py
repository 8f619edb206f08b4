"""The bytes of files that `pipeline.data.sources.archives.find_files` found, in any order, in any process."""

import os
import stat
import zipfile
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from pipeline.data.images.decode import MAX_IMAGE_BYTES
from pipeline.data.sources.archives.locators import LOCAL_HEADER_BYTES, Locator, Range, Refused, Sparse, Whole, Zipped
from pipeline.data.sources.entry import ImageEntry, Unreadable
from pipeline.storage import objects

_PARALLEL = 16  # requests to a store at a time, a process; each waits some 30 ms
_OPEN_FILES = 64
_FREE_BYTES, _MAX_RATIO = 64 << 20, 100
"""What is stored smaller than it is may be so large, or so many times larger: a picture is, a bomb is not."""


class _EndsInside(OSError):
    """A local archive is shorter than its directory says."""


class FileReader:
    """Reads locators of files, and of members of tars and zips. Files that are gone are `Unreadable`.

    Args:
        tolerant: also take what a server refuses (403, 404, 410) for unreadable: for lists of addresses.
    """

    def __init__(self, *, tolerant: bool = False) -> None:
        self._tolerant = tolerant
        self._files: dict[str, int] = {}
        self._pid = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {"_tolerant": self._tolerant, "_files": {}, "_pid": -1}

    def read(self, entries: Sequence[ImageEntry]) -> Iterator[bytes | Unreadable]:
        if all(isinstance(e.locator, Refused) or objects.is_local(e.locator.url) for e in entries):
            for entry in entries:
                yield self._read(entry.locator)
            return
        with ThreadPoolExecutor(_PARALLEL) as pool:
            pending: deque[Future[bytes | Unreadable]] = deque()
            try:
                for entry in entries:
                    pending.append(pool.submit(self._read, entry.locator))
                    if len(pending) > 2 * _PARALLEL:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:
                for future in pending:
                    future.cancel()

    def _read(self, locator: Locator) -> bytes | Unreadable:
        try:
            match locator:
                case Refused(reason):
                    return Unreadable(reason)
                case Whole(url):
                    return _local_file(url) if objects.is_local(url) else _object(url)
                case Range(url, offset, size):
                    return _too_large(size, size) or self._range(url, offset, size)
                case Sparse():
                    return self._sparse(locator)
                case Zipped():
                    return self._zip_member(locator)
        except (FileNotFoundError, NotADirectoryError):
            return Unreadable("no such file")
        except PermissionError as error:
            return Unreadable(error.strerror or "not permitted")
        except Exception as error:
            if self._tolerant and getattr(error, "status", None) in (400, 401, 403, 404, 410, 451):
                return Unreadable(f"the server answers {getattr(error, 'status', '')}")
            raise

    def _range(self, url: str, offset: int, size: int) -> bytes:
        if not objects.is_local(url):
            return objects.read_range(url, offset, size)
        if self._pid != os.getpid():
            self._files, self._pid = {}, os.getpid()
        if url not in self._files:
            if len(self._files) >= _OPEN_FILES:
                os.close(self._files.pop(next(iter(self._files))))
            self._files[url] = os.open(objects.local_path(url), os.O_RDONLY)
        data = os.pread(self._files[url], size, offset)
        if len(data) != size:
            raise _EndsInside(f"{url} ended inside a member: it was changed while it was read")
        return data

    def _sparse(self, place: Sparse) -> bytes | Unreadable:
        stored = sum(length for _, length in place.parts)
        refused = _too_large(place.size, stored)
        if refused:
            return refused
        packed = self._range(place.url, place.offset, stored)
        data = bytearray(place.size)
        at = 0
        for start, length in place.parts:
            data[start : start + length] = packed[at : at + length]
            at += length
        return bytes(data)

    def _zip_member(self, place: Zipped) -> bytes | Unreadable:
        refused = _too_large(place.size, place.packed_size)
        if refused:
            return refused
        head = self._range(place.url, place.header, LOCAL_HEADER_BYTES)
        names = int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
        if head[:4] != b"PK\x03\x04":
            return Unreadable("damaged in the zip (no header at its place)")
        try:
            data = self._range(place.url, place.header + len(head) + names, place.packed_size)
            if place.method == zipfile.ZIP_DEFLATED:
                # One byte more than recorded is enough to see a member that lies about its size.
                data = zlib.decompressobj(-15).decompress(data, place.size + 1)
        except (zlib.error, _EndsInside) as error:
            return Unreadable(f"damaged in the zip ({error})")
        if len(data) != place.size or zlib.crc32(data) != place.crc:
            return Unreadable("damaged in the zip (size or checksum differs)")
        return data


def _local_file(url: str) -> bytes | Unreadable:
    """The bytes of a regular file; a pipe or device is never waited for."""
    descriptor = os.open(objects.local_path(url), os.O_RDONLY | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            return Unreadable("no regular file")
        with open(descriptor, "rb", closefd=False) as file:
            return _too_large(status.st_size, status.st_size) or file.read(status.st_size)
    finally:
        os.close(descriptor)


def _object(url: str) -> bytes | Unreadable:
    data = objects.read_bytes(url, max_bytes=MAX_IMAGE_BYTES + 1)
    return _too_large(len(data), len(data)) or data


def _too_large(size: int, stored: int) -> Unreadable | None:
    if size > MAX_IMAGE_BYTES:
        return Unreadable(f"{size} bytes, more than the {MAX_IMAGE_BYTES} allowed")
    if size > max(_FREE_BYTES, _MAX_RATIO * stored):
        return Unreadable(f"{size} bytes out of {stored}, which no picture has")
    return None
