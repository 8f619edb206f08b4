"""Work on shards in several processes that end with their parent, however that ends."""

import multiprocessing
import multiprocessing.process
import multiprocessing.util
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import ForkServerContext
from typing import Any, Protocol, TypeVar

from pipeline import places
from pipeline.errors import UserError
from pipeline.storage import store_errors

T = TypeVar("T")
R = TypeVar("R")


class Each(Protocol):
    """`each`, or what does the same elsewhere."""

    def __call__(self, work: Callable[[T], R], items: Iterable[T], /) -> Iterator[R]: ...


def safe_context() -> ForkServerContext:
    """How worker processes are started: not by fork, because an object store's client must not be inherited.

    The sockets through which they talk lie below the temporary folder, or a shorter one where its path is too long for them.
    """
    config = multiprocessing.process.current_process()._config  # type: ignore[attr-defined]
    if config.get("tempdir") is None:  # where the library would keep one of its own, which a kill leaves behind
        path, _ = places.hold_folder("pool", places.socket_folder())
        config["tempdir"] = str(path)
        multiprocessing.util.Finalize(None, shutil.rmtree, args=(path, True), exitpriority=-100)
    return multiprocessing.get_context("forkserver")


def each(work: Callable[[T], R], items: Iterable[T], num_workers: int) -> Iterator[R]:
    """`work(item)` of every item, in the order in which they finish; in this process if `num_workers` is 1.

    `work` is sent to each process once. Items are taken as they are needed: at most two a process wait. The order of results
    is that of the items in this process only.
    """
    if num_workers < 1:
        raise UserError(f"workers {num_workers} must be at least 1")
    if num_workers == 1:
        yield from map(work, items)
        return
    source = iter(items)
    pool = ProcessPoolExecutor(num_workers, safe_context(), initializer=_start, initargs=(work,))
    try:
        pending: set[Future[Any]] = set()
        while True:
            while len(pending) < 2 * num_workers and (item := next(source, None)) is not None:
                pending.add(pool.submit(_run, item))
            if not pending:
                return
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed, most likely for its memory: run the same command again with fewer --workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_work: Callable[[Any], Any] | None = None


def _start(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A pool's workers wait for ever when their parent is killed: they hold both ends of its queue."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run(item: Any) -> Any:
    assert _work is not None
    return told(_work, item)


def told(work: Callable[[T], R], item: T) -> R:
    """`work(item)` in another process than the one that reports its error. `Silent` where a store did not answer."""
    try:
        return work(item)
    except Exception as error:
        if (said := store_errors.silence(error)) is not None:
            raise store_errors.Silent(said) from error
        raise
