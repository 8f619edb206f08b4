"""Lines to type by hand, for clusters with torch's own launcher."""

import shlex
from collections.abc import Sequence

from orchestration.clusters.hosts import Host
from orchestration.clusters.job import Job

PORT = 29400


def torchrun(job: Job, hosts: Sequence[Host], words: Sequence[str], *, run_id: str, port: int) -> list[str]:
    """One line a host. torch's own agent turns the codes 75 and 76 into 1, counts restarts without a window, and ends the job
    with the first host, which holds its store."""
    nodes = str(job.num_hosts) if job.min_hosts == job.num_hosts else f"{job.min_hosts}:{job.num_hosts}"
    line = [
        "torchrun",
        f"--nnodes={nodes}",
        f"--nproc-per-node={job.processes}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={hosts[0].label}:{port or PORT}",
        f"--rdzv-id={run_id}",
        f"--max-restarts={job.max_restarts}",
        f"--shutdown-timeout={int(job.run.watchdog.grace_s) + 30}",
        "--no-python",
        *words,
    ]
    # Without it a host that comes back, and half of all restarts, end the job (torch 2.15).
    return [f"{h.label}: TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 {shlex.join(line)}" for h in hosts]
