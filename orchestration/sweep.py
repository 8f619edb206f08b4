"""A transfer sweep as Ray Tune trials: ridge jobs, searches under ASHA, and final trials, in one experiment.

    plan -> [ridge jobs | search trials] -> selection record of a cell -> its final trials
    what is next is decided here; where and when it runs is Tune's; what has been run is the ledger's

One experiment for all of it, because each one costs seconds of imports in every worker: Tune asks a searcher what to run
next, and the searcher is our queue, which releases a cell's final trials when its search is over. Tune's own storage is a
temporary folder; nothing is ever restored from it. A driver that is killed starts again from the ledger, and loses what
was running.
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
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler
from ray.tune.search import Searcher

from pipeline.errors import UserError
from transfer.cells import Cell, Sweep, choose, open_source, plan
from transfer.ledger import Entry, Ledger, SweepInfo, Trial
from transfer.spaces import REDUCTION, grace_steps
from transfer.tasks import FinetuneSettings, Suite, load_suite

OnEvent = Callable[[dict[str, Any]], None]
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
        on_event: told of every phase and finished trial, as a plain dict (see `Conductor`); it runs in this process.
    Raises:
        UserError: anything that is wrong before the first trial. A trial that fails is an entry, not an error.
    """
    begin = time.perf_counter()
    tell = on_event or (lambda event: None)
    tell({"event": "phase", "name": "reading checkpoint and tasks"})
    found = load_suite(suite)
    found = replace(found, num_seeds=_at_least_one(num_seeds, "--seeds") or found.num_seeds)
    concurrent = _at_least_one(max_concurrent, "--max-concurrent") or _num_cores()
    sweep = Sweep(out=_absolute(out), data_root=_absolute(data_root), source=open_source(_absolute(checkpoint)), suite=found)
    cells, not_run = plan(sweep)
    if not cells:
        raise UserError(f"the suite {found.name} has nothing that these datasets can give: {not_run[0]['reason']}")
    _claim(sweep, found, not_run)
    conductor = Conductor(sweep, cells, tell)
    if conductor.has_work():
        tell({"event": "phase", "name": "starting Ray"})
        _run_all(sweep, conductor, concurrent)
    return conductor.result(not_run, time.perf_counter() - begin)


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
    hardware = f"{_num_cores()} CPU cores ({platform.machine()}) on {socket.gethostname()}, {', '.join(gpus) or 'no GPU'}"
    Ledger(sweep.out).claim(
        SweepInfo(
            suite=suite.name,
            suite_digest=suite.digest(),
            checkpoint_url=sweep.source.checkpoint_url,
            checkpoint_digest=sweep.source.digest,
            model=sweep.source.model,
            started_s=time.time(),
            command=shlex.join(sys.argv),
            hardware=hardware,
            num_seeds=suite.num_seeds,
            not_run=not_run,
        )
    )


