"""Local paths and object stores behind one small set of functions; the only module that imports fsspec.

A URL is a plain path, `file://...` or anything that fsspec opens (`s3://`, `gs://`, `memory://`). Three rules hold
everywhere: an object appears whole or not at all, listings are never answered from a cache, and a client is looked
up at every call, because one inherited through fork must not be used (fsspec keys its instances by process).
`pipeline.storage.range_reads` reads parts of one version of an object with the same clients.
"""

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from pipeline.errors import UserError
from pipeline.secrets import refuse_secrets
from pipeline.storage import multipart_upload

T = TypeVar("T")

MAX_TRIES = 5
MAX_TRIES_THROTTLED = 8
"""Of a store that is there and asks for patience: 25 s of waiting."""
FIRST_WAIT_S = 0.2  # doubled after each failure: at most 3 s of waiting in five tries
S3_ATTEMPTS = 2
"""Of botocore within one of our tries; its own 5 wait up to 15 s, and so a dead store took a minute an operation to be known.
With 2 it takes 8 s at most where connections are refused. AWS_MAX_ATTEMPTS, where it is set, holds instead."""
COPY_BYTES = 4 << 20
MAX_CONNECTIONS = 32  # of a process to one S3 server; four files at a time go up in four parts each
TEMP_PREFIX = ".partial-"

# Answers, not accidents: asking again would not change them.
_PERMANENT = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError)
# Transport errors of aiobotocore and aiohttp that do not derive from OSError.
_TRANSIENT_NAMES = frozenset(
    {
        "EndpointConnectionError",
        "ConnectTimeoutError",
        "ReadTimeoutError",
        "ConnectionClosedError",
        "ResponseStreamingError",
        "ClientPayloadError",
        "ServerDisconnectedError",
        "HTTPClientError",
        "IncompleteReadError",
    }
)
_verified: set[tuple[str, int, int]] = set()  # (path, mtime_ns, size) of cache entries hashed by this process


def is_local(url: str | os.PathLike[str]) -> bool:
    """True for a plain path or a `file://` URL."""
    text = os.fspath(url)
    return "://" not in text or text.startswith("file://")


def local_path(url: str | os.PathLike[str]) -> Path:
    """The path of a local URL, with `~` expanded; ValueError if the URL is remote."""
    text = os.fspath(url)
    if not is_local(text):
        raise ValueError(f"{text} is not on this machine: a local path or file:// URL is needed here")
    return Path(text.removeprefix("file://")).expanduser()


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
    return with_retries(url, lambda fs, path: bool(fs.exists(path)))


def is_file(url: str | os.PathLike[str]) -> bool:
    """Whether an object, and no folder, is there now."""
    if is_local(url):
        return local_path(url).is_file()
    return with_retries(url, lambda fs, path: bool(fs.isfile(path)))


def size_bytes(url: str | os.PathLike[str]) -> int:
    """Size of the object; FileNotFoundError if there is none."""
    if is_local(url):
        return local_path(url).stat().st_size
    return with_retries(url, lambda fs, path: int(fs.info(path)["size"]))


def read_bytes(url: str | os.PathLike[str], max_bytes: int | None = None) -> bytes:
    """The whole object, or its first `max_bytes`; FileNotFoundError if there is none.

    With `max_bytes`, which is for objects that somebody else may have written, only regular files are read.
    """
    if is_local(url):
        path = local_path(url)
        if max_bytes is None:
            return path.read_bytes()
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise UserError(f"{path} is no regular file; give the path of one")
            return file.read(min(max_bytes, status.st_size))  # read(n) takes n bytes of memory, whatever the file has

    def start(fs: Any, path: str) -> bytes:
        try:
            return cast(bytes, fs.cat_file(path, start=0, end=max_bytes))[:max_bytes]
        except FileNotFoundError:
            raise
        except Exception:
            if not fs.info(path)["size"]:  # S3 answers every range of an empty object with an error
                return b""
            raise

    return with_retries(url, (lambda fs, path: cast(bytes, fs.cat_file(path))) if max_bytes is None else start)


