"""Local paths and object stores behind one small set of functions.

A URL is a plain path, `file://...` or anything that fsspec opens (`s3://`, `gs://`, `memory://`). Three rules hold
everywhere: an object appears whole or not at all, listings are never answered from a cache, and what this process has just
written is there, even where a store shows it late. `pipeline.storage.clients` asks a store again,
`pipeline.storage.range_reads` reads parts of one version of an object with the same clients.
"""

import contextlib
import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from pipeline.errors import UserError
from pipeline.storage import clients, delete_objects, multipart_upload

COPY_BYTES = 4 << 20
TEMP_PREFIX = ".partial-"


def is_local(url: str | os.PathLike[str]) -> bool:
    """True for a plain path or a `file://` URL."""
    text = os.fspath(url)
    return "://" not in text or text.startswith("file://")


def local_path(url: str | os.PathLike[str]) -> Path:
    """The path of a local URL, with `~` expanded; ValueError if the URL is remote, UserError if nobody has that home."""
    text = os.fspath(url)
    if not is_local(text):
        raise ValueError(f"{text} is not on this machine: a local path or file:// URL is needed here")
    try:
        return Path(text.removeprefix("file://")).expanduser()
    except RuntimeError as error:
        name = text.removeprefix("file://").split("/")[0]
        raise UserError(f"{text}: this machine knows no home folder for {name}; write the whole path") from error


def join(url: str | os.PathLike[str], *parts: str) -> str:
    """`url` with `parts` appended, one slash between each; a local URL stays local."""
    base = os.fspath(url)
    stripped = base.rstrip("/") if base.strip("/") else "/"
    if stripped.endswith(":"):  # "memory://" must keep its slashes
        stripped = base[:-1]
    tail = "/".join(part.strip("/") for part in parts if part.strip("/"))
    return f"{stripped.rstrip('/') if tail and stripped == '/' else stripped}/{tail}" if tail else stripped


def exists(url: str | os.PathLike[str]) -> bool:
    """Whether an object (or, where the store has them, a folder) is there now."""
    if is_local(url):
        return local_path(url).exists()
    return _is_there(url, "exists")


def is_file(url: str | os.PathLike[str]) -> bool:
    """Whether an object, and no folder, is there now."""
    if is_local(url):
        return local_path(url).is_file()
    return _is_there(url, "isfile")


def size_bytes(url: str | os.PathLike[str]) -> int:
    """Size of the object; FileNotFoundError if there is none."""
    if is_local(url):
        return local_path(url).stat().st_size
    return clients.with_retries(url, lambda fs, path: int(fs.info(path)["size"]))


def read_bytes(url: str | os.PathLike[str], max_bytes: int | None = None) -> bytes:
    """The whole object, or its first `max_bytes`, for small ones that somebody else may have written. FileNotFoundError if there
    is none, UserError for a pipe, a device or a folder."""
    if is_local(url):
        path = local_path(url)
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        status = os.fstat(number)
        if not stat.S_ISREG(status.st_mode):
            os.close(number)
            raise UserError(f"{path} is no regular file; give the path of one")
        with open(number, "rb") as file:
            # read(n) takes n bytes of memory, whatever the file has.
            return file.read() if max_bytes is None else file.read(min(max_bytes, status.st_size))

    def start(fs: Any, path: str) -> bytes:
        try:
            return cast(bytes, fs.cat_file(path, start=0, end=max_bytes))[:max_bytes]
        except FileNotFoundError:
            raise
        except Exception:
            if not fs.info(path)["size"]:  # S3 answers every range of an empty object with an error
                return b""
            raise

    return clients.with_retries(url, (lambda fs, path: cast(bytes, fs.cat_file(path))) if max_bytes is None else start)


def read_range(url: str | os.PathLike[str], offset: int, length: int) -> bytes:
    """Exactly `length` bytes from `offset`; OSError if the object ends before."""

    def ranged(fs: Any, path: str) -> bytes:
        # cat_file of some stores answers an empty range with the whole object.
        data = cast(bytes, fs.cat_file(path, start=offset, end=offset + length)) if length else b""
        return _whole(data, url, offset, length)

    if not is_local(url):
        return clients.with_retries(url, ranged)
    with local_path(url).open("rb") as file:
        file.seek(offset)
        there = os.fstat(file.fileno()).st_size - offset  # read(n) takes n bytes of memory, whatever the file has
        return _whole(file.read(max(0, min(length, there))), url, offset, length)


