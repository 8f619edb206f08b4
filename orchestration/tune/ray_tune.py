"""A transfer sweep as Ray Tune trials: probe jobs, searches, and final trials, in one experiment.

    what is next: `transfer.sweep.scheduler`; where and when it runs: Tune; what has been run: `transfer.sweep.ledger`

One experiment for all of it, because each one costs seconds of imports in every worker: Tune asks a searcher what to
run next, and the searcher is our queue, which releases a cell's final trials when its search is over. Tune's own
storage is a temporary folder; nothing is ever restored from it. A driver that is killed starts again from the ledger, and
trials go on from their own checkpoints. Which candidates of a search go on is decided by the conductor, from what is written
down; under `asha` by Tune while they run, which is quicker and depends on which of them is first.
"""

import os
import platform
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ray import tune
from ray.tune.schedulers import FIFOScheduler

from orchestration.child_process import cores
from orchestration.tune.asha import CellwiseAsha
from orchestration.tune.cluster_nodes import check_nodes
from orchestration.tune.job_queue import JobQueue
from orchestration.tune.ray_cluster import Resources, TrialResources, layout, running_ray
from orchestration.tune.trial_group import run_ranks
from orchestration.tune.trial_limit import Overdue, Watch
from pipeline import places
from pipeline.checkpoint import retention
from pipeline.checkpoint.commit import COMMIT
from pipeline.errors import UserError
from pipeline.models.backbone import absolute
from pipeline.provenance import code_revision, command
from pipeline.storage import objects, ownership
from transfer.protocol.method_settings import Scheduler
from transfer.protocol.suite_files import grown, load_suite, refuse_tasks
from transfer.protocol.tasks import Suite
from transfer.sweep.cells import Cell, Sweep, plan, sweep_of
from transfer.sweep.entry import Trial
from transfer.sweep.ledger import Ledger, SweepInfo
from transfer.sweep.scheduler import Budget, Conductor, Job, OnEvent
from transfer.sweep.sources import distinct, open_source, recipes_told
from transfer.sweep.trials import Report

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the sweep; the same command goes on
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",
    "TUNE_WARN_THRESHOLD_S": "60",
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "10",
    "RAY_AIR_NEW_OUTPUT": "0",
}


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    out: str
    num_trials: int
    """In the ledger now, of those that this sweep asks for."""
    num_run: int
    """By this call."""
    num_failed: int
    not_run: list[dict[str, Any]]
    seconds_s: float
    spent: str = ""
    """The budget that ended it before everything was done."""


def transfer(
    checkpoint: str | Sequence[str],
    suite: str | Suite,
    out: str,
    *,
    data_root: str = "",
    num_seeds: int | None = None,
    scheduler: Scheduler = "halving",
    budget: Budget | None = None,
    resources: Resources | None = None,
    on_event: OnEvent | None = None,
) -> SweepResult:
    """Measure backbones on a suite, or go on with a sweep that was interrupted, or extend one by seeds or backbones.

    Args:
        checkpoint: one or several of what `pipeline.models.backbone` takes: checkpoint or run folder, path or URL; NAME@FILE;
            timm:NAME[@FILE]. LABEL=... before it gives it another name in reports.
        suite: a suite, its name, or the path of its YAML. A folder that holds a sweep of this name keeps what that has.
        out: sweep folder; the ledger and everything else that `transfer.report.write_report` reads.
        data_root: holds one prepared dataset a task, `<data_root>/<card>`.
        num_seeds: supports drawn for each cell; default the suite's.
        scheduler: how candidates of a search are stopped (`transfer.search.grids`).
        budget: what this call may spend.
        on_event: told of every phase ({"event": "phase", "name"}) and of what `Conductor` tells, in this process.
    Raises:
        UserError: anything that is wrong before the first trial. A trial that fails is an entry, not an error.
    """
    tell = on_event or (lambda event: None)
    tell({"event": "phase", "name": "reading checkpoint and tasks"})
    found, grown_from = _what_to_measure(suite, out, num_seeds)
    refuse_tasks(found, _absolute(data_root), suite if isinstance(suite, str) else "")  # before weights are fetched
    words = [checkpoint] if isinstance(checkpoint, str) else list(checkpoint)
    sources = distinct([open_source(absolute(url), name) for name, url in map(_labelled, words)])
    sweep = Sweep(out=_absolute(out), data_root=_absolute(data_root), sources=sources, suite=found, scheduler=scheduler)
    return run_sweep(sweep, budget=budget, resources=resources or Resources(), tell=tell, grown_from=grown_from)


