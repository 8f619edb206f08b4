"""The files of a plain tar, hard and symbolic links and sparse members among them."""

import io
import posixpath
import tarfile
from typing import Any, BinaryIO

from pipeline import documents
from pipeline.data.format.tars import BadTar, walk
from pipeline.data.sources.archives.links import add_links, target_of
from pipeline.data.sources.archives.locators import HIDDEN, SPECIAL, FoundFile, Listing, Range, Sparse, is_hidden
from pipeline.errors import UserError
from pipeline.storage import objects


def list_tar(source: str, offset: int = 0, size: int | None = None) -> Listing:
    """The files of a plain tar, or of one that lies in `source` (itself a plain tar) at `offset` with `size` bytes.

    Raises:
        UserError: no whole tar, or one with members outside itself.
    """
    where = source if size is None else f"a tar inside {source}"
    found = Listing()
    links: dict[str, str] = {}
    total = objects.size_bytes(source) if size is None else size

    def other(info: tarfile.TarInfo, name: str) -> None:
        if is_hidden(name):
            if not info.isdir():
                found.skip(name, HIDDEN)
        elif info.issym():
            links[name] = target_of(name, info.linkname)
        elif info.islnk():
            links[name] = posixpath.normpath(info.linkname)
        elif info.issparse():
            found.files.append(_sparse(info, name, source, offset, total))
        elif not info.isdir():
            found.skip(name, SPECIAL)

    try:
        with objects.open_read(source) as file:
            view: Any = file if size is None else io.BufferedReader(_Window(file, offset, size), 1 << 16)
            for member, _, _ in walk(view, other=other):
                if is_hidden(member.name):
                    found.skip(member.name, HIDDEN)
                else:
                    place = Range(source, offset + member.offset, member.size)
                    found.files.append(FoundFile(member.name, member.size, place))
    except BadTar as error:
        raise UserError(f"the source {where} is {error}: fetch it again") from error
    add_links(found, links, source)
    return found


def _sparse(info: tarfile.TarInfo, name: str, source: str, offset: int, total: int) -> FoundFile:
    stored: Any = info.sparse  # a list of (place, bytes), which the type stubs do not know
    parts = tuple((start, length) for start, length in stored or () if length)
    ends = [start + length for start, length in parts]
    starts = [start for start, _ in parts]
    in_order = all(end <= start for end, start in zip([0, *ends], [*starts, info.size], strict=True))
    if not in_order or info.offset_data + sum(length for _, length in parts) > total:
        raise BadTar(f"damaged (the map of the sparse member {documents.excerpt(name, 200)!r} contradicts its size)")
    return FoundFile(name, info.size, Sparse(source, offset + info.offset_data, info.size, parts))


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
