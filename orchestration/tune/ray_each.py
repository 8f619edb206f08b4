"""Work on pieces of a dataset as tasks of a Ray cluster, in place of processes of this machine."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import ray

from orchestration.tune.ray_cluster import TrialResources, running_ray
from pipeline.data.process_pool import Each, told
from pipeline.errors import UserError
from pipeline.storage.store_errors import Silent

T = TypeVar("T")
R = TypeVar("R")
WAITING = 2
"""Tasks for each core of the cluster that are handed over: what is done survives the driver, what waits is forgotten with it."""
MAX_RETRIES = 10
"""Of a task whose process or node was lost."""


@contextlib.contextmanager
def ray_each(address: str) -> Iterator[Each]:
    """What runs work on the cluster at `address` inside the block. UserError where none answers."""
    with running_ray(address, TrialResources(num_concurrent=0, num_processes=1, gpus=0.0)):
        yield _each


def _each(work: Callable[[T], R], items: Iterable[T], /) -> Iterator[R]:
    task: Any = ray.remote(num_cpus=1, max_retries=MAX_RETRIES)(_run)
    shared, source, here = ray.put(work), iter(items), os.getcwd()
    room = WAITING * max(1, int(ray.cluster_resources().get("CPU", 1)))
    pending: list[Any] = []
    try:
        while True:
            while len(pending) < room and (item := next(source, None)) is not None:
                pending.append(task.remote(shared, item, here))
            if not pending:
                return
            done, pending = ray.wait(pending)
            yield ray.get(done[0])
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, UserError | Silent) else error from None
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.OutOfMemoryError) as error:
        raise UserError(
            f"a task was lost {MAX_RETRIES + 1} times ({str(error).splitlines()[0]}): run the same command again, which goes on"
        ) from error
    finally:
        for each in pending:
            ray.cancel(each, force=True)


def _run(work: Callable[[T], R], item: T, here: str) -> R:
    # Relative places start where the command was typed. A node without that folder can still serve places in stores.
    with contextlib.suppress(OSError):
        os.chdir(here)
    return told(work, item)