def run_sweep(
    sweep: Sweep, *, budget: Budget | None, resources: Resources, tell: OnEvent, grown_from: str = ""
) -> SweepResult:
    """Run what is missing of a sweep that may have grown from one of another suite (its digest). UserError before the first
    trial for anything that is wrong."""
    begin = time.perf_counter()
    shape = layout(resources)
    cells, not_run = _planned(sweep, tell)
    with ownership.hold(sweep.out, "sweep"):
        _claim(sweep, cells, not_run, grown_from)
        _pin(sweep, tell)
        conductor = Conductor(sweep, cells, tell, budget=budget, limit_s=resources.trial_limit_s)
        if conductor.has_work:
            tell({"event": "phase", "name": "starting Ray"})
            _run_all(sweep, conductor, resources, shape, tell)
    return SweepResult(
        out=sweep.out,
        num_trials=conductor.done,
        num_run=conductor.num_run,
        num_failed=conductor.num_failed,
        not_run=not_run,
        seconds_s=time.perf_counter() - begin,
        spent=conductor.spent,
    )


def _planned(sweep: Sweep, tell: OnEvent) -> tuple[list[Cell], list[dict[str, Any]]]:
    """`transfer.sweep.cells.plan`, with what cannot be run told before anything runs. UserError if that is everything."""
    cells, not_run = plan(sweep)
    if not cells:
        raise UserError(
            f"the suite {sweep.suite.name} has nothing that these datasets can give: {not_run[0]['reason']}"
        )
    told = recipes_told(sweep.sources, sweep.suite.methods)
    for event in (*({"event": "not_run", **row} for row in not_run), *({"event": "phase", "name": t} for t in told)):
        tell(event)
    return cells, not_run


def _labelled(word: str) -> tuple[str, str]:
    """("a name", URL) of "a name=URL"; a place may hold = too, so what stands before it must be free of / and @."""
    name, equals, url = word.partition("=")
    if equals and url and not set("/@:") & set(name):
        return name, url
    return "", word


def _pin(sweep: Sweep, tell: OnEvent) -> None:
    """The sweep refers to these checkpoints from now on: their run's retention leaves them alone."""
    for source in sweep.sources:
        if source.is_fresh or not objects.exists(objects.join(source.checkpoint_url, COMMIT)):
            continue  # a file
        try:
            retention.pin(source.checkpoint_url, f"a transfer sweep refers to it: {sweep.out}")
        except OSError as error:
            why = f"{source.checkpoint_url} could not be pinned ({error}); its run may delete it as an old one"
            tell({"event": "phase", "name": why})


def _absolute(url: str) -> str:
    """Workers have another working directory."""
    return url if "://" in url else os.path.abspath(os.path.expanduser(url))


def _what_to_measure(suite: str | Suite, out: str, num_seeds: int | None) -> tuple[Suite, str]:
    """The suite, with what the folder's sweep has already, and the digest of that sweep's suite ("" = there is none)."""
    found = load_suite(suite) if isinstance(suite, str) else suite
    there = sweep_of(_absolute(out)).suite if objects.exists(objects.join(_absolute(out), "sweep.json")) else None
    found = grown(there, found, out) if there is not None else found
    if num_seeds is not None and num_seeds < 1:
        raise UserError(f"--seeds is {num_seeds}; set it to 1 or more")
    found = replace(found, num_seeds=num_seeds or found.num_seeds)
    return found, there.digest() if there is not None else ""


