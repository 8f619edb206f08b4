"""The files inside a folder or a tar, local or in a store: listed, and read in place. Nothing is ever extracted."""

import contextlib
import os
import posixpath
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from pipeline import storage
from pipeline.errors import UserError


class FoundFile(NamedTuple):
    """A regular file inside a source."""

    name: str
    """Path inside the source, with `/`."""
    size: int
    """Bytes; -1 where the listing does not tell."""
    locator: Any
    """What `read_files` needs to read it."""


def list_files(source: str) -> list[FoundFile] | None:
    """All regular files of a folder or tar, in the order that is cheap to read; None if there is nothing at `source`.

    Raises UserError for a file that is no whole tar, and for a tar with members outside itself.
    """
    if _is_folder(source):
        return _list_folder(source)
    return _list_tar(source) if storage.exists(source) else None


def read_files(source: str, locators: Sequence[Any]) -> Iterator[bytes]:
    """The bytes of files that `list_files` found, in the order asked for."""
    if _is_folder(source):
        for url in locators:
            yield storage.read_bytes(url)
        return
    with _open_tar(source) as tar:
        stream = tar.fileobj  # the decompressed bytes; in archive order no gzip stream is rewound
        for offset, size in locators:
            stream.seek(offset)
            yield stream.read(size)


def _is_folder(source: str) -> bool:
    if storage.is_local(source):
        return storage.local_path(source).is_dir()
    return not source.lower().endswith((".tar", ".tgz", ".tar.gz"))  # a store has no folders to ask for


def _list_folder(source: str) -> list[FoundFile]:
    urls = storage.list_urls(source)
    if not storage.is_local(source):
        root = storage.join(source) + "/"
        return [FoundFile(url.removeprefix(root), -1, url) for url in urls]
    path = storage.local_path(source)
    names = [(os.path.relpath(url, path).replace(os.sep, "/"), url) for url in urls if os.path.isfile(url)]
    return [FoundFile(name, os.stat(url).st_size, url) for name, url in names]


def _list_tar(source: str) -> list[FoundFile]:
    files: list[FoundFile] = []
    with _open_tar(source) as tar:
        for member in tar:
            name = posixpath.normpath(member.name)
            if member.name.startswith("/") or name.startswith(".."):
                raise UserError(f"the source {source} has a member outside itself ({member.name!r}): do not trust it")
            if member.isreg():
                files.append(FoundFile(name, member.size, (member.offset_data, member.size)))
            tar.members = []  # tarfile keeps every header: gigabytes for millions of members
        # A tar cut between two members reads without an error; a whole one ends with empty blocks. Reading on to the
        # end of a gzip stream checks it.
        tar.fileobj.seek(tar.offset)
        num_after = 0
        while block := tar.fileobj.read(1 << 20):
            num_after += len(block)
        if files and num_after < tarfile.BLOCKSIZE:
            raise UserError(f"the source {source} is cut short (no end mark after {files[-1].name}): fetch it again")
    return files


@contextlib.contextmanager
def _open_tar(source: str) -> Iterator[Any]:
    try:
        with storage.open_read(source) as file, tarfile.open(fileobj=file, mode="r:*") as tar:
            yield tar
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk or the store, not the content
        raise UserError(f"the source {source} is no readable tar, or is cut short ({error}): fetch it again") from error
