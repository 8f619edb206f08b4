"""Ranks that are left over: where hosts were lost, the others may be too many to divide the global batch.

The batch and the order of its samples never change. So as many ranks train as divide it; the others stand by, hold no data and no
weights, and leave with those that train, so that all start anew together when hosts change.
"""

import os
import time
from typing import TYPE_CHECKING

from orchestration.run import rank_end
from pipeline.errors import UserError
from pipeline.supervision.rank_environment import place
from pipeline.supervision.stop_signals import say

if TYPE_CHECKING:
    from pipeline.training.run import Run

POLL_S = 1.0


def takes_part(run: "Run") -> bool:
    """Whether this rank trains. Those that do see a world of their number from here on."""
    here = place()
    if rank_end.FOLDER not in os.environ or here.size == 1:
        return True
    size = usable(run, here.size)
    if size == here.size:
        return True
    if here.is_main:
        say(
            f"{here.size} processes do not divide global_batch {run.global_batch}: {size} train, {here.size - size} stand by"
        )
    if here.rank < size:
        os.environ["WORLD_SIZE"] = str(size)
    return here.rank < size


def usable(run: "Run", num_ranks: int) -> int:
    """The most ranks, of so many, that the run's batch divides over; all, where it divides over none."""
    for size in range(num_ranks, 0, -1):
        try:
            run.augment.check_micro_batch(run.batch_plan(size)[0])
        except UserError:
            continue
        return size
    return num_ranks


def stand_by() -> int:
    """Until the ranks that train have left; a stop signal ends it like any rank that starts."""
    from pipeline.supervision import attempt_store

    try:
        store = attempt_store.connect(wait_s=1800.0)
        while True:
            store.check(["any"])
            time.sleep(POLL_S)
    except RuntimeError:  # rank 0 has the store
        return 0
