"""The Ray that a sweep's trials run on, one of our own (`local_ray`) or a named cluster, and what a trial reserves there.

configured resources -> layout: what one trial reserves, how many run at a time
ray.init -> does a trial fit anywhere? -> on a cluster: `orchestration.tune.cluster_nodes`
"""

import contextlib
import os
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import psutil
import ray

from orchestration.child_process import cores
from orchestration.tune.local_ray import (
    QUIET,
    LocalRay,
    keep_secrets_out_of_logs,
    local_ray,
    workers_import_this_package,
)
from pipeline.errors import UserError
from pipeline.fitting.host_memory import cgroup_limit_bytes

CONNECT_TRIES = ("RAY_gcs_server_port_wait_time_s", "3")
"""Of Ray: by default 20 tries, each of which may take most of a minute."""
KNOCK_S = 10.0
PROCESS_BYTES = 2 << 30
"""Main memory that a trial's process is taken to use: torch, a network, its images. A guess, and reported as one."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Where trials run, and what each may take. Decides no number: recipes that draw by micro-batch (dropout, stochastic depth,
    SAM) draw others on another number of processes, and the entry says how many there were."""

    max_concurrent: int | None = None
    """Trials at a time; None = one a GPU, without GPUs one a core, as far as memory goes; on a cluster as many as fit."""
    gpus_per_trial: float | None = None
    """Up to 1: a share of a GPU. A whole number above 1: a fine-tuning trial runs as so many processes, a GPU each. None = one
    GPU a process; where `max_concurrent` is more than there are GPUs, these are shared."""
    processes_per_trial: int | None = None
    """A fine-tuning trial runs as so many processes, a core each, and a GPU each where there are some. None = 1, or as
    `gpus_per_trial` says. Probes run in one process."""
    ray_address: str | None = None
    """Of a cluster that runs; None = a Ray of our own on this machine, which ends with the sweep."""
    trial_limit_s: float = 0.0
    """A trial that is not done by then is ended, and is a failed one; 0 = no limit."""


@dataclass(frozen=True, kw_only=True)
class TrialResources:
    """`Resources`, resolved."""

    num_concurrent: int
    """0 = as many as fit."""
    num_processes: int
    """Of a fine-tuning trial."""
    gpus: float
    """That one trial reserves; of cores it reserves one a process."""
    reason: str = field(default="", compare=False)
    """What `num_concurrent` follows from, where it was not configured."""


def layout(resources: Resources) -> TrialResources:
    """UserError for what contradicts itself."""
    import torch

    if resources.max_concurrent is not None and resources.max_concurrent < 1:
        raise UserError(f"--max-concurrent is {resources.max_concurrent}; set it to 1 or more, or leave it out")
    num_gpus = torch.cuda.device_count()
    gpus, processes = _per_trial(resources)
    wants_gpu = bool(num_gpus) and gpus != 0
    at_a_time, reason = resources.max_concurrent or 0, ""
    if not at_a_time and not resources.ray_address:
        at_a_time, reason = _at_a_time(processes, (gpus or float(processes)) if wants_gpu else 0.0, num_gpus)
    if gpus is None:
        gpus = min(1.0, num_gpus / max(at_a_time, 1)) if processes == 1 else float(processes)
        gpus = gpus if num_gpus else 0.0
    return TrialResources(num_concurrent=at_a_time, num_processes=processes, gpus=gpus, reason=reason)


def _per_trial(resources: Resources) -> tuple[float | None, int]:
    """GPUs (None = not configured) and processes of a trial."""
    gpus, processes = resources.gpus_per_trial, resources.processes_per_trial
    if processes is not None and processes < 1:
        raise UserError(f"--processes-per-trial is {processes}; set it to 1 or more")
    if gpus is not None and not (0 <= gpus <= 1 or (gpus > 1 and float(gpus).is_integer())):
        raise UserError(f"--gpus-per-trial is {gpus:g}; set a share of one GPU, 0 to 1, or a whole number of GPUs")
    if processes is None:
        return gpus, max(1, int(gpus or 0))
    if gpus and gpus != processes and (gpus > 1 or processes > 1):
        raise UserError(
            f"--gpus-per-trial is {gpus:g} and --processes-per-trial {processes}; each process of a trial has a GPU of its "
            "own, so leave one of them out"
        )
    return gpus, processes