class Conductor:
    """Which job is next, and what follows from one that is over. Knows nothing of Ray.

    A job is a plain dict: `name`, `cell` (index, or -1 for ridge), and either `ridge` (indices of the cells that it serves)
    or `trial` (fields of a Trial). Events: {"event": "phase", "name"}; {"event": "trial", "done", "total", "entry" (dict),
    "best" (highest final value of that task and method so far)}; {"event": "selected", "cell", "url"}.
    """

    def __init__(self, sweep: Sweep, cells: list[Cell], tell: OnEvent) -> None:
        self.sweep, self.cells, self.tell, self.ledger = sweep, cells, tell, Ledger(sweep.out)
        self.num_run = self.num_failed = self.done = self.total = 0
        self._best: dict[tuple[str, str], float] = {}
        self._queue: deque[dict[str, Any]] = deque()
        self._rows: dict[str, list[dict[str, float]]] = {}
        self._began_s: dict[str, float] = {}
        self._searching: dict[int, set[str]] = {}
        self._told: set[str] = set()
        self._fill()

    def _fill(self) -> None:
        num_seeds, groups = self.sweep.suite.num_seeds, {}
        for index, cell in enumerate(self.cells):
            self.total += num_seeds
            if cell.method == "ridge":
                groups.setdefault((cell.task, cell.init), []).append(index)
        for (task, init), indices in groups.items():
            if any(self._missing(self._finals(i)) for i in indices):
                self._queue.append({"name": f"{task}-ridge-{init}", "cell": -1, "ridge": indices})
            self.done += sum(num_seeds - len(self._missing(self._finals(i))) for i in indices)
        for index, cell in enumerate(self.cells):
            if cell.method == "finetune" and not self._release(index):
                self._start_search(index)

    def _finals(self, index: int) -> list[Trial]:
        """Final trials of a ridge cell, whose setting needs no search."""
        return self.cells[index].finals({"l2": self.sweep.suite.settings("ridge").l2}, self.sweep.suite.num_seeds)  # type: ignore[union-attr]

    def _missing(self, trials: list[Trial]) -> list[Trial]:
        return [t for t in trials if not self.ledger.is_done(t)]

    def _start_search(self, index: int) -> None:
        cell = self.cells[index]
        self.total += len(cell.search)
        missing = self._missing(list(cell.search))
        self.done += len(cell.search) - len(missing)
        self._searching[index] = {t.digest for t in missing}
        for trial in missing:
            self._add(index, trial, first=False)
        if not missing:
            self._search_over(index)

    def _add(self, index: int, trial: Trial, *, first: bool) -> None:
        job = {"name": "-".join(map(str, trial.cell)), "cell": index, "trial": asdict(trial)}
        (self._queue.appendleft if first else self._queue.append)(job)

    def _release(self, index: int) -> bool:
        """Queue the missing final trials of a cell that has its selection record; False if it has none yet."""
        from pipeline import storage
        from transfer.splits import read_selection

        cell = self.cells[index]
        url = cell.selection_url(self.sweep.out)
        if not storage.exists(url):
            return False
        finals = cell.finals(read_selection(url).hyperparameters, self.sweep.suite.num_seeds)
        missing = self._missing(finals)
        self.done += len(finals) - len(missing)
        for trial in reversed(missing):
            self._add(index, trial, first=True)
        return True

    def _search_over(self, index: int) -> None:
        cell = self.cells[index]
        dead_ends = cell.finals({}, self.sweep.suite.num_seeds)
        url = choose(cell, self.ledger)
        if url is None:
            for trial in dead_ends:
                self._over(self.sweep.failed(trial, "no candidate of the search ran to its end"), write=True)
            return
        for trial in dead_ends:  # of an earlier start
            self.ledger.remove(trial.digest)
        self.tell({"event": "selected", "cell": list(cell[:4]) if isinstance(cell, tuple) else [*_key(cell)], "url": url})
        self._release(index)

    # --- what Tune asks and tells -------------------------------------------------------------------------------------

    def has_work(self) -> bool:
        return bool(self._queue or any(self._searching.values()))

    def next_job(self) -> dict[str, Any] | None:
        """None: nothing to start now."""
        return self._queue.popleft() if self._queue else None

    def started(self, job_id: str) -> None:
        self._began_s[job_id] = time.time()

    def reported(self, job_id: str, job: dict[str, Any], row: dict[str, Any]) -> None:
        """A row of a running job: step, time_s, loss, accuracy of a search trial; `digest` of an entry of a ridge job."""
        if "digest" in row and row["digest"] not in self._told:
            found = self.ledger.find(row["digest"])
            if found is not None:
                self._over(found)
        elif "digest" not in row and job["cell"] >= 0:
            rows = self._rows.setdefault(job_id, [])
            if not rows or rows[-1]["step"] < row["step"]:
                rows.append({k: row[k] for k in ("step", "time_s", "loss", "accuracy")})

    def ended(self, job_id: str, job: dict[str, Any], *, crashed: bool) -> None:
        """A job is over: by itself, stopped by the scheduler, or with its process gone."""
        rows = self._rows.pop(job_id, [])
        if job["cell"] < 0:
            for index in job["ridge"]:
                for trial in self._finals(index):
                    if trial.digest not in self._told:
                        self._settle(trial, [], crashed=crashed)
            return
        trial = Trial(**job["trial"])
        self._settle(trial, rows, crashed=crashed, began_s=self._began_s.pop(job_id, None))
        searching = self._searching.get(job["cell"], set())
        if trial.digest in searching:
            searching.discard(trial.digest)
            if not searching:
                self._search_over(job["cell"])

    def _settle(
        self, trial: Trial, rows: list[dict[str, float]], *, crashed: bool, began_s: float | None = None
    ) -> None:
        """See that the trial has its entry: its own, or that of an early stop, or that of a death."""
        from transfer.trials import finetune_entry

        found = self.ledger.find(trial.digest)
        fresh = found is not None and (trial.digest not in self._told or found.status == "ok")
        if crashed and (found is None or found.status == "failed"):
            return self._over(self.sweep.failed(trial, "the worker process died (killed, or out of memory)"), write=True)
        if found is not None and fresh:
            return self._over(found)
        if rows:  # stopped at a rung
            found = finetune_entry(
                self.sweep,
                trial,
                rows,
                value=rows[-1]["accuracy"],
                num_test=0,
                seconds_s=time.time() - (began_s or time.time()),
            )
            return self._over(found, write=True)
        self._over(self.sweep.failed(trial, "the trial ended without a result"), write=True)

    def _over(self, found: Entry, *, write: bool = False) -> None:
        if write:
            self.ledger.write(found)
        if found.digest in self._told:
            return
        self._told.add(found.digest)
        self.num_run += 1
        self.done += 1
        self.num_failed += found.status == "failed"
        key = (found.task, found.method)
        if found.kind == "final" and found.value is not None:
            self._best[key] = max(found.value, self._best.get(key, 0.0))
        self.tell(
            {"event": "trial", "done": self.done, "total": self.total, "entry": asdict(found), "best": self._best.get(key)}
        )

    def result(self, not_run: list[dict[str, Any]], seconds_s: float) -> SweepResult:
        return SweepResult(
            out=self.sweep.out,
            num_trials=self.done,
            num_run=self.num_run,
            num_failed=self.num_failed,
            not_run=not_run,
            seconds_s=seconds_s,
        )
