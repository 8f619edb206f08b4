"""The files inside a folder, a tar or a zip, local or in a store: listed, and read in place in any order.

Nothing is ever extracted by a member's name. A compressed tar cannot be read from the middle: it is unpacked once, as one
plain tar, into the spool folder.
"""

import bz2
import gzip
import hashlib
import io
import lzma
import os
import posixpath
import shutil
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from pipeline.data.format.tars import BadTar, walk
from pipeline.errors import UserError
from pipeline.storage import objects

ARCHIVES = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".zip")
_PACKED: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}


class FoundFile(NamedTuple):
    """A regular file inside a source."""

    name: str
    """Path inside the source, with `/`."""
    size: int
    """Bytes; -1 where the listing does not tell."""
    locator: tuple[Any, ...]
    """What `pipeline.data.sources.file_reader.FileReader` needs to read it: (url,), (url, offset, size) or
    (url, header offset, compressed size, size, method, CRC)."""


def list_files(source: str, spool: Path | None = None) -> list[FoundFile] | None:
    """All regular files of a folder, tar or zip, in the order of the archive or of names; None: nothing is at `source`.

    Args:
        spool: local folder for the plain form of a compressed tar; it is left there, whole, for the next time.
    Raises:
        UserError: a file that is no whole tar or zip, or an archive with members outside itself.
    """
    if is_folder(source):
        return _list_folder(source)
    if not objects.exists(source):
        return None
    with objects.open_read(source) as file:
        magic = file.read(4)
    if magic[:2] in _PACKED:
        source = _unpacked(source, magic[:2], spool)
    return _list_zip(source) if magic == b"PK\x03\x04" else list_tar(source)


def is_folder(source: str) -> bool:
    """Whether `source` is a folder; in a store, which has none, whether it has no ending of an archive or table."""
    if objects.is_local(source):
        return objects.local_path(source).is_dir()
    return not source.lower().endswith((*ARCHIVES, ".csv", ".tsv", ".jsonl", ".ndjson", ".parquet"))


def empty_folders(source: str) -> list[str]:
    """Paths of the folders of a local folder in which no file lies at any depth, relative, sorted."""
    if not objects.is_local(source) or not is_folder(source):
        return []
    root = objects.local_path(source)
    filled: set[str] = set()
    found: list[str] = []
    for folder, folders, names in os.walk(root, topdown=False):
        inside = {os.path.join(folder, name) for name in folders}
        if names or inside & filled:
            filled.add(folder)
        else:
            found.append(os.path.relpath(folder, root).replace(os.sep, "/"))
    return sorted(found)


def list_tar(source: str, offset: int = 0, size: int | None = None) -> list[FoundFile]:
    """The files of a plain tar, or of one that lies in `source` (itself a plain tar) at `offset` with `size` bytes."""
    where = source if size is None else f"a tar inside {source}"
    try:
        with objects.open_read(source) as file:
            view: Any = file if size is None else io.BufferedReader(_Window(file, offset, size), 1 << 16)
            return [
                FoundFile(member.name, member.size, (source, offset + member.offset, member.size))
                for member, _, _ in walk(view)
            ]
    except BadTar as error:
        raise UserError(f"the source {where} is {error}: fetch it again") from error


def _list_folder(source: str) -> list[FoundFile]:
    urls = objects.list_urls(source)
    if not objects.is_local(source):
        root = objects.join(source) + "/"
        return [FoundFile(url.removeprefix(root), -1, (url,)) for url in urls]
    path = objects.local_path(source)
    names = [(os.path.relpath(url, path).replace(os.sep, "/"), url) for url in urls if os.path.isfile(url)]
    return [FoundFile(name, os.stat(url).st_size, (url,)) for name, url in names]


def _list_zip(source: str) -> list[FoundFile]:
    files: list[FoundFile] = []
    try:
        with objects.open_read(source) as file, zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                name = posixpath.normpath(info.filename.replace("\\", "/"))
                if name.startswith(("/", "../")) or name == ".." or info.filename[1:2] == ":":
                    raise UserError(
                        f"the source {source} has a member outside itself ({info.filename!r}): do not trust it"
                    )
                if info.is_dir() or (info.external_attr >> 16) & 0o170000 not in (0, 0o100000):
                    continue  # folders, links, devices
                if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise UserError(
                        f"the source {source} has an encrypted or unusually packed member ({name}): pack it plainly"
                    )
                place = (info.header_offset, info.compress_size, info.file_size, info.compress_type, info.CRC)
                files.append(FoundFile(name, info.file_size, (source, *place)))
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"the source {source} is no readable zip, or is cut short ({error}): fetch it again") from error
    return files


def _unpacked(source: str, magic: bytes, spool: Path | None) -> str:
    """A plain copy of a compressed tar in the spool folder, made once."""
    if spool is None:
        raise ValueError(f"a spool folder is needed to read the compressed tar {source}")
    stamp = f"{source}\0{objects.size_bytes(source)}"
    if objects.is_local(source):
        stamp += f"\0{objects.local_path(source).stat().st_mtime_ns}"
    path = spool / f"{hashlib.sha256(stamp.encode('utf-8', 'surrogateescape')).hexdigest()[:32]}.tar"
    if not path.exists():
        spool.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        try:
            with objects.open_read(source) as packed, part.open("wb") as plain:
                _unpack(_PACKED[magic](packed, "rb"), plain, source)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    return str(path)


def _unpack(packed: Any, plain: BinaryIO, source: str) -> None:
    try:
        shutil.copyfileobj(packed, plain, 1 << 20)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise UserError(f"the source {source} is damaged or cut short ({error}): fetch it again") from error


class _Window(io.RawIOBase):
    """A part of a seekable file, as a file."""

    def __init__(self, file: BinaryIO, offset: int, size: int) -> None:
        self._file, self._offset, self._size, self._at = file, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = (0, self._at, self._size)[whence] + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._offset + self._at)
        data = self._file.read(min(len(buffer), max(0, self._size - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
