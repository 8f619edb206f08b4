"""Walking through tars that may be cut, damaged or hostile. Members are read in place; nothing is ever extracted.

Python's reader ends quietly at a damaged header and at a cut between two members, and it reads extended headers of any
size into memory. Here each of these is an error with its place.
"""

import hashlib
import posixpath
import tarfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple, cast

from pipeline import documents

MAX_HEADER_BYTES = 1 << 20
"""Extended (pax, GNU) headers above this are an attack, not a file name."""
_MAX_MEMBER_BYTES = 1 << 50
_EXTENDED = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


class BadTar(ValueError):
    """This is no tar, or not a whole one; the message says what is wrong and after which member."""


class Member(NamedTuple):
    """A regular file in a tar."""

    name: str
    """Normalised, with `/`; what is no UTF-8 is kept as surrogates."""
    offset: int
    """Byte at which its content starts."""
    size: int


class _Careful(tarfile.TarInfo):
    @classmethod
    def frombuf(cls, buf: Any, encoding: str, errors: str) -> "_Careful":
        try:
            found = cast("_Careful", super().frombuf(buf, encoding, errors))
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:  # where Python's reader would end as if all were well
            raise tarfile.ReadError("no end mark" if not buf else str(error)) from error
        if found.type in _EXTENDED and not 0 <= found.size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"an extended header of {found.size} bytes")
        return found


class HashingStream:
    """A forward-only view of a file that hashes what passes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.sha256, self.num_bytes = file, hashlib.sha256(), 0

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self.sha256.update(data)
        self.num_bytes += len(data)
        return data


def walk(
    file: Any, *, stream: bool = False, other: Callable[[tarfile.TarInfo, str], None] | None = None
) -> Iterator[tuple[Member, tarfile.TarFile, tarfile.TarInfo]]:
    """The regular files of an uncompressed tar, in order, each with what is needed to read it while it is current.

    Members are skipped that are links, devices, folders or sparse files. At the end the rest must be empty blocks.

    Args:
        file: a binary file; seekable unless `stream`.
        stream: read forwards only, every byte once.
        other: called as other(info, normalised name) with each member that is skipped; it may raise BadTar.
    Raises:
        BadTar: not a tar, cut short, damaged between members, or with a member whose name leads out of it.
    """
    last, end = "its start", 0
    try:
        with tarfile.open(fileobj=file, mode="r|" if stream else "r:", tarinfo=_Careful) as tar:
            for info in tar:
                tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header: gigabytes for millions of members
                if not 0 <= info.size <= _MAX_MEMBER_BYTES or info.offset_data < end:
                    raise BadTar(f"damaged (a header after {last} points backwards or far beyond the file)")
                end = info.offset_data
                name = posixpath.normpath(info.name)
                if info.name.startswith("/") or name == ".." or name.startswith("../"):
                    raise BadTar(f"not to be trusted (a member outside itself: {documents.excerpt(info.name, 200)!r})")
                last = documents.excerpt(name, 200)
                if info.isreg() and not info.issparse():
                    yield Member(name, info.offset_data, info.size), tar, info
                elif other is not None:
                    other(info, name)
            _check_end(tar, last)
    except BadTar:
        raise
    # Python's reader lets numbers of any length and chains of headers of any depth end in errors of the language.
    except (tarfile.TarError, EOFError, zlib.error, ValueError, ArithmeticError, LookupError, RecursionError) as error:
        raise BadTar(f"no readable tar, or cut short after {last} ({documents.excerpt(str(error), 200)})") from error


def read_member(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    """Content of the current member of `walk`; BadTar if the tar ends inside it."""
    try:
        opened = tar.extractfile(info)
        data = opened.read() if opened else b""
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise BadTar(
            f"cut short inside {documents.excerpt(info.name, 200)} ({documents.excerpt(str(error), 200)})"
        ) from error
    if len(data) != info.size:
        raise BadTar(f"cut short inside {documents.excerpt(info.name, 200)}")
    return data


def printable(name: str) -> str:
    r"""A name from an archive or file system as valid UTF-8: bytes that are none appear as \xNN."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _check_end(tar: tarfile.TarFile, last: str) -> None:
    """Behind the end mark there must be nothing. Reading on to the end checks a gzip stream, too."""
    file: Any = tar.fileobj
    while block := file.read(1 << 20):
        if block.count(0) != len(block):
            raise BadTar(f"damaged (more data behind the end mark after {last})")