@contextlib.contextmanager
def open_read(url: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """The object as a seekable binary file."""
    opened = (
        local_path(url).open("rb") if is_local(url) else clients.with_retries(url, lambda fs, path: fs.open(path, "rb"))
    )
    with opened as file:
        yield cast(BinaryIO, file)


def write_bytes(url: str | os.PathLike[str], data: bytes) -> None:
    """Write the object so that readers see the old one, the new one, or nothing; never a part."""
    if is_local(url):
        with replacing(local_path(url)) as file:
            file.write(data)
        return

    def write(fs: Any, path: str) -> None:
        # One request for the whole object; `with fs.open(...)` would publish a part when interrupted.
        fs.pipe_file(path, data)

    clients.with_retries(url, write)
    _check_written(url, len(data))


def put_file(local: str | os.PathLike[str], url: str | os.PathLike[str]) -> None:
    """Copy a finished local file to `url`, whole or not at all; the local file stays."""
    if is_local(url):
        with replacing(local_path(url)) as target, open(local, "rb") as source:
            shutil.copyfileobj(source, target, COPY_BYTES)
        return
    size = os.stat(local).st_size

    def put(fs: Any, path: str) -> None:
        if multipart_upload.takes_parts(fs):
            with open(local, "rb") as file:
                multipart_upload.put(fs, path, size, lambda offset, length: os.pread(file.fileno(), length, offset))
        else:
            fs.put_file(os.fspath(local), path)

    clients.with_retries(url, put)
    _check_written(url, size)


def takes_memory(url: str) -> bool:
    """Whether `put_memory` can write there; other stores are given files."""
    return not is_local(url) and multipart_upload.takes_parts(clients.client(url)[0])


def put_memory(url: str, memory: memoryview, check_cancelled: Callable[[], None]) -> None:
    """Write the object from memory, whole or not at all; `check_cancelled` is called between parts and may raise to give up."""

    def put(fs: Any, path: str) -> None:
        multipart_upload.put(
            fs, path, memory.nbytes, lambda start, length: bytes(memory[start : start + length]), check_cancelled
        )

    clients.with_retries(url, put)
    _check_written(url, memory.nbytes)


def download(url: str | os.PathLike[str], local: str | os.PathLike[str]) -> None:
    """Copy an object to a local path, which appears whole or not at all. Does not verify: see `content_cache`."""
    target = Path(local)
    if is_local(url):
        put_file(local_path(url), target)
        return
    with replacing(target) as file:
        # get_file opens the path again; the name is only taken over once all of it is there.
        clients.with_retries(url, lambda fs, path: fs.get_file(path, file.name))


def list_urls(prefix: str | os.PathLike[str], suffix: str = "") -> list[str]:
    """Every object under the folder `prefix`, at any depth, whose name ends with `suffix`, sorted; [] if none.

    Partial local writes and a cached listing of the store are never part of the answer.
    """
    if is_local(prefix):
        root = local_path(prefix)
        found = [
            os.path.join(folder, name)
            for folder, _, names in os.walk(root)
            for name in names
            if name.endswith(suffix) and not name.startswith(TEMP_PREFIX)
        ]
        return sorted(found)

    def find(fs: Any, path: str) -> list[str]:
        fs.invalidate_cache()
        root = path.rstrip("/") + "/"
        # Built from the caller's spelling, because fsspec's own way back differs (memory:///a for memory://a).
        return [join(prefix, name.removeprefix(root)) for name in fs.find(path) if name.startswith(root)]

    return sorted(url for url in clients.with_retries(prefix, find) if url.endswith(suffix))


def remove(url: str | os.PathLike[str]) -> None:
    """Remove one object; nothing happens if it is not there."""
    if is_local(url):
        local_path(url).unlink(missing_ok=True)
        return
    clients.note_removed(os.fspath(url))
    with contextlib.suppress(FileNotFoundError):
        clients.with_retries(url, lambda fs, path: fs.rm_file(path))


def remove_tree(url: str | os.PathLike[str]) -> None:
    """Remove a folder and all that is in it; nothing happens if it is not there. UserError that counts what a store keeps."""
    if is_local(url):
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(local_path(url))
        return
    clients.note_removed(os.fspath(url))
    if takes_memory(os.fspath(url)):
        delete_objects.delete_tree(os.fspath(url))
        return
    with contextlib.suppress(FileNotFoundError):
        clients.with_retries(url, lambda fs, path: fs.rm(path, recursive=True))


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of a local file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A temporary file in the folder of `path` that becomes `path` if the block ends well, else is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{TEMP_PREFIX}{os.getpid()}-{secrets.token_hex(6)}"
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself must survive a power cut
    finally:
        os.close(folder)


def _is_there(url: str | os.PathLike[str], question: str) -> bool:
    def ask(fs: Any, path: str) -> bool:
        if not getattr(fs, question)(path):
            raise FileNotFoundError(os.fspath(url))  # asked again where it is our own write that does not show yet
        return True

    try:
        return clients.with_retries(url, ask)
    except FileNotFoundError:
        return False


def _check_written(url: str | os.PathLike[str], expected: int) -> None:
    """The store holds what it has just taken; one that shows it late, or the object before, is asked again."""

    def check(fs: Any, path: str) -> None:
        fs.invalidate_cache()
        stored = int(fs.info(path)["size"])
        if stored != expected:
            raise OSError(f"{os.fspath(url)}: the store holds {stored} bytes of the {expected} written")

    clients.note_written(os.fspath(url))
    try:
        clients.with_retries(url, check)
    except FileNotFoundError as error:
        raise UserError(
            f"the store took {os.fspath(url)} and does not show it {clients.STALE_S:.0f} s later; use a store whose reads show "
            "what was written before"
        ) from error


def _whole(data: bytes, url: str | os.PathLike[str], offset: int, length: int) -> bytes:
    if len(data) != length:
        raise OSError(f"{os.fspath(url)}: {len(data)} bytes at offset {offset} where {length} should be")
    return data
