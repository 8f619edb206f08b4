"""Clients of object stores, and how long one is asked again; the only module that imports fsspec.

A client is looked up at every call, because one inherited through fork must not be used (fsspec keys its instances by process).
"""

import os
import time
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar, cast

from pipeline.errors import UserError
from pipeline.secrets import refuse_secrets
from pipeline.storage import store_errors

T = TypeVar("T")

MAX_TRIES = 5
MAX_TRIES_PATIENT = 8
"""Of a store that is there and asks for patience, or does not show yet what we wrote: 25 s of waiting."""
FIRST_WAIT_S = 0.2  # doubled after each failure: at most 3 s of waiting in five tries
S3_ATTEMPTS = 2
"""Of botocore within one of our tries; its own 5 wait up to 15 s, and so a dead store took a minute an operation to be known.
With 2 it takes 8 s at most where connections are refused. AWS_MAX_ATTEMPTS, where it is set, holds instead."""
MAX_CONNECTIONS = 32  # of a process to one S3 server; four files at a time go up in four parts each
STALE_S = 20.0
"""For so long after our own write a store's "there is no such object" is not believed at once."""

_written: dict[str, float] = {}  # URL -> when this process wrote it (monotonic); only of the last STALE_S


def client(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL and the path in it; for this folder only."""
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
    asks for it than where there is none. UserError where the error is one that the user can mend."""
    text = os.fspath(url)
    for attempt in range(max(MAX_TRIES, MAX_TRIES_PATIENT)):
        try:
            return operation(*client(text))
        except Exception as error:
            if attempt + 1 >= num_tries(error, text):
                give_up(error, text)
        time.sleep(FIRST_WAIT_S * 2**attempt)
    raise AssertionError("unreachable")


def num_tries(error: Exception, url: str) -> int:
    """How often a request that ends with this error is made; 1 where the answer would be the same."""
    if isinstance(error, FileNotFoundError):
        return MAX_TRIES_PATIENT if is_just_written(url) else 1
    if not store_errors.is_transient(error):
        return 1
    return MAX_TRIES_PATIENT if store_errors.is_throttled(error) else MAX_TRIES


def give_up(error: Exception, url: str) -> NoReturn:
    """Raise UserError where the user can mend it, else the error."""
    if not isinstance(error, UserError) and (problem := store_errors.sentence(_with_body(error, url), url)):
        raise UserError(problem) from error
    raise error


def _with_body(error: Exception, url: str) -> Exception:
    """The same error with the store's word for it: an answer to a HEAD has none, so the same object is asked for with a GET."""
    if store_errors.answer_of(error).code not in ("400", "403", "501"):
        return error
    try:
        fs, path = client(url)
        bucket, key, _ = fs.split_path(path)
        if key:
            fs.call_s3("get_object", Bucket=bucket, Key=key, Range="bytes=0-0")
        else:
            fs.call_s3("list_objects_v2", Bucket=bucket, MaxKeys=1)
    except Exception as worded:
        if not isinstance(worded, FileNotFoundError) and not store_errors.answer_of(worded).code.isdigit():
            return worded
    return error


def note_written(url: str) -> None:
    """This process has written the object, and the store has said so."""
    now_s = time.monotonic()
    for old in [u for u, when_s in list(_written.items()) if now_s - when_s > STALE_S]:
        _written.pop(old, None)
    _written[url] = now_s


def note_removed(url: str) -> None:
    """This process deletes the object, or all under it."""
    for gone in [u for u in list(_written) if u == url or u.startswith(f"{url.rstrip('/')}/")]:
        _written.pop(gone, None)


def is_just_written(url: str) -> bool:
    """Whether this process wrote the object within `STALE_S` and did not delete it since."""
    return time.monotonic() - _written.get(url, -STALE_S) < STALE_S
