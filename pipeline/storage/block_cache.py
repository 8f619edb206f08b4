"""Blocks of shards from an object store, kept on the local disk and shared by all processes of the machine.

    <folder>/<2 hex>/<SHA-256 of the shard>/<first byte>-<length>      the bytes

Keyed by the content of the shard, so equal file names of two datasets never meet. Who reads proves each sample by its own
CRC-32 and says where an entry is damaged (`forget`). An entry is fetched by one process while the others wait for it. A disk
that is full, or not writable, ends the caching and not the run. The total stays below a bound: the entries that were not used
for the longest time go first.
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
Fetched = bytes | memoryview
Read = Callable[[int, int], bytes]
"""(start, stop), offsets in the shard -> its bytes; fewer where they end before."""
_STRIPES = 256
_WRITING_NS = 3600 * 10**9
"""An unfinished entry that is older was left by a process that is gone."""


class BlockCache:
    """Entries under `folder`, at most `bound_bytes` in all (and a twentieth more while an eviction is due)."""

    def __init__(self, folder: str, bound_bytes: int) -> None:
        self._folder, self._bound_bytes = Path(folder), bound_bytes
        self._written_bytes = bound_bytes  # since this process last looked: look at the first write
        self.failure: str | None = None
        """Why nothing is kept any more; None while all is well."""

    @contextlib.contextmanager
    def block(self, sha256: str, offset: int, length: int, fetch: Callable[[], Fetched]) -> Iterator[Read]:
        """What reads parts of the bytes offset ... offset + length of a shard: the entry where there is one, else what `fetch`
        returns, which may be a buffer that is used again after the block."""
        path = self._folder / sha256[:2] / sha256 / f"{offset}-{length}"
        data: Fetched = b""
        file = self._open(path, length)
        if file is None:
            try:
                stripe = zlib.crc32(str(path).encode()) % _STRIPES
                with self._lock(str(stripe), wait=True):
                    file = self._open(path, length)  # another process may have brought it meanwhile
                    if file is None:
                        data = self._fetch_and_keep(path, length, fetch)
            except _DiskError as failure:
                self.failure = self.failure or str(failure)
                data = data or fetch()
        try:
            if file is None:
                yield lambda start, stop: bytes(data[start - offset : stop - offset])
            else:
                descriptor = file
                yield lambda start, stop: os.pread(descriptor, stop - start, start - offset)
        finally:
            if file is not None:
                os.close(file)

    def forget(self, sha256: str, offset: int, length: int) -> None:
        """The entry is damaged: it is fetched again when it is asked for."""
        with contextlib.suppress(OSError):
            (self._folder / sha256[:2] / sha256 / f"{offset}-{length}").unlink()

    def missing_bytes(self, needed_bytes: int) -> int:
        """Room that the disk lacks for so many bytes of entries, those counted that are there; 0 where it has it."""
        lacking = needed_bytes + KEEP_FREE_BYTES - places.free_bytes(self._folder)
        return max(0, lacking - sum(size for _, size, _, _ in self._entries())) if lacking > 0 else 0

    def _fetch_and_keep(self, path: Path, length: int, fetch: Callable[[], Fetched]) -> Fetched:
        data = fetch()
        if self.failure is None and len(data) == length:  # what is short is short at its source: not worth keeping
            try:
                self._write(path, data)
            except OSError as error:
                self.failure = f"the shard cache {self._folder} takes no more ({error}); data is streamed past it"
        return data

    def _open(self, path: Path, length: int) -> int | None:
        """A descriptor of an entry, or None."""
        try:
            file = os.open(path, os.O_RDONLY)
        except OSError:
            return None
        stat = os.fstat(file)
        if stat.st_size != length:  # cut, or of an older form
            os.close(file)
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        with contextlib.suppress(OSError):
            os.utime(path, ns=(time.time_ns(), stat.st_mtime_ns))  # its last use
        return file

    def _write(self, path: Path, data: Fetched) -> None:
        if places.free_bytes(self._folder) < KEEP_FREE_BYTES + len(data):
            raise OSError(f"less than {KEEP_FREE_BYTES >> 20} MiB of the disk are free")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / f".{os.getpid()}-{secrets.token_hex(4)}"
        try:
            temporary.write_bytes(data)
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
            entries = list(self._entries())
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

    def _entries(self) -> Iterator[tuple[int, int, str, str]]:
        """(last use in ns, bytes, folder, name) of each."""
        for folder, _, names in os.walk(self._folder):
            for name in names:
                with contextlib.suppress(OSError):
                    stat = os.stat(os.path.join(folder, name))
                    yield max(stat.st_atime_ns, stat.st_mtime_ns), stat.st_size, folder, name

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
