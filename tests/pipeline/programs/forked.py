"""Ranks of a process group by fork: a start of the interpreter with its libraries costs more than all that a rank does in a
test. Used by programs that have imported everything and opened nothing yet."""

import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from pipeline.distributed import World, join, leave
from pipeline.engine import deepspeed_engine


def prepare() -> None:
    """Import what every rank needs, once; one thread, since others would not live on in a fork."""
    torch.set_num_threads(1)
    deepspeed_engine._import_library()


def start(size: int, work: Callable[[World], None], log: Path | None = None) -> list[int]:
    """Process ids by rank; what they print goes to `log`."""
    meeting_point = Path(tempfile.mkdtemp(prefix="normfree-forked-")) / "store"
    return [os.fork() or _rank(rank, size, meeting_point, work, log) for rank in range(size)]


def _rank(rank: int, size: int, meeting_point: Path, work: Callable[[World], None], log: Path | None) -> int:
    code = 1
    try:
        if log is not None:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(descriptor, 1), os.dup2(descriptor, 2)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
        if size > 1:
            dist.init_process_group("gloo", init_method=meeting_point.as_uri(), rank=rank, world_size=size)
        work(join())
        leave()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def wait(pids: list[int]) -> list[int]:
    """Exit codes by rank; a killed one's is the signal, negative."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
