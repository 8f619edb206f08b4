"""One group of processes owns a run folder, and every process of it sees the same folder."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from typing import cast

from pipeline import distributed
from pipeline.distributed import World
from pipeline.errors import UserError
from pipeline.storage import objects
from pipeline.storage.ownership import Holder, hold
from pipeline.storage.process_identity import Process, this_process
from pipeline.supervision.rank_environment import TORCHRUN

SEEN_S = 15.0
"""A network disk may take this long to show a machine what another one wrote."""


@contextlib.contextmanager
def owned(out: str, me: World) -> Iterator[None]:
    """The run folder `out` is this group's inside the block. All ranks enter it together.

    Raises:
        UserError: on all ranks; another run is at work there, it cannot be written, or some rank does not see what rank 0
            wrote: disks of different machines under one name would make every checkpoint fail.
    """
    mine = this_process(launched=me.size > 1 or TORCHRUN in os.environ)
    everywhere = cast(list[Process], distributed.gather(me, mine))
    processes = [p for p in everywhere if p.machine == everywhere[0].machine]
    with contextlib.ExitStack() as stack:
        holder = distributed.from_main(me, lambda: stack.enter_context(hold(out, "run", processes=processes)))
        if me.size > 1:
            patience_s = 0.0 if mine.machine == everywhere[0].machine else SEEN_S
            _refuse_other_places(holder, out, me, patience_s)
        yield


def _refuse_other_places(holder: Holder, out: str, me: World, patience_s: float) -> None:
    where = str(objects.local_path(out).absolute()) if objects.is_local(out) else out
    rows = distributed.gather(me, (socket.gethostname(), where, _why_not_seen(Holder(out, holder.token), patience_s)))
    seen = cast(list[tuple[str, str, str]], rows)
    for rank, (host, folder, reason) in enumerate(seen):
        if reason:
            raise UserError(
                f"rank {rank} on {host} does not find in {folder} what rank 0 on {seen[0][0]} wrote to {seen[0][1]} ({reason}): "
                "set --out to a folder that all machines share, by the same path from the root on, or to s3://bucket/..."
            )


def _why_not_seen(holder: Holder, patience_s: float) -> str:
    deadline_s = time.monotonic() + patience_s
    while True:
        reason = "it is not there"
        try:
            if holder.is_seen():
                return ""
            if objects.is_local(holder.url):
                os.listdir(objects.local_path(holder.url))  # network disks look again then
        except Exception as error:  # clients of stores raise what they like
            reason = f"{type(error).__name__}: {error}"
        if time.monotonic() > deadline_s:
            return reason
        time.sleep(0.5)
