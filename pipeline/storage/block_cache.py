"""Blocks of shards from an object store, kept on the local disk and shared by all processes of the machine.

    <folder>/<2 hex>/<SHA-256 of the shard>/<first byte>-<length>      the bytes, then their CRC-32 in 4 bytes

Keyed by the content of the shard, so equal file names of two datasets never meet. A damaged entry is fetched again. An entry
is fetched by one process while the others wait for it. A disk that is full, or not writable, ends the caching and not the
run. The total stays below a bound: the entries that were not used for the longest time go first.
"""

import contextlib
import os
import secrets
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline import places

KEEP_FREE_BYTES = 1 << 30
"""Nothing is kept when the disk has less than this left: checkpoints and logs need it more."""
_STRIPES = 64
_TAIL = 4
_WRITING_NS = 3600 * 10**9
"""An unfinished entry that is older was left by a process that is gone."""


class BlockCache:
    """Entries under `folder`, at most `bound_bytes` in all (and a twentieth more while an eviction is due)."""

    def __init__(self, folder: str, bound_bytes: int) -> None:
        self._folder, self._bound_bytes = Path(folder), bound_bytes
        self._written_bytes = bound_bytes  # since this process last looked: look at the first write
        self._verified: set[tuple[Path, int, int]] = set()
        self.failure: str | None = None
        """Why nothing is kept any more; None while all is well."""

    def get(self, sha256: str, offset: int, length: int, fetch: Callable[[], bytes]) -> bytes:
        """The bytes offset ... offset + length of a shard: the entry's if there is one, else what `fetch` returns."""
        path = self._folder / sha256[:2] / sha256 / f"{offset}-{length}"
        data = self._read(path, length)
        if data is not None:
            return data
        try:
            with self._only_one(path):
                data = self._read(path, length)  # another process may have brought it meanwhile
                if data is None:
                    data = self._fetch_and_keep(path, length, fetch)
                return data
        except _DiskError as failure:
            self.failure = self.failure or str(failure)
            return fetch() if data is None else data

    def _fetch_and_keep(self, path: Path, length: int, fetch: Callable[[], bytes]) -> bytes:
        data = fetch()
        if self.failure is None and len(data) == length:  # what is short is short at its source: not worth keeping
            try:
                self._write(path, data)
            except OSError as error:
                self.failure = f"the shard cache {self._folder} takes no more ({error}); data is streamed past it"
        return data

    def _read(self, path: Path, length: int) -> bytes | None:
        """The verified content of an entry, or None."""
        try:
            with path.open("rb") as file:
                stat = os.fstat(file.fileno())
                if stat.st_size != length + _TAIL:
                    raise ValueError
                data = file.read(length)
                mark = (path, stat.st_mtime_ns, stat.st_ino)
                if mark not in self._verified:
                    if zlib.crc32(data).to_bytes(_TAIL, "little") != file.read(_TAIL):
                        raise ValueError
                    self._verified.add(mark)
                    os.utime(path, ns=(time.time_ns(), stat.st_mtime_ns))  # its last use
                return data
        except ValueError:
            with contextlib.suppress(OSError):
                path.unlink()
        except OSError:
            pass
        return None

    def _write(self, path: Path, data: bytes) -> None:
        free = os.statvfs(self._folder)
        if free.f_bavail * free.f_frsize < KEEP_FREE_BYTES + len(data):
            raise OSError(f"less than {KEEP_FREE_BYTES >> 20} MiB of the disk are free")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / f".{os.getpid()}-{secrets.token_hex(4)}"
        try:
            temporary.write_bytes(data + zlib.crc32(data).to_bytes(_TAIL, "little"))
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        self._written_bytes += len(data)
        if self._written_bytes > self._bound_bytes // 20:
            self._written_bytes = 0
            self._evict()

    def _evict(self) -> None:
        """Remove what was not used for the longest time until a tenth of the bound is free; one process at a time does."""
        with self._lock("evict", wait=False) as is_ours:
            if not is_ours:
                return
            entries = []
            for folder, _, names in os.walk(self._folder):
                for name in names:
                    with contextlib.suppress(OSError):
                        stat = os.stat(os.path.join(folder, name))
                        entries.append((max(stat.st_atime_ns, stat.st_mtime_ns), stat.st_size, folder, name))
            total = sum(size for _, size, _, _ in entries)
            if total <= self._bound_bytes:
                return
            for used, size, folder, name in sorted(entries):
                if total <= self._bound_bytes * 9 // 10:
                    break
                # What another process is writing at this moment is not to be touched; what a killed one left is.
                if name.endswith(".lock") or (name.startswith(".") and used > time.time_ns() - _WRITING_NS):
                    continue
                with contextlib.suppress(OSError):  # a reader that has it open keeps it; one that comes late fetches
                    os.unlink(os.path.join(folder, name))
                    total -= size

    @contextlib.contextmanager
    def _only_one(self, path: Path) -> Iterator[None]:
        stripe = zlib.crc32(str(path).encode()) % _STRIPES
        with self._lock(f"{stripe}", wait=True):
            yield

    @contextlib.contextmanager
    def _lock(self, name: str, *, wait: bool) -> Iterator[bool]:
        """A lock between threads and processes that its holder's death releases."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            file = os.open(self._folder / f"{name}.lock", os.O_CREAT | os.O_RDWR, 0o666)
        except OSError as error:
            raise _DiskError(
                f"the shard cache {self._folder} cannot be used ({error}); data is streamed past it"
            ) from error
        try:
            yield places.lock(file, wait=wait) is not False
        finally:
            os.close(file)


class _DiskError(Exception):
    """The cache's own folder fails, not the store."""
