"""The Ray that a sweep's trials run on: one of our own, or a cluster that was named, whose nodes are asked before they work.

resources that were asked for -> layout: what one trial reserves, how many run at a time
ray.init -> does it fit anywhere? -> on a cluster: does every node see this code, the sweep, the data and the weights?
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import site
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.errors import UserError
from pipeline.models.backbone import find_origin
from transfer.sweep.cells import Cell, Sweep
from transfer.sweep.ledger import Ledger

ROOT = Path(__file__).resolve().parents[2]
"""Holds this package, and in a checkout the cards of datasets."""
CONNECT_TRIES = ("RAY_gcs_server_port_wait_time_s", "3")
"""Of Ray: by default 20 tries, each of which may take most of a minute."""
KNOCK_S = 10.0
FLOORS = ("nfnet", "pipeline", "transfer", "orchestration")


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Where trials run, and what each may take. Decides no number: recipes that draw by micro-batch (dropout, stochastic depth,
    SAM) draw others on another number of processes, and the entry says how many there were."""

    max_concurrent: int | None = None
    """Trials at a time; None = one a core of this machine, on a cluster as many as fit."""
    gpus_per_trial: float | None = None
    """Up to 1: a share of a GPU. A whole number above 1: a fine-tuning trial runs as so many processes, a GPU each. None = the
    GPUs of this machine, shared by the trials at a time."""
    processes_per_trial: int | None = None
    """A fine-tuning trial runs as so many processes, a core each, and a GPU each where there are some. None = 1, or as
    `gpus_per_trial` says. Probes run in one process."""
    ray_address: str | None = None
    """Of a cluster that runs; None = a Ray of our own on this machine, which ends with the sweep."""
    trial_limit_s: float = 0.0
    """A trial that is not done by then is ended, and is a failed one; 0 = no limit."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """`Resources`, resolved."""

    num_concurrent: int
    """0 = as many as fit."""
    num_processes: int
    """Of a fine-tuning trial."""
    gpus: float
    """That one trial reserves; of cores it reserves one a process."""


def layout(resources: Resources) -> Layout:
    """UserError for what contradicts itself."""
    import torch

    gpus, processes, num_gpus = resources.gpus_per_trial, resources.processes_per_trial, torch.cuda.device_count()
    if processes is not None and processes < 1:
        raise UserError(f"--processes-per-trial is {processes}; set it to 1 or more")
    if gpus is not None and not (0 <= gpus <= 1 or (gpus > 1 and float(gpus).is_integer())):
        raise UserError(f"--gpus-per-trial is {gpus:g}; set a share of one GPU, 0 to 1, or a whole number of GPUs")
    if processes is None:
        processes = max(1, int(gpus or 0))
    elif gpus and gpus != processes and (gpus > 1 or processes > 1):
        raise UserError(
            f"--gpus-per-trial is {gpus:g} and --processes-per-trial {processes}; each process of a trial has a GPU of its "
            "own, so leave one of them out"
        )
    at_a_time = resources.max_concurrent or 0
    if not at_a_time and not resources.ray_address:
        at_a_time = max(1, num_cores() // processes)
        if processes > 1 and num_gpus and gpus != 0:
            at_a_time = max(1, min(at_a_time, num_gpus // processes))
    if gpus is None:
        gpus = min(1.0, num_gpus / max(at_a_time, 1)) if processes == 1 else float(processes)
        gpus = gpus if num_gpus else 0.0
    return Layout(num_concurrent=at_a_time, num_processes=processes, gpus=gpus)


def num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def running_ray(address: str | None, plan: Layout) -> Iterator[None]:
    """A Ray of this process's own, never one that happens to run on the machine; or the cluster that was named.

    Raises:
        UserError: no cluster answers; or what a trial reserves is not to be had anywhere.
    """
    if ray.is_initialized():
        raise UserError("Ray runs in this process already; call transfer from a process of its own")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    with _workers_import_this_package():
        if address:
            os.environ.pop("RAY_ADDRESS", None)
            os.environ.setdefault(*CONNECT_TRIES)
            _knock(address)
            try:
                ray.init(address=address, **quiet)
            except Exception as error:
                raise UserError(f"no Ray cluster answers at --ray-address {address}: {_refusal(error)}") from None
        else:
            ray.init(
                address="local",
                num_cpus=max(1, plan.num_concurrent) * plan.num_processes,
                include_dashboard=False,
                object_store_memory=256 << 20,  # configurations travel, images do not
                **quiet,
            )
    try:
        _check_room(plan, "a node of the cluster" if address else "this machine")
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _workers_import_this_package() -> Iterator[None]:
    """Ray puts the folder in which `ray.init` is called first on its workers' path, on every node of a cluster.

    From a checkout it is to be the checkout's, or they would import what happens to be installed there; and never one that the
    user stands in, who may have a `pipeline` of his own.
    """
    installed = {Path(p).resolve() for p in (*site.getsitepackages(), site.getusersitepackages())}
    with contextlib.chdir("/" if ROOT in installed else ROOT):
        yield


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


def _check_room(plan: Layout, place: str) -> None:
    """Tune would wait for ever for what no node has."""
    wanted = {"CPU": float(plan.num_processes), "GPU": plan.gpus}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(all(has.get(kind, 0.0) >= number for kind, number in wanted.items()) for has in nodes):
        most = max(has.get("GPU", 0.0) for has in nodes)
        cores = max(has.get("CPU", 0.0) for has in nodes)
        raise UserError(
            f"a trial wants {plan.num_processes} cores and {plan.gpus:g} GPUs at once, and {place} has {cores:g} and "
            f"{most:g} at most; lower --gpus-per-trial or --processes-per-trial"
        )


# --- the nodes of a cluster -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """What the driver sees, and every node must see too."""

    code: str
    started_s: float
    """Of the sweep in its folder."""
    data: dict[str, str]
    """Digest of each task's data."""


