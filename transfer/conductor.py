"""Which trial of a sweep is next, and what follows from one that is over. Knows the ledger, and no scheduler.

    ridge jobs, search trials -> a cell's selection record, once its search is over -> its final trials, at the
    queue's head

A job is a plain dict, so that it travels: `name`, `cell` (index of the cell; -1 for a ridge job), and `ridge`
(indices of the cells that a ridge job serves) or `trial` (fields of the Trial).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from pipeline import storage
from transfer.cells import Cell, Sweep, choose
from transfer.ledger import Entry, Ledger, Trial
from transfer.splits import read_selection
from transfer.trials import finetune_entry, ridge_finals

Job = dict[str, Any]
OnEvent = Callable[[dict[str, Any]], None]


class Conductor:
    """The queue of one sweep.

    Tells its listener, as plain dicts:
        {"event": "trial", "done": int, "total": int, "entry": fields of the Entry, "best": highest final value of
        that task
         and method so far, or None}
        {"event": "selected", "task", "method", "init", "shots", "url"}
    """

    def __init__(self, sweep: Sweep, cells: list[Cell], tell: OnEvent) -> None:
        self.sweep, self.cells, self.ledger = sweep, cells, Ledger(sweep.out)
        self.num_run = self.num_failed = self.done = self.total = 0
        self._tell = tell
        self._queue: deque[Job] = deque()
        self._rows: dict[str, list[dict[str, float]]] = {}
        self._began_s: dict[str, float] = {}
        self._searching: dict[int, set[str]] = {}
        self._told: set[str] = set()
        self._best: dict[tuple[str, str], float] = {}
        self._queue_ridge()
        for index, cell in enumerate(cells):
            if cell.method == "finetune":
                self.total += sweep.suite.num_seeds
                if self._release(index):
                    self.total += len(cell.search)
                    self.done += len(cell.search)  # over, however each of them ended
                else:
                    self._queue_search(index)

    # --- what is next -------------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether anything is queued or, once running searches are over, will be."""
        return bool(self._queue) or any(self._searching.values())

    def next_job(self, job_id: str) -> Job | None:
        """None: nothing to start now. The failed entries of an earlier start make room for new ones."""
        if not self._queue:
            return None
        job = self._queue.popleft()
        for trial in self._trials(job):
            if not self.ledger.is_done(trial):
                self.ledger.remove(trial.digest)
        self._began_s[job_id] = time.time()
        return job

    def _trials(self, job: Job) -> list[Trial]:
        if job["cell"] >= 0:
            return [Trial(**job["trial"])]
        return [trial for index in job["ridge"] for trial in ridge_finals(self.sweep, self.cells[index])]

    def _missing(self, trials: list[Trial]) -> list[Trial]:
        missing = [t for t in trials if not self.ledger.is_done(t)]
        self.done += len(trials) - len(missing)
        self._told |= {t.digest for t in trials} - {t.digest for t in missing}
        return missing

    def _queue_ridge(self) -> None:
        groups: dict[tuple[str, str], list[int]] = {}
        for index, cell in enumerate(self.cells):
            if cell.method == "ridge":
                groups.setdefault((cell.task, cell.init), []).append(index)
        for (task, init), indices in groups.items():
            trials = [trial for index in indices for trial in ridge_finals(self.sweep, self.cells[index])]
            self.total += len(trials)
            if self._missing(trials):
                self._queue.append({"name": f"{task}-ridge-{init}", "cell": -1, "ridge": indices})

    def _queue_search(self, index: int) -> None:
        cell = self.cells[index]
        self.total += len(cell.search)
        missing = self._missing(list(cell.search))
        self._searching[index] = {trial.digest for trial in missing}
        self._queue.extend(_job(index, trial) for trial in missing)
        if not missing:
            self._search_over(index)

    def _release(self, index: int) -> bool:
        """Queue the missing final trials of a cell that has its selection record; False if it has none yet."""
        cell = self.cells[index]
        url = cell.selection_url(self.sweep.out)
        if not storage.exists(url):
            return False
        missing = self._missing(cell.finals(read_selection(url).hyperparameters, self.sweep.suite.num_seeds))
        self._queue.extendleft(_job(index, trial) for trial in reversed(missing))
        return True

    # --- what happened ------------------------------------------------------------------------------------------------

    def reported(self, job_id: str, job: Job, row: dict[str, Any]) -> None:
        """A row of a running job: `digest` of a finished ridge trial, or step, time_s, loss, accuracy of a search
        trial."""
        if job["cell"] < 0:
            found = self.ledger.find(str(row.get("digest")))
            if found is not None:
                self._over(found)
        elif "accuracy" in row:
            rows = self._rows.setdefault(job_id, [])
            if not rows or rows[-1]["step"] < row["step"]:  # Tune repeats a trial's last row at its end
                rows.append({k: row[k] for k in ("step", "time_s", "loss", "accuracy")})

    def ended(self, job_id: str, job: Job, *, crashed: bool) -> None:
        """A job is over: by itself, stopped at a rung, or with its process gone. Each of its trials gets its entry."""
        rows, began_s = self._rows.pop(job_id, []), self._began_s.pop(job_id)
        for trial in self._trials(job):
            found = self.ledger.find(trial.digest)
            if found is not None:
                self._over(found)
            elif rows and not crashed:
                self._over(self._stopped(trial, rows, time.time() - began_s), write=True)
            else:
                error = "its process died (killed, or out of memory)" if crashed else "it ended without a result"
                self._over(self.sweep.failed(trial, error), write=True)
        searching = self._searching.get(job["cell"])
        if searching:
            searching.difference_update(trial.digest for trial in self._trials(job))
            if not searching:
                self._search_over(job["cell"])

    def _stopped(self, trial: Trial, rows: list[dict[str, float]], seconds_s: float) -> Entry:
        task = self.sweep.task(trial.task)
        num_test = task.num_classes * task.holdout_per_class
        return finetune_entry(
            self.sweep, trial, rows, value=rows[-1]["accuracy"], num_test=num_test, seconds_s=seconds_s
        )

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
        self._tell(
            {
                "event": "selected",
                "task": cell.task,
                "method": cell.method,
                "init": cell.init,
                "shots": cell.shots,
                "url": url,
            }
        )
        self._release(index)

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
        event = {"event": "trial", "done": self.done, "total": self.total}
        self._tell({**event, "entry": asdict(found), "best": self._best.get(key)})


def _job(index: int, trial: Trial) -> Job:
    return {"name": "-".join(map(str, trial.cell)), "cell": index, "trial": asdict(trial)}
