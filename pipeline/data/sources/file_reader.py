"""The bytes of files that `pipeline.data.sources.archives` found, in any order, in any process."""

import os
import zipfile
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from pipeline.data.sources.entry import Entry, Unreadable
from pipeline.storage import objects

_PARALLEL = 16  # requests to a store at a time, a process; each waits some 30 ms
_OPEN_FILES = 64
_LOCAL_HEADER_BYTES = 30


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

    def read(self, entries: Sequence[Entry]) -> Iterator[bytes | Unreadable]:
        if all(objects.is_local(entry.locator[0]) for entry in entries):
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

    def _read(self, locator: tuple[Any, ...]) -> bytes | Unreadable:
        url, *place = locator
        try:
            if not place:
                return objects.read_bytes(url)
            if len(place) == 2:
                return self._range(url, *place)
            return self._zip_member(url, *place)
        except FileNotFoundError:
            return Unreadable("no such file")
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
            raise OSError(f"{url} ended inside a member: it was changed while it was read")
        return data

    def _zip_member(
        self, url: str, header: int, packed_size: int, size: int, method: int, crc: int
    ) -> bytes | Unreadable:
        head = self._range(url, header, _LOCAL_HEADER_BYTES)
        start = (
            header + _LOCAL_HEADER_BYTES + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
        )
        data = self._range(url, start, packed_size)
        try:
            if method == zipfile.ZIP_DEFLATED:
                # One byte more than stated is enough to see a member that lies about its size.
                data = zlib.decompressobj(-15).decompress(data, size + 1)
        except zlib.error as error:
            return Unreadable(f"damaged in the zip ({error})")
        if len(data) != size or zlib.crc32(data) != crc:
            return Unreadable("damaged in the zip (size or checksum differs)")
        return data
