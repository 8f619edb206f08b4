"""The nodes of a cluster, asked before they work: does each see this code, the sweep, the data and the weights?"""

from collections.abc import Sequence
from dataclasses import dataclass

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestration.child_process import ROOT
from pipeline.errors import UserError
from pipeline.models.backbone import find_origin
from pipeline.provenance import code_digest
from transfer.sweep.cells import Cell, Sweep
from transfer.sweep.ledger import Ledger


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