def _at_a_time(processes: int, gpus: float, num_gpus: int) -> tuple[int, str]:
    """As many trials as cores, memory and, where trials use them, GPUs allow; and why so many."""
    num_cores, memory, need = cores(), memory_bytes(), processes * PROCESS_BYTES
    limits = {
        f"{processes} of {num_cores} cores a trial": num_cores // processes,
        f"a trial is taken to use {need >> 30} GiB of the {memory >> 30} GiB of memory": memory // need,
    }
    if gpus:
        # Shares of one GPU lie on one GPU.
        limits[f"{gpus:g} of {num_gpus} GPUs a trial"] = (
            num_gpus * int(1 / gpus + 1e-9) if gpus <= 1 else int(num_gpus // gpus)
        )
    reason = min(limits, key=lambda words: limits[words])
    return max(1, limits[reason]), reason


def memory_bytes() -> int:
    """Of this machine, or of the container or job if that is less."""
    return min(psutil.virtual_memory().total, cgroup_limit_bytes() or sys.maxsize)


@contextlib.contextmanager
def running_ray(address: str | None, plan: TrialResources) -> Iterator[LocalRay | None]:
    """A Ray of this process's own, never one that happens to run on the machine; or the cluster that was named (None).

    Raises:
        UserError: no cluster answers; what a trial reserves is not to be had anywhere; or the cluster has ended a trial for want
            of memory, upon which Tune gives up.
    """
    if ray.is_initialized():
        raise UserError("Ray runs in this process already; call transfer from a process of its own")
    keep_secrets_out_of_logs()
    if not address:
        with local_ray(max(1, plan.num_concurrent) * plan.num_processes) as found:
            _check_room(plan, "this machine")
            yield found
        return
    os.environ.pop("RAY_ADDRESS", None)
    os.environ.setdefault(*CONNECT_TRIES)
    _knock(address)
    try:
        with workers_import_this_package():
            ray.init(address=address, **QUIET)
    except Exception as error:
        raise UserError(f"no Ray cluster answers at --ray-address {address}: {_refusal(error)}") from None
    try:
        _check_room(plan, "a node of the cluster")
        yield None
    except RuntimeError as error:
        if not isinstance(error.__cause__, ray.exceptions.OutOfMemoryError):
            raise
        raise UserError(
            "a node of the cluster ran out of memory, and Ray ended a trial there; run fewer at a time with --max-concurrent, or "
            "reserve more cores for each; the same command goes on"
        ) from error
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Ray itself tries for a quarter of an hour where nobody listens."""
    host, colon, port = address.rpartition(":")
    if "://" in address or not (colon and port.isdigit()):
        if address == "auto":  # Ray looks for one on this machine
            return
        raise UserError(
            f"--ray-address is {address}; give host:port of the cluster's head, from a machine of the cluster"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_S).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"no Ray cluster answers at --ray-address {address}: {error}; give host:port of a head that 'ray start --head' "
            "started"
        ) from None


def _refusal(error: BaseException) -> str:
    """Why a cluster did not let us in, in a sentence."""
    seen: list[str] = []
    at: BaseException | None = error
    while at is not None:
        seen.append(str(at))
        at = at.__cause__ or at.__context__
    if any("InvalidAuthToken" in text or "authentication token" in text.lower() for text in seen):
        return (
            "it wants its token; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or the file ~/.ray/auth_token to the cluster's "
            "('ray get-auth-token' on its head says it)"
        )
    first = (seen[0].splitlines() or [type(error).__name__])[0]
    return f"{first}; give host:port of a head that 'ray start --head' started"


def _check_room(plan: TrialResources, place: str) -> None:
    """Tune would wait for ever for what no node has."""
    wanted = {"CPU": float(plan.num_processes), "GPU": plan.gpus}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(all(has.get(kind, 0.0) >= number for kind, number in wanted.items()) for has in nodes):
        most = max(has.get("GPU", 0.0) for has in nodes)
        most_cores = max(has.get("CPU", 0.0) for has in nodes)
        raise UserError(
            f"a trial wants {plan.num_processes} cores and {plan.gpus:g} GPUs at once, and {place} has {most_cores:g} and "
            f"{most:g} at most; lower --gpus-per-trial or --processes-per-trial"
        )
