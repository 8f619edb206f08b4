"""Train on this machine: in this process, or in several under an agent of this process's own."""

import secrets
import socket

from orchestration.launch import supervisor
from orchestration.launch.agent import ranks_of
from orchestration.launch.attempts import Hosts
from orchestration.launch.rank_processes import Ranks
from orchestration.launch.restart_policy import RestartLimits
from orchestration.run.worker import PROFILE, TRACKING_URI, run_worker
from pipeline.errors import UserError
from pipeline.provenance import command
from pipeline.supervision.rank_environment import place
from pipeline.training.run import Run

WINDOW_S = 3600.0


def pretrain(
    run: Run,
    out: str,
    *,
    num_processes: int,
    tracking_uri: str | None,
    debug: bool,
    max_restarts: int = 0,
    profile: str = "",
) -> int:
    """Exit code of the run: 0 done, 2 the user's mistake, 75 stopped by a signal after saving, 76 a rank froze, 1 anything
    else.

    Args:
        max_restarts: within an hour, after a rank was lost, failed or froze.
        profile: steps to look at closely (`pipeline.profiling.asked`).
    """
    run.batch_plan(num_processes)  # a batch that does not divide is refused before anything starts
    here = place()
    if num_processes == 1 and not max_restarts:
        return run_worker(run, out, tracking_uri=tracking_uri, debug=debug, profile=profile)
    if here.size > 1:
        raise UserError(
            f"--num-processes {num_processes} starts processes, and another launcher has started {here.size} (WORLD_SIZE): "
            "leave out --num-processes, or start without that launcher"
        )
    environment = {TRACKING_URI: tracking_uri or "", PROFILE: profile}
    ranks = ranks_of(run, out, command(), environment, processes=num_processes, debug=debug)
    return supervise(ranks, max_restarts=max_restarts)


def supervise(ranks: Ranks, *, max_restarts: int = 0) -> int:
    """These ranks on this machine alone, which nobody need reach; the code of `restart_policy.outcome`."""
    hosts = Hosts(
        run_id=secrets.token_hex(8),
        host=socket.gethostname(),
        address="127.0.0.1",
        store=("", 0),
        limits=RestartLimits(max_restarts=max_restarts, window_s=WINDOW_S, min_hosts=1),
    )
    return supervisor.supervise(ranks, hosts)
