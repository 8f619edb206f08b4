"""One training process: iterates the loop, and on rank 0 shows, spools and tracks what it yields."""

from __future__ import annotations

import argparse
import os
import signal
from typing import TYPE_CHECKING, Any

from orchestration import child_process
from orchestration.run import rank_end, spare_rank
from orchestration.run.rank_end import EXIT_OURS, EXIT_USER
from orchestration.run.rank_log import RankLog, kept
from orchestration.spool.rank_logs import is_consequence
from pipeline.errors import UserError, place_trouble
from pipeline.profiling import asked
from pipeline.supervision.process_exit import run as run_process
from pipeline.supervision.rank_environment import TORCHRUN, place
from pipeline.supervision.stop_signals import EXIT_REQUEUE, StopSignal, say

if TYPE_CHECKING:
    from pipeline.training.run import Run  # torch comes with it, and signals are to be heard before

RUN = "NORMFREE_RUN"
"""The variable by which the launcher gives its ranks the Run, as YAML;"""
PROFILE = asked.VARIABLE
TRACKING_URI = "NORMFREE_TRACKING_URI"
"""and this is where the records go; empty or unset: SQLite in the run folder."""


def run_worker(run: Run, out: str, *, tracking_uri: str | None, debug: bool, profile: str = "") -> int:
    """This process's rank of the run, from start to exit code. `profile`: see `pipeline.profiling.asked`."""
    with StopSignal(grace_s=run.watchdog.grace_s) as stop, kept(out) as log:
        code = _run_rank(run, out, stop, log, tracking_uri=tracking_uri, debug=debug, profile=profile)
    return rank_end.leave(code, is_signalled=stop.is_signalled)


def _run_rank(
    run: Run,
    out: str,
    stop: StopSignal,
    log: RankLog,
    *,
    tracking_uri: str | None,
    debug: bool,
    profile: str,
) -> int:
    from orchestration.run.record_readers import NodeReader, Readers
    from pipeline.distributed import leave
    from pipeline.records import Finished, Phase, Stopped
    from pipeline.supervision import collective_progress, planned_faults
    from pipeline.training.train import train

    if not spare_rank.takes_part(run):
        return spare_rank.stand_by()
    here = place()
    collective_progress.record_starts()
    if TORCHRUN in os.environ:  # torch's launcher lets its ranks train on when it is killed
        child_process.die_with(os.getppid(), signal.SIGTERM)
    readers: Any = Readers(run, out, tracking_uri, stop, terminal=log.terminal) if here.is_main else None
    node = NodeReader(out) if not here.is_main and here.local_rank == 0 else None
    last = None
    try:
        planned_faults.arm(here.rank)
        for last in train(run, out, stop=stop, profile=asked.parse(profile)):
            if not isinstance(last, Phase):
                log.begin()
            if readers:
                readers.read(last)
            if node:
                node.read(last)
    except UserError as error:
        log.forget()
        if debug:
            raise
        leave()
        if readers:
            readers.close(failed=str(error))
        if (
            readers or node
        ):  # every rank meets the same mistake; one of each machine says so: its log may be all there is
            for line in (str(error), *(error.table if readers else ())):
                say(line)
        return EXIT_USER
    except BaseException as error:
        if readers:  # whoever starts the ranks again waits for this one to leave
            readers.close(failed=f"{type(error).__name__}: {error}", waits=here.size == 1)
        if debug or not isinstance(error, Exception):
            raise
        log.note(error)
        return _failed(error, here.rank)
    leave()
    if readers:
        readers.close(failed=None)
    if isinstance(last, Stopped):
        return EXIT_REQUEUE
    return 0 if isinstance(last, Finished) else EXIT_OURS


def _failed(error: Exception, rank: int) -> int:
    from pipeline.storage.store_errors import silence

    if away := silence(error) or place_trouble(error):
        say(f"rank {rank} ended: {away}")  # it may pass: an agent may start the ranks again
    elif is_consequence(str(error)):
        say(f"rank {rank} lost its connection to another rank, which is where to look for the cause")
    else:
        say(f"rank {rank} failed: {type(error).__name__}: {error} (--debug shows where)")
    return EXIT_OURS


def main() -> int:
    from pipeline.training.run import load_yaml

    parser = argparse.ArgumentParser(description="one rank of a run (started by 'normfree pretrain --num-processes N')")
    parser.add_argument("out")
    parser.add_argument("--debug", action="store_true")
    args = parser.parse_args()
    run = load_yaml(os.environ[RUN], RUN)
    uri, profile = os.environ.get(TRACKING_URI) or None, os.environ.get(PROFILE, "")
    return run_worker(run, args.out, tracking_uri=uri, debug=args.debug, profile=profile)


if __name__ == "__main__":
    run_process(main)
