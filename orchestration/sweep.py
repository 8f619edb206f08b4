"""A transfer sweep as Ray Tune trials: ridge jobs, searches under ASHA, and final trials, in one experiment.

    what is next: `transfer.conductor`; where and when it runs: Tune; what has been run: `transfer.ledger`

One experiment for all of it, because each one costs seconds of imports in every worker: Tune asks a searcher what to
run next, and the searcher is our queue, which releases a cell's final trials when its search is over. Tune's own
storage is a temporary folder; nothing is ever restored from it. A driver that is killed starts again from the ledger,
and loses what was running.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import shlex
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler
from ray.tune.search import Searcher

from pipeline.errors import UserError
from pipeline.redact import public
from transfer.cells import Sweep, open_source, plan
from transfer.conductor import Conductor, Job, OnEvent
from transfer.ledger import Ledger, SweepInfo
from transfer.spaces import REDUCTION, grace_steps
from transfer.tasks import Suite, load_suite

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


def transfer(
    checkpoint: str,
    suite: str,
    out: str,
    *,
    data_root: str,
    num_seeds: int | None = None,
    max_concurrent: int | None = None,
    on_event: OnEvent | None = None,
) -> SweepResult:
    """Measure a checkpoint on a suite, or go on with a sweep that was interrupted, or extend one by seeds.

    Args:
        checkpoint: a checkpoint or run folder, path or URL.
        suite: name of a suite, or path of its YAML.
        out: sweep folder; the ledger and everything else that `transfer.report` reads.
        data_root: holds one prepared dataset a task, `<data_root>/<card>`.
        num_seeds: supports drawn for each cell; default the suite's.
        max_concurrent: trials at a time, each on one core; default one a core.
        on_event: told of every phase ({"event": "phase", "name"}) and of what `Conductor` tells, in this process.
    Raises:
        UserError: anything that is wrong before the first trial. A trial that fails is an entry, not an error.
    """
    begin = time.perf_counter()
    tell = on_event or (lambda event: None)
    tell({"event": "phase", "name": "reading checkpoint and tasks"})
    found = load_suite(suite)
    found = replace(found, num_seeds=_at_least_one(num_seeds, "--seeds") or found.num_seeds)
    concurrent = _at_least_one(max_concurrent, "--max-concurrent") or _num_cores()
    sweep = Sweep(
        out=_absolute(out), data_root=_absolute(data_root), source=open_source(_absolute(checkpoint)), suite=found
    )
    cells, not_run = plan(sweep)
    if not cells:
        raise UserError(f"the suite {found.name} has nothing that these datasets can give: {not_run[0]['reason']}")
    _claim(sweep, found, not_run)
    conductor = Conductor(sweep, cells, tell)
    if conductor.has_work:
        tell({"event": "phase", "name": "starting Ray"})
        _run_all(sweep, conductor, concurrent, tell)
    return SweepResult(
        out=sweep.out,
        num_trials=conductor.done,
        num_run=conductor.num_run,
        num_failed=conductor.num_failed,
        not_run=not_run,
        seconds_s=time.perf_counter() - begin,
    )


def _at_least_one(value: int | None, name: str) -> int | None:
    if value is not None and value < 1:
        raise UserError(f"{name} is {value}; set it to 1 or more")
    return value


def _absolute(url: str) -> str:
    """Workers have another working directory."""
    return url if "://" in url else os.path.abspath(os.path.expanduser(url))


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _claim(sweep: Sweep, suite: Suite, not_run: list[dict[str, Any]]) -> None:
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    hardware = (
        f"{_num_cores()} CPU cores ({platform.machine()}) on {socket.gethostname()}, {', '.join(gpus) or 'no GPU'}"
    )
    Ledger(sweep.out).claim(
        SweepInfo(
            suite=suite.name,
            suite_digest=suite.digest(),
            checkpoint_url=sweep.source.checkpoint_url,
            checkpoint_digest=sweep.source.digest,
            model=sweep.source.model,
            started_s=time.time(),
            command=public(shlex.join(sys.argv)),
            hardware=hardware,
            num_seeds=suite.num_seeds,
            not_run=not_run,
        )
    )


def _run_all(sweep: Sweep, conductor: Conductor, concurrent: int, tell: OnEvent) -> None:
    """One Tune experiment over the conductor's jobs, on a Ray of our own that ends with it."""
    os.environ.update(ENVIRONMENT)
    import torch

    num_gpus = torch.cuda.device_count()
    # Trials are small: they share devices, and the number at a time is what limits them.
    resources = {"cpu": 1.0, "gpu": min(1.0, num_gpus / concurrent) if num_gpus else 0.0}
    with tempfile.TemporaryDirectory(prefix="normfree-tune-") as storage_path, _ray(concurrent):
        tell({"event": "phase", "name": "running trials"})
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(_trainable, sweep=sweep), resources),
            tune_config=tune.TuneConfig(
                search_alg=_Queue(conductor),
                scheduler=_CellwiseAsha(sweep.suite),
                num_samples=-1,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(storage_path=storage_path, name="sweep", verbose=0),
        )
        tuner.fit()


