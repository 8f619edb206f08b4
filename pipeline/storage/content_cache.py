"""Local copies of objects whose content is known, verified before they are trusted."""

import os
import re
from pathlib import Path

from pipeline.storage import objects

_verified: set[tuple[str, str, int, int]] = set()  # (path, sha256, mtime_ns, size) of files hashed by this process


def fetch(url: str | os.PathLike[str], *, sha256: str, size_bytes: int, cache_dir: str | os.PathLike[str]) -> Path:
    """A local copy of an object whose content is known; a local URL is returned as it is.

    The cache is keyed by content (`<cache_dir>/<2 hex>/<sha256>`), so equal names of different datasets never meet.
    An entry is hashed once a process before it is trusted; a damaged one is fetched again. Raises OSError if what
    the store holds does not have this size and digest.
    """
    if not re.fullmatch("[0-9a-f]{64}", sha256):  # it becomes a path
        raise ValueError(f"the SHA-256 of {os.fspath(url)} is not 64 hex digits: {sha256[:70]!r}")
    if objects.is_local(url):
        return objects.local_path(url)
    path = Path(cache_dir) / sha256[:2] / sha256
    if verifies(path, sha256, size_bytes):
        return path
    for _ in range(2):  # a second download tells a damaged transfer from a damaged object
        objects.download(url, path)
        if verifies(path, sha256, size_bytes):
            return path
        path.unlink(missing_ok=True)
    raise OSError(f"{os.fspath(url)} does not hold the {size_bytes} bytes with sha256 {sha256[:12]}... that it should")


def verifies(path: Path, sha256: str, size_bytes: int) -> bool:
    """Whether a file has this size and digest. Hashed once a process, and again where its size or time has changed."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    mark = (str(path), sha256, found.st_mtime_ns, found.st_size)
    if mark in _verified:
        return True
    if found.st_size != size_bytes or objects.sha256_file(path) != sha256:
        return False
    _verified.add(mark)
    return True
