"""Compressed tars: unpacked once, as one plain tar, into a spool folder, and no further than their size allows."""

import bz2
import gzip
import hashlib
import lzma
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from pipeline import documents
from pipeline.errors import UserError
from pipeline.storage import objects

MAGICS = (b"\x1f\x8b", b"BZ", b"\xfd7")
_FREE_BYTES, _MAX_RATIO = 64 << 20, 100
"""Images hardly shrink, and tars of tiny ones by their empty blocks: what grows beyond both is no set of images."""
_BLOCK_BYTES = 1 << 20
_XZ_MEMORY_BYTES = 256 << 20


def unpacked(source: str, magic: bytes, spool: Path | None) -> str:
    """A plain copy of a compressed tar in the spool folder, made once.

    Raises:
        UserError: damaged, cut short, or unpacking to more than 100 times its size.
    """
    if spool is None:
        raise ValueError(f"a spool folder is needed to read the compressed tar {source}")
    size = objects.size_bytes(source)
    stamp = f"{source}\0{size}"
    if objects.is_local(source):
        stamp += f"\0{objects.local_path(source).stat().st_mtime_ns}"
    path = spool / f"{hashlib.sha256(stamp.encode('utf-8', 'surrogateescape')).hexdigest()[:32]}.tar"
    if not path.exists():
        spool.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        try:
            with objects.open_read(source) as packed, part.open("wb") as plain:
                _unpack(packed, magic, plain, source, max(_FREE_BYTES, _MAX_RATIO * size))
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    return str(path)


def _unpack(packed: BinaryIO, magic: bytes, plain: BinaryIO, source: str, limit: int) -> None:
    num_bytes = 0
    try:
        for block in _blocks(packed, magic):
            num_bytes += len(block)
            if num_bytes > limit:
                raise UserError(
                    f"the source {source} unpacks to more than {limit} bytes, {_MAX_RATIO} times its size, as no images do: "
                    "if you trust it, unpack it yourself and give the folder"
                )
            plain.write(block)
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        # Of the disk; bz2 says "Invalid data stream" and gzip that it is none by one without a number.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(
            f"the source {source} is damaged or cut short ({documents.excerpt(str(error), 200)}): fetch it again"
        ) from error


def _blocks(packed: BinaryIO, magic: bytes) -> Iterator[bytes]:
    if magic == b"\xfd7":
        yield from _xz_blocks(packed)
        return
    with gzip.open(packed, "rb") if magic == b"\x1f\x8b" else bz2.open(packed, "rb") as opened:
        while block := opened.read(_BLOCK_BYTES):
            yield block


def _xz_blocks(packed: BinaryIO) -> Iterator[bytes]:
    """As `lzma.open`, which has no limit of memory: a header may ask for 4 GB."""
    data = b""
    while data := data or packed.read(_BLOCK_BYTES):
        stream = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY_BYTES)
        while not stream.eof:
            if stream.needs_input:
                data = data or packed.read(_BLOCK_BYTES)
                if not data:
                    raise EOFError("the xz stream has no end")
            yield stream.decompress(data, _BLOCK_BYTES)
            data = b""
        data = stream.unused_data.lstrip(b"\0")  # streams are padded by zeros