@contextlib.contextmanager
def _ray(num_cpus: int) -> Iterator[None]:
    """A Ray of this process's own; never one that happens to run on the machine."""
    if ray.is_initialized():
        raise UserError("Ray runs in this process already; call transfer from a process of its own")
    ray.init(
        address="local",
        num_cpus=num_cpus,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=256 << 20,  # configurations travel, images do not
    )
    try:
        yield
    finally:
        ray.shutdown()


class _Queue(Searcher):
    """The conductor as Tune's searcher."""

    def __init__(self, conductor: Conductor) -> None:
        super().__init__(metric="accuracy", mode="max")
        self._conductor = conductor
        self._jobs: dict[str, Job] = {}

    def suggest(self, trial_id: str) -> Any:
        job = self._conductor.next_job(trial_id)
        if job is None:
            # A search that is over may release final trials, so the end is the end only when nothing runs any more.
            return None if self._jobs else Searcher.FINISHED
        self._jobs[trial_id] = job
        return job

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self._conductor.reported(trial_id, self._jobs[trial_id], result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        job = self._jobs.pop(trial_id)
        if result is not None and not error:
            self._conductor.reported(trial_id, job, result)
        self._conductor.ended(trial_id, job, crashed=error)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune writes its searcher to disk; ours is the ledger

    def save(self, checkpoint_path: str) -> None:
        pass

    def restore(self, checkpoint_path: str) -> None:
        raise RuntimeError("a sweep goes on from its ledger, not from Tune's memory")


class _CellwiseAsha(FIFOScheduler):
    """ASHA among the search trials of one cell; everything else runs to its end.

    Ray's is the asynchronous stopping variant: what is stopped depends on which trial reaches a rung first. Its
    verdicts are in the ledger (a stopped trial's history ends early) and are not taken twice.
    """

    def __init__(self, suite: Suite) -> None:
        super().__init__()
        self._settings = suite.finetune
        self._asha: dict[int, AsyncHyperBandScheduler] = {}

    def _of(self, trial: Any) -> AsyncHyperBandScheduler | None:
        job = trial.config
        if self._settings is None or job["cell"] < 0 or job["trial"]["kind"] != "search":
            return None
        if job["cell"] not in self._asha:
            self._asha[job["cell"]] = AsyncHyperBandScheduler(
                time_attr="step",
                metric="accuracy",
                mode="max",
                max_t=max(self._settings.num_steps) + 1,  # an end is not a rung: nobody is stopped there
                grace_period=grace_steps(self._settings),
                reduction_factor=REDUCTION,
            )
        return self._asha[job["cell"]]

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        asha = self._of(trial)
        if asha is not None:
            asha.on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        asha = self._of(trial)
        if asha is None or "accuracy" not in result:
            return str(FIFOScheduler.CONTINUE)
        return str(asha.on_trial_result(tune_controller, trial, result))


def _trainable(config: Job, sweep: Sweep) -> None:
    """One job, in a worker process that earlier jobs may have used."""
    _isolate()
    import torch

    from transfer.trials import run_job

    torch.set_num_threads(1)  # a trial is one core; more threads than cores make all of them slow
    run_job(sweep, config, tune.report)


def _isolate() -> None:
    """A world of one process with a port of its own, whatever the driver's launcher had set."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
