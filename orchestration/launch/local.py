"""Train on this machine: in this process, or in several that are started, signalled and ended together here.

torch's elastic launcher would do all but this: let the ranks save after a signal for as long as the run allows (it kills after
30 s), return their code instead of its own exception, and kill a frozen rank at once when the others have left it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from orchestration import child_process
from orchestration.run.worker import EXIT_OURS, RUN, TRACKING_URI, run_worker
from pipeline.errors import UserError
from pipeline.provenance import COMMAND, command
from pipeline.supervision.rank_environment import place
from pipeline.supervision.stop_signals import EXIT_REQUEUE, SIGNALS, heeded, say
from pipeline.supervision.watchdog import EXIT_HANG
from pipeline.training.run import Run, dump_yaml

POLL_S = 0.1
LINGER_S = 15.0
"""The other ranks find out for themselves that one has failed, and say why; after this time they are told to end,"""
KILL_S = 30.0
"""and after this time killed."""
MARGIN_S = 1.0
"""After the grace period of a stop signal, which the ranks keep by themselves."""


def pretrain(run: Run, out: str, *, num_processes: int, tracking_uri: str | None, debug: bool) -> int:
    """Exit code of the run: 0 done, 2 the user's mistake, 75 stopped by a signal after saving, 76 a rank froze, 1 anything
    else."""
    run.batch_plan(num_processes)  # a batch that does not divide is refused before anything starts
    if not run.data.url:
        raise UserError("the run has no data: set --data.url to a folder that 'normfree data prepare' wrote")
    here = place()
    if num_processes == 1:
        return run_worker(run, out, tracking_uri=tracking_uri, debug=debug)
    if here.size > 1:
        raise UserError(
            f"--num-processes {num_processes} starts processes, and another launcher has started {here.size} (WORLD_SIZE): "
            "leave out --num-processes, or start without that launcher"
        )
    # By the environment: a URI may hold a password, and command lines are for everybody to read.
    told = {RUN: dump_yaml(run), COMMAND: command(), TRACKING_URI: tracking_uri or ""}
    arguments = [out, "--debug"] if debug else [out]
    return supervise(
        "orchestration.run.worker", arguments, num_processes, grace_s=run.watchdog.grace_s, environment=told
    )


def supervise(
    module: str,
    arguments: Sequence[str],
    num_processes: int,
    *,
    grace_s: float,
    environment: Mapping[str, str] | None = None,
) -> int:
    """Runs the module once a rank, with the variables that `torch.distributed` reads; returns the code of `outcome`.

    SIGTERM, SIGINT and SIGHUP are passed on to all ranks as SIGTERM, once. If this process is killed they get it from Linux.
    """
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes)))
    asked: list[int] = []

    def ask(number: int, _frame: FrameType | None) -> None:
        asked.append(number)

    before: dict[int, Any] = {n: signal.signal(n, ask) for n in heeded()}
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        with child_process.rank_variables(num_processes) as shared:
            for r in map(str, range(num_processes)):
                own = {**(environment or {}), "OMP_NUM_THREADS": threads, **shared, "RANK": r, "LOCAL_RANK": r}
                # A Run's paths are relative to the folder that the user is in.
                started = child_process.start(
                    module, arguments, environment=own, folder=Path.cwd(), on_parent_death=signal.SIGTERM
                )
                ranks.append(started)
            code = outcome(_watch(ranks, asked, grace_s))
        if code == EXIT_REQUEUE and (ranks[0].returncode or 0) < 0:  # it was ended before it could listen, and say so
            say("stopped by a signal while starting; there is nothing to save")
        return code
    finally:
        for rank in ranks:
            rank.kill()
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(ranks: list[subprocess.Popen[bytes]], asked: list[int], grace_s: float) -> list[int]:
    """Until all have ended; the codes of those that ended before they were told to, in that order."""
    own: list[int] = []
    ended: set[int] = set()
    failed_s = told_s = passed_on = asked_s = None
    while len(ended) < len(ranks):
        time.sleep(POLL_S)
        now_s = time.monotonic()
        for i, rank in enumerate(ranks):
            code = rank.poll()
            if code is None or i in ended:
                continue
            ended.add(i)
            if told_s is None:
                own.append(code)
                if code < 0 and -code not in SIGNALS and -code < signal.SIGRTMIN:
                    memory = ", most likely for its memory" if code == -signal.SIGKILL else ""
                    say(
                        f"rank {i} (process {rank.pid}) was ended by {signal.Signals(-code).name}{memory}; the same command "
                        "goes on from the newest checkpoint"
                    )
            if code != 0 and failed_s is None:
                failed_s = now_s
        if asked and len(asked) != passed_on:
            passed_on = len(asked)  # a second signal goes on too: it means now
            asked_s = asked_s or now_s
            _tell(ranks, signal.SIGTERM)
        if asked_s is not None and told_s is None and now_s - asked_s > grace_s + MARGIN_S:  # frozen, they do not hear
            own, told_s = [*own, EXIT_REQUEUE], now_s
            _tell(ranks, signal.SIGKILL)
        if EXIT_HANG in own:  # all who can have left by themselves
            wait_s = 1.0
        else:
            wait_s = grace_s if outcome(own) == EXIT_REQUEUE else LINGER_S
        if failed_s is not None and told_s is None and now_s - failed_s > wait_s:
            told_s = now_s
            _tell(ranks, signal.SIGKILL if EXIT_HANG in own else signal.SIGTERM)
        if told_s is not None and now_s - told_s > KILL_S:
            _tell(ranks, signal.SIGKILL)
    return own


def _tell(ranks: list[subprocess.Popen[bytes]], number: int) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(number)


def outcome(codes: list[int]) -> int:
    """The run's exit code from those of its ranks, in the order in which they ended by themselves.

    A rank that a signal ended before it could listen had nothing to save: that counts as stopped.
    """
    codes = [EXIT_REQUEUE if -code in SIGNALS else code for code in codes if code != 0]
    if EXIT_HANG in codes:
        return EXIT_HANG
    wrong = [code for code in codes if code != EXIT_REQUEUE]
    if wrong:
        return next((code for code in wrong if code > 0), EXIT_OURS)
    return EXIT_REQUEUE if codes else 0