def _claim(sweep: Sweep, cells: Sequence[Cell], not_run: list[dict[str, Any]], grown_from: str) -> None:
    import torch

    suite = sweep.suite
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    hardware = f"{cores()} CPU cores ({platform.machine()}) on {socket.gethostname()}, {', '.join(gpus) or 'no GPU'}"
    Ledger(sweep.out).claim(
        SweepInfo(
            suite=suite.name,
            suite_digest=suite.digest(),
            checkpoint_url=sweep.source.checkpoint_url,
            checkpoint_digest=sweep.source.digest,
            model=sweep.source.model,
            started_s=time.time(),
            command=command(),
            folder=os.getcwd(),
            hardware=hardware,
            num_seeds=suite.num_seeds,
            not_run=not_run,
            sources=[
                {
                    "url": s.checkpoint_url,
                    **{n: getattr(s, n) for n in ("name", "digest", "model", "options", "classes")},
                }
                for s in sweep.sources
            ],
            recipes=recipes_told(sweep.sources, sweep.suite.methods),
            data={cell.task: cell.any_trial.data_digest for cell in cells},
            scheduler=sweep.scheduler,
            code_revision=code_revision(),
            num_trials=sum(cell.num_finals(suite.num_seeds) + cell.num_search for cell in cells),
            plan=sweep.plain(),
        ),
        grown_from=grown_from,
    )


def _run_all(sweep: Sweep, conductor: Conductor, resources: Resources, shape: TrialResources, tell: OnEvent) -> None:
    """One Tune experiment over the conductor's jobs, on a Ray of our own that ends with it, or on a given cluster."""
    os.environ.update(ENVIRONMENT)
    limit_s = resources.trial_limit_s
    with (
        places.temporary_folder("tune") as storage_path,
        running_ray(resources.ray_address, shape) as ray,
    ):
        if resources.ray_address:
            tell({"event": "phase", "name": "asking the cluster's nodes"})
            check_nodes(sweep, conductor.cells)
        tell({"event": "phase", "name": _at_a_time(shape)})
        tell({"event": "phase", "name": "running trials"})
        trainable = tune.with_parameters(_trainable, sweep=sweep, limit_s=limit_s, shape=shape)
        tuner = tune.Tuner(
            tune.with_resources(trainable, {"cpu": float(shape.num_processes), "gpu": shape.gpus}),
            tune_config=tune.TuneConfig(
                search_alg=JobQueue(conductor),
                scheduler=CellwiseAsha(sweep, conductor.cells) if sweep.scheduler == "asha" else FIFOScheduler(),
                num_samples=-1,
                max_concurrent_trials=shape.num_concurrent or None,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                storage_path=str(storage_path), name="sweep", verbose=0, callbacks=[Overdue(limit_s)]
            ),
        )
        tuner.fit()
        if ray is not None and conductor.num_died:
            ray.keep_logs = True
            tell(
                {"event": "phase", "name": f"processes of trials died; what Ray knows of them is kept in {ray.folder}"}
            )


def _at_a_time(shape: TrialResources) -> str:
    if not shape.num_concurrent:
        return "as many trials at a time as the cluster has room for"
    why = f": {shape.reason}; --max-concurrent changes it" if shape.reason else ""
    return f"{shape.num_concurrent} trials at a time{why}"


def _trainable(config: Job, sweep: Sweep, limit_s: float, shape: TrialResources) -> None:
    """One job, in a worker process that earlier jobs may have used."""
    _isolate()
    import torch

    from transfer.sweep.trials import run_job

    torch.set_num_threads(1)  # a trial is one core; more threads than cores make all of them slow

    def ranks(sweep: Sweep, trial: Trial, report: Report, until: int, number: int) -> None:
        run_ranks(sweep, trial, report, until=until, num_processes=number, has_gpus=shape.gpus > 0)

    watch = Watch(limit_s)
    try:
        run_job(sweep, config, watch.reporting(tune.report), max_processes=shape.num_processes, run_ranks=ranks)
    finally:
        watch.off()


def _isolate() -> None:
    """A world of one process with a port of its own, whatever the driver's launcher had set."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
