"""Which trial of a sweep is next, and what follows from one that is over. Knows the ledger, and no scheduler.

    probe jobs; search trials, rung by rung, or generation by generation where a model asks for them
    -> a cell's selection record, once its search is over -> its final trials, at the queue's head

A job is a plain dict, so that it travels: `name`, `cell` (index of the cell; -1 for a probe job), and `probes` (indices of
the cells that a probe job serves) or `trial` (fields of the Trial) and `until` (the rung to run to; 0 = its end).
"""

import dataclasses
import json
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass, replace
from typing import Any, cast

from pipeline.storage import objects
from transfer.search.successive_halving import read_rung
from transfer.sweep.cells import Cell, Sweep
from transfer.sweep.choices import choose_by_rank
from transfer.sweep.entry import LedgerEntry, Trial
from transfer.sweep.failures import MAX_TRIES, Cause
from transfer.sweep.probe_job import probe_trials
from transfer.sweep.searches import Book, OnEvent, Searches

Job = dict[str, Any]
TELL_EVERY_S = 15.0


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What one call may spend; what is left undone then is done by the next. 0 = no limit."""

    trials: int = 0
    images: int = 0
    seconds_s: float = 0.0


class Conductor(Book):
    """The queue of one sweep.

    Tells its listener, as plain dicts:
        {"event": "trial", "done": int, "total": int, "entry": fields of the Entry, "best": highest final value of that task
         and method so far, or None}
        {"event": "selected", "task", "method", "init", "shots", "url"}
        {"event": "decided", "cell", "step", "kept", "of"}
        {"event": "asked", "cell", "num", "done", "of"}: so many trials by a model that knows of so many
        {"event": "again", "name", "tries", "why"}: a job whose process was lost is queued once more
        {"event": "budget", "reason"}
    """

    def __init__(
        self, sweep: Sweep, cells: list[Cell], tell: OnEvent, *, budget: Budget | None = None, limit_s: float = 0.0
    ) -> None:
        super().__init__(sweep, cells, tell)
        self.budget, self.limit_s = budget or Budget(), limit_s
        self.num_died = 0
        """Processes that ended before their job."""
        self.spent = ""
        """Why nothing more is started, once a budget is spent."""
        self._queue: deque[Job] = deque()
        self._rows: dict[str, list[dict[str, float]]] = {}
        self._names: dict[str, str] = {}
        self._told_s, self._teller = float("-inf"), cast(threading.Thread | None, None)
        self._began_s: dict[str, float] = {}
        self._set_back_s: dict[str, float] = {}
        """When the clock of the time limit was: at each trial of a probe job."""
        self._start_s = time.monotonic()
        self._tries: Counter[str] = Counter()
        """Of each job that has been lost, by what it runs."""
        self._searches = Searches(self, self._enqueue, self._release)
        self._queue_probes()
        for index, cell in enumerate(cells):
            if not cell.is_probe:
                self.total += cell.num_finals(sweep.suite.num_seeds) + cell.num_search
                if not cell.num_search and not self._is_selected(index):
                    cell.select(sweep.out, dict(cell.points[0]), [], "nothing was searched: the recipe has one point")
                if self._release(index):
                    self.done += cell.num_search  # over, however each of them ended
                else:
                    self._searches.begin(index)

    # --- what is next -------------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether anything is queued or, once running searches are over, will be."""
        return bool(self._queue) or self._searches.is_waiting

    def next_job(self, job_id: str) -> Job | None:
        """None: nothing to start now. The failed entries of an earlier start make room for new ones."""
        if self._queue and not self.spent:
            self.spent = self._over_budget()
            if self.spent:
                self.tell({"event": "budget", "reason": self.spent})
        if not self._queue or self.spent:
            return None
        job = self._queue.popleft()
        for trial in self._trials(job):
            if not self.ledger.is_done(trial):
                self.ledger.remove(trial.digest)
        self._began_s[job_id] = self._set_back_s[job_id] = time.time()
        self._names[job_id] = job["name"]
        self._tell_running()
        return job

    def _tell_running(self) -> None:
        """For whoever looks into the folder: now and then, and on a thread, for a store takes its time."""
        is_told = self._teller is None or not self._teller.is_alive()
        if is_told and time.monotonic() - self._told_s >= TELL_EVERY_S:
            self._told_s = time.monotonic()
            rows = [{"name": self._names[i], "since_s": s} for i, s in self._began_s.items()]
            self._teller = threading.Thread(target=self.ledger.tell_running, args=(rows,), daemon=True)
            self._teller.start()

    def _over_budget(self) -> str:
        """Which budget is spent; "" = none."""
        limit = self.budget
        if limit.trials and self.num_run + len(self._began_s) >= limit.trials:
            return f"{limit.trials} trials"
        if limit.images and self.images >= limit.images:
            return f"{limit.images:,} images"
        if limit.seconds_s and time.monotonic() - self._start_s >= limit.seconds_s:
            return f"{limit.seconds_s / 3600:g} hours"
        return ""

    def _trials(self, job: Job) -> list[Trial]:
        if job["cell"] >= 0:
            return [Trial(**job["trial"])]
        return [trial for index in job["probes"] for trial in probe_trials(self.sweep, self.cells[index])]

    def _enqueue(self, index: int, trial: Trial, until: int = 0) -> None:
        self._queue.append(_job(index, trial, until))

    def _release(self, index: int) -> bool:
        """Queue the missing final trials of a cell that has its selection record; False if it has none yet."""
        cell = self.cells[index]
        if not self._is_selected(index):
            return False
        missing = self.missing(cell.finals(cell.selected(self.sweep.out), self.sweep.suite.num_seeds))
        self._queue.extendleft(_job(index, trial) for trial in reversed(missing))
        return True

    # --- probes -------------------------------------------------------------------------------------------------------

    def _queue_probes(self) -> None:
        groups: dict[tuple[Any, ...], list[int]] = {}
        for index, cell in enumerate(self.cells):
            if cell.is_probe:
                groups.setdefault((cell.task, cell.init, cell.backbone), []).append(index)
                self.total += len(cell.search) + cell.num_finals(self.sweep.suite.num_seeds)
        for (task, init, _), indices in groups.items():
            open_ended = any(not self._is_selected(i) for i in indices if self.cells[i].search)
            trials = [trial for index in indices for trial in probe_trials(self.sweep, self.cells[index])]
            if self.missing(trials) or open_ended:
                self._queue.append({"name": f"{task}-probes-{init}", "cell": -1, "probes": indices})
        self._rank_select()

    def _is_selected(self, index: int) -> bool:
        return objects.exists(self.cells[index].selection_url(self.sweep.out))

    def _rank_select(self) -> None:
        """Penalties that are chosen over all tasks of a number of shots, once the search of each is over."""
        groups: dict[tuple[Any, ...], list[int]] = {}
        for index, cell in enumerate(self.cells):
            if cell.kind == "ridge_selected":
                groups.setdefault((cell.method, cell.init, cell.shots, cell.backbone), []).append(index)
        for indices in groups.values():
            if all(map(self._is_selected, indices)):
                continue
            found = [self.ledger.find(self.cells[i].search[0].digest) for i in indices]
            good = [e for e in found if e is not None and e.is_ok]
            if None not in found and len(good) < len(found):
                for index in indices:
                    why = "its penalty is chosen over all tasks, and the search failed on one of them"
                    self.no_finals(self.cells[index], why)
            if len(good) < len(found):
                continue
            cells = [self.cells[i] for i in indices]
            for index, cell, url in zip(indices, cells, choose_by_rank(cells, good, self.sweep.out), strict=True):
                self.tell_selected(cell, url)
                self._queue.append({"name": f"{cell.task}-probes-{cell.init}", "cell": -1, "probes": [index]})

    # --- what happened ------------------------------------------------------------------------------------------------

    def reported(self, job_id: str, job: Job, row: dict[str, Any]) -> None:
        """A row of a running job: `digest` of a finished probe trial, or step, time_s, loss, accuracy of a search trial."""
        if job["cell"] < 0:
            self._set_back_s[job_id] = time.time()
            found = self.ledger.find(str(row["digest"])) if row.get("digest") else None
            if found is not None and found.cause != "lost":
                self._over(found, job)
        elif "accuracy" in row:
            rows = self._rows.setdefault(job_id, [])
            if not rows or rows[-1]["step"] < row["step"]:  # Tune repeats a trial's last row at its end
                rows.append({k: row[k] for k in ("step", "time_s", "loss", "accuracy")})

    def ended(self, job_id: str, job: Job, *, crashed: bool) -> None:
        """A job is over: by itself, at its rung, stopped by ASHA, or with its process gone. Each of its trials that ended gets
        its entry; if one was lost, the job is queued once more, up to `MAX_TRIES` times."""
        rows, until = self._rows.pop(job_id, []), int(job.get("until", 0))
        seconds_s = time.time() - self._began_s.pop(job_id)
        self._names.pop(job_id, None)
        self._tell_running()
        cause, why = self._why(crashed, time.time() - self._set_back_s.pop(job_id))
        self.num_died += crashed
        may_repeat, lost = self._tries[_key(job)] + 1 < MAX_TRIES, ""
        for trial in self._trials(job):
            found = self.ledger.find(trial.digest)
            if found is None and until and read_rung(self.sweep.out, trial.digest, until) is not None:
                continue  # it stands at its rung
            if found is None and rows and not crashed and not until:
                self.stopped(trial, rows, seconds_s)
                continue
            found = found or self.sweep.failed(trial, why, cause)
            if found.cause == "lost" and may_repeat:
                lost = found.error or why
            else:
                self._over(found, job)
        if lost:
            self._tries[_key(job)] += 1
            self._queue.append(job)  # behind all others: what took the memory may be gone by then
            self.tell({"event": "again", "name": job["name"], "tries": self._tries[_key(job)], "why": lost})
        elif job["cell"] < 0:
            self._fail_unsearched(job, why)
            self._rank_select()
        else:
            self._searches.ended(job["cell"], Trial(**job["trial"]))

    def _over(self, found: LedgerEntry, job: Job) -> None:
        """Write the entry, unless a worker has, with what it does not know."""
        num_tries = self._tries[_key(job)] + 1
        is_new = self.ledger.find(found.digest) is None
        self.over(replace(found, num_tries=num_tries), write=is_new or found.num_tries != num_tries)

    def _fail_unsearched(self, job: Job, why: str) -> None:
        """Finals of probes whose search failed: they will not be run."""
        for index in job["probes"]:
            cell = self.cells[index]
            if not cell.search:
                continue
            if self._is_selected(index):
                for trial in cell.finals({}, self.sweep.suite.num_seeds):
                    self.ledger.remove(trial.digest)
                continue
            searched = self.ledger.find(cell.search[0].digest)
            if searched is None or not searched.is_ok:
                self.no_finals(cell, (searched.error if searched else None) or why)

    def _why(self, crashed: bool, seconds_s: float) -> tuple[Cause, str]:
        if not crashed:
            return "error", "it ended without a result"
        if self.limit_s and seconds_s >= self.limit_s:
            return "time_limit", f"it was not done after {self.limit_s:.0f} s (--trial-limit) and was ended"
        return "lost", "its process died (killed, or out of memory)"


def _key(job: Job) -> str:
    return json.dumps(job, sort_keys=True)


def _job(index: int, trial: Trial, until: int = 0) -> Job:
    name = "-".join(map(str, (trial.task, trial.method, trial.init, trial.shots)))
    return {"name": name, "cell": index, "trial": dataclasses.asdict(trial), "until": until}
