"""A piece of memory onto a local disk, hashed on the way, past the page cache where the file system lets us.

A checkpoint is larger than what the page cache should hold alongside training, and is not read again: written through the
cache it pushes out the images that are read every epoch, and costs the processors one more copy of every byte. O_DIRECT
needs memory, lengths and offsets in multiples of `ALIGN_BYTES`; a file system without it (tmpfs, some network ones) gets the
same bytes in the ordinary way.
"""

import errno
import fcntl
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from pipeline.storage import objects
from pipeline.supervision.fault_points import reach

ALIGN_BYTES = 4096
PIECE_BYTES = 8 << 20
"""Both hashing and writing let other threads run for a piece's length: milliseconds, many to a step."""


def write(path: Path, memory: memoryview, size_bytes: int, check_cancelled: Callable[[], None]) -> str:
    """Write the first `size_bytes` of `memory` to `path` and return their hex SHA-256.

    `memory` is a multiple of ALIGN_BYTES long and starts at one. The file appears under its name when every byte of it
    is on disk. `check_cancelled` is called between pieces and may raise to give up. Raises OSError.
    """
    with objects.replacing(path) as file:
        digest = _write(file.fileno(), memory, size_bytes, check_cancelled)
        reach("file written")
    return digest


def _write(descriptor: int, memory: memoryview, size_bytes: int, check_cancelled: Callable[[], None]) -> str:
    reach("file opened")
    _set_direct(descriptor, True)
    digest = hashlib.sha256()
    end = -(-size_bytes // ALIGN_BYTES) * ALIGN_BYTES  # the last block is written whole, and cut below
    for start in range(0, end, PIECE_BYTES):
        check_cancelled()
        piece = memory[start : min(start + PIECE_BYTES, end)]
        _write_all(descriptor, piece)
        digest.update(memory[start : min(start + PIECE_BYTES, size_bytes)])
        reach("file piece")
    os.ftruncate(descriptor, size_bytes)
    return digest.hexdigest()


def _write_all(descriptor: int, piece: memoryview) -> None:
    while piece:
        try:
            done = os.write(descriptor, piece)
        except OSError as error:
            if error.errno == errno.EINVAL and _set_direct(descriptor, False):
                continue
            raise
        piece = piece[done:]
        if done % ALIGN_BYTES:  # cut short (a nearly full disk): the rest no longer starts where O_DIRECT wants it
            _set_direct(descriptor, False)


def _set_direct(descriptor: int, is_wanted: bool) -> bool:
    """Whether the flag was changed."""
    flag = getattr(os, "O_DIRECT", 0)
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    if bool(flags & flag) == is_wanted or not flag:
        return False
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags ^ flag)
    except OSError:
        return False
    return True