def read_range(url: str | os.PathLike[str], offset: int, length: int) -> bytes:
    """Exactly `length` bytes from `offset`; OSError if the object ends before."""

    def ranged(fs: Any, path: str) -> bytes:
        # cat_file of some stores answers an empty range with the whole object.
        data = cast(bytes, fs.cat_file(path, start=offset, end=offset + length)) if length else b""
        return _whole(data, url, offset, length)

    if not is_local(url):
        return with_retries(url, ranged)
    with local_path(url).open("rb") as file:
        file.seek(offset)
        return _whole(file.read(length), url, offset, length)


@contextlib.contextmanager
def open_read(url: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """The object as a seekable binary file."""
    opened = local_path(url).open("rb") if is_local(url) else with_retries(url, lambda fs, path: fs.open(path, "rb"))
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
        _check_size(fs, path, url, len(data))

    with_retries(url, write)


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
        _check_size(fs, path, url, size)

    with_retries(url, put)


def takes_memory(url: str) -> bool:
    """Whether `put_memory` can write there; other stores are given files."""
    return not is_local(url) and multipart_upload.takes_parts(client(url)[0])


def put_memory(url: str, memory: memoryview, go_on: Callable[[], None]) -> None:
    """Write the object from memory, whole or not at all; `go_on` is called between parts and may raise to give up."""

    def put(fs: Any, path: str) -> None:
        multipart_upload.put(
            fs, path, memory.nbytes, lambda start, length: bytes(memory[start : start + length]), go_on
        )
        _check_size(fs, path, url, memory.nbytes)

    with_retries(url, put)


def download(url: str | os.PathLike[str], local: str | os.PathLike[str]) -> None:
    """Copy an object to a local path, which appears whole or not at all. Does not verify: see `fetch`."""
    target = Path(local)
    if is_local(url):
        put_file(local_path(url), target)
        return
    with replacing(target) as file:
        # get_file opens the path again; the name is only taken over once all of it is there.
        with_retries(url, lambda fs, path: fs.get_file(path, file.name))


def fetch(url: str | os.PathLike[str], *, sha256: str, size_bytes: int, cache_dir: str | os.PathLike[str]) -> Path:
    """A local copy of an object whose content is known; a local URL is returned as it is.

    The cache is keyed by content (`<cache_dir>/<2 hex>/<sha256>`), so equal names of different datasets never meet.
    An entry is hashed once a process before it is trusted; a damaged one is fetched again. Raises OSError if what
    the store holds does not have this size and digest.
    """
    if not re.fullmatch("[0-9a-f]{64}", sha256):  # it becomes a path
        raise ValueError(f"the SHA-256 of {os.fspath(url)} is not 64 hex digits: {sha256[:70]!r}")
    if is_local(url):
        return local_path(url)
    path = Path(cache_dir) / sha256[:2] / sha256
    if _entry_verifies(path, sha256, size_bytes):
        return path
    for _ in range(2):  # a second download tells a damaged transfer from a damaged object
        download(url, path)
        if _entry_verifies(path, sha256, size_bytes):
            return path
        path.unlink(missing_ok=True)
    raise OSError(f"{os.fspath(url)} does not hold the {size_bytes} bytes with sha256 {sha256[:12]}... that it should")


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

    return sorted(url for url in with_retries(prefix, find) if url.endswith(suffix))


def remove(url: str | os.PathLike[str]) -> None:
    """Remove one object; nothing happens if it is not there."""
    if is_local(url):
        local_path(url).unlink(missing_ok=True)
        return
    with contextlib.suppress(FileNotFoundError):
        with_retries(url, lambda fs, path: fs.rm_file(path))


def remove_tree(url: str | os.PathLike[str]) -> None:
    """Remove a folder and all that is in it; nothing happens if it is not there."""
    if is_local(url):
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(local_path(url))
        return
    with contextlib.suppress(FileNotFoundError):
        with_retries(url, lambda fs, path: fs.rm(path, recursive=True))


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of a local file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def client(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL and the path in it; for `pipeline.storage.range_reads` only."""
    import fsspec

    refuse_secrets(url, "an address")
    options: dict[str, Any] = {"use_listings_cache": False}
    if url.startswith(("s3://", "s3a://")):
        # The defaults (5 s to connect, 15 s to read) are short for a busy store and a 64 MiB shard.
        options["config_kwargs"] = {"connect_timeout": 10, "read_timeout": 60, "max_pool_connections": MAX_CONNECTIONS}
        if "AWS_MAX_ATTEMPTS" not in os.environ:
            options["config_kwargs"]["retries"] = {"total_max_attempts": S3_ATTEMPTS}
    try:
        return cast(tuple[Any, str], fsspec.core.url_to_fs(url, **options))
    except (ValueError, ImportError) as error:
        raise UserError(f"cannot open {url}: {error}; use a path, s3://bucket/... or another fsspec URL") from error


def with_retries(url: str | os.PathLike[str], operation: Callable[[Any, str], T]) -> T:
    """`operation(file system, path)`, tried again with growing waits while the error looks transient, longer where the store
    asks for it than where there is none."""
    text = os.fspath(url)
    for attempt in range(max(MAX_TRIES, MAX_TRIES_THROTTLED)):
        try:
            return operation(*client(text))
        except Exception as error:
            refuse_the_users_mistake(error, text)
            tries = MAX_TRIES_THROTTLED if is_throttled(error) else MAX_TRIES
            if attempt + 1 >= tries or not is_transient(error):
                raise
        time.sleep(FIRST_WAIT_S * 2**attempt)
    raise AssertionError("unreachable")


def is_transient(error: Exception) -> bool:
    """Whether asking a store again may help."""
    transient = isinstance(error, OSError) and not isinstance(error, _PERMANENT)
    return transient or type(error).__name__ in _TRANSIENT_NAMES


def is_throttled(error: BaseException) -> bool:
    """Whether an S3 store answered that it has too much to do; s3fs keeps its answer in the cause."""
    for each in (error, error.__cause__):
        answer = getattr(each, "response", None)
        if isinstance(answer, dict):
            code = str(answer.get("Error", {}).get("Code", ""))
            status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return status in (429, 503) or "SlowDown" in code or "Throttl" in code
    return False


def refuse_the_users_mistake(error: Exception, url: str) -> None:
    """UserError where a store's error means that credentials or bucket are wrong; nothing otherwise."""
    if type(error).__name__ == "NoCredentialsError":
        raise UserError(f"no credentials for {url}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from error
    if isinstance(error, PermissionError):
        raise UserError(
            f"the store refuses {url} ({' '.join(str(error).split())[:200]}): check the credentials of this machine "
            "(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY or their file) and what they may do there"
        ) from error
    if isinstance(error, FileNotFoundError) and "bucket does not exist" in str(error):
        raise UserError(f"the bucket of {url} does not exist: create it, or mend its name") from error


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


def _check_size(fs: Any, path: str, url: str | os.PathLike[str], expected: int) -> None:
    fs.invalidate_cache()
    stored = int(fs.info(path)["size"])
    if stored != expected:
        raise OSError(f"{os.fspath(url)}: the store holds {stored} bytes of the {expected} written")


def _whole(data: bytes, url: str | os.PathLike[str], offset: int, length: int) -> bytes:
    if len(data) != length:
        raise OSError(f"{os.fspath(url)}: {len(data)} bytes at offset {offset} where {length} should be")
    return data


def _entry_verifies(path: Path, sha256: str, size: int) -> bool:
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    mark = (str(path), found.st_mtime_ns, found.st_size)
    if mark in _verified:
        return True
    if found.st_size != size or sha256_file(path) != sha256:
        return False
    _verified.add(mark)
    return True