def check_nodes(sweep: Sweep, cells: Sequence[Cell]) -> None:
    """Ask every node of the cluster, at once, for what trials will need there: afterwards each has fetched the weights.

    Raises:
        UserError: a node has another code than this, or does not see the sweep's folder, a dataset or the weights.
    """
    facts = Facts(code_digest(), Ledger(sweep.out).info().started_s, data_of(cells))
    asked = []
    for node in ray.nodes():
        if node["Alive"] and node["Resources"].get("CPU"):
            there = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
            look = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(node_problem)
            asked.append((node["NodeManagerAddress"], look.remote(sweep, facts)))
    for name, answer in asked:
        try:
            problem = ray.get(answer)
        except Exception as error:
            lines = [line.strip() for line in str(error).splitlines() if "Error" in line] or [type(error).__name__]
            problem = f"this normfree does not run there ({lines[-1]}); install the same on every node"
        if problem:
            raise UserError(f"node {name} of the cluster cannot run this sweep: {problem}")


def data_of(cells: Sequence[Cell]) -> dict[str, str]:
    """Of the tasks that have cells: a suite may name others, which are not prepared anywhere."""
    return {cell.task: cell.any_trial.data_digest for cell in cells}


def node_problem(sweep: Sweep, driver: Facts) -> str:
    """What the machine of this process lacks for the sweep; "" = nothing, and the weights are in its cache."""
    if code_digest() != driver.code:
        return f"its normfree, in {ROOT}, is not the driver's; install the same on every node"
    try:
        if Ledger(sweep.out).info().started_s != driver.started_s:
            return f"{sweep.out} is another folder there; give a URL, or a folder that all nodes share, with --out"
        for name, digest in driver.data.items():
            if sweep.task(name).data_digest != digest:
                return f"the data of {name} under {sweep.data_root} are other data there; put the same on every node"
        for source in sweep.sources:
            if find_origin(source.checkpoint_url).digest != source.digest:
                return f"{source.checkpoint_url} holds other weights there; give a URL that all nodes reach"
    except Exception as error:  # stores and file systems raise what they like
        return (
            f"{error if isinstance(error, UserError) else f'{type(error).__name__}: {error}'}; all nodes must reach it"
        )
    return ""


def code_digest() -> str:
    """SHA-256 over every source file of the four floors, with its place."""
    hasher = hashlib.sha256()
    for path in sorted(p for floor in FLOORS for p in (ROOT / floor).rglob("*.py")):
        hasher.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return hasher.hexdigest()
