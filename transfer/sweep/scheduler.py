"""Which trial of a sweep is next, and what follows from one that is over. Knows the ledger, and no scheduler.

    probe jobs; search trials, rung by rung, or generation by generation where a model asks for them
    -> a cell's selection record, once its search is over -> its final trials, at the queue's head

A job is a plain dict, so that it travels: `name`, `cell` (index of the cell; -1 for a probe job), and `probes` (indices of
the cells that a probe job serves) or `trial` (fields of the Trial) and `until` (the rung to run to; 0 = its end).
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.storage import objects
from transfer.protocol.sealed_splits import read_selection
from transfer.search.grids import Bracket, brackets
from transfer.search.successive_halving import Rung, decide, decision_url, read_rung, work_url
from transfer.sweep.cells import Cell, Sweep, choose, choose_by_rank
from transfer.sweep.generations import asked, taken_up
from transfer.sweep.ledger import Entry, Ledger, Trial
from transfer.sweep.trials import finetune_entry, probe_trials

Job = dict[str, Any]
OnEvent = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What one call may spend; what is left undone then is done by the next. 0 = no limit."""

    trials: int = 0
    images: int = 0
    seconds_s: float = 0.0


class Conductor:
    """The queue of one sweep.

    Tells its listener, as plain dicts:
        {"event": "trial", "done": int, "total": int, "entry": fields of the Entry, "best": highest final value of that task
         and method so far, or None}
        {"event": "selected", "task", "method", "init", "shots", "url"}
        {"event": "decided", "cell", "step", "kept", "of"}
        {"event": "asked", "cell", "num", "done", "of"}: so many trials by a model that knows of so many
        {"event": "budget", "reason"}
    """

    def __init__(
        self, sweep: Sweep, cells: list[Cell], tell: OnEvent, *, budget: Budget | None = None, limit_s: float = 0.0
    ) -> None:
        self.sweep, self.cells, self.ledger = sweep, list(cells), Ledger(sweep.out)
        self.num_run = self.num_failed = self.num_died = self.done = self.total = 0
        self.budget, self.limit_s = budget or Budget(), limit_s
        self.spent = ""
        """Why nothing more is started, once a budget is spent."""
        self._tell = tell
        self._queue: deque[Job] = deque()
        self._rows: dict[str, list[dict[str, float]]] = {}
        self._began_s: dict[str, float] = {}
        self._start_s = time.monotonic()
        self._images = 0
        self._searching: dict[int, list[Bracket]] = {}
        self._waiting: dict[int, set[str]] = {}
        """Of each cell that searches, digests of trials that are queued or run."""
        self._told: set[str] = set()
        self._best: dict[tuple[str, str], float] = {}
        self._queue_probes()
        for index, cell in enumerate(cells):
            if not cell.is_probe:
                self.total += sweep.suite.num_seeds + cell.num_search
                if not cell.num_search and not self._is_selected(index):
                    cell.select(sweep.out, dict(cell.points[0]), [], "nothing was searched: the recipe has one point")
                if self._release(index):
                    self.done += cell.num_search  # over, however each of them ended
                else:
                    self._begin_search(index)

    # --- what is next -------------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether anything is queued or, once running searches are over, will be."""
        return bool(self._queue) or any(self._waiting.values())

    def next_job(self, job_id: str) -> Job | None:
        """None: nothing to start now. The failed entries of an earlier start make room for new ones."""
        if self._queue and not self.spent:
            self.spent = self._over_budget()
            if self.spent:
                self._tell({"event": "budget", "reason": self.spent})
        if not self._queue or self.spent:
            return None
        job = self._queue.popleft()
        for trial in self._trials(job):
            if not self.ledger.is_done(trial):
                self.ledger.remove(trial.digest)
        self._began_s[job_id] = time.time()
        return job

    def _over_budget(self) -> str:
        """Which budget is spent; "" = none."""
        limit = self.budget
        if limit.trials and self.num_run + len(self._began_s) >= limit.trials:
            return f"{limit.trials} trials"
        if limit.images and self._images >= limit.images:
            return f"{limit.images:,} images"
        if limit.seconds_s and time.monotonic() - self._start_s >= limit.seconds_s:
            return f"{limit.seconds_s / 3600:g} hours"
        return ""

    def _trials(self, job: Job) -> list[Trial]:
        if job["cell"] >= 0:
            return [Trial(**job["trial"])]
        return [trial for index in job["probes"] for trial in probe_trials(self.sweep, self.cells[index])]

    def _missing(self, trials: list[Trial]) -> list[Trial]:
        missing = [t for t in trials if not self.ledger.is_done(t)]
        self.done += len(trials) - len(missing)
        self._told |= {t.digest for t in trials} - {t.digest for t in missing}
        return missing

    # --- probes -------------------------------------------------------------------------------------------------------

    def _queue_probes(self) -> None:
        groups: dict[tuple[Any, ...], list[int]] = {}
        for index, cell in enumerate(self.cells):
            if cell.is_probe:
                groups.setdefault((cell.task, cell.init, cell.backbone), []).append(index)
                self.total += len(cell.search) + self.sweep.suite.num_seeds
        for (task, init, _), indices in groups.items():
            open_ended = any(not self._is_selected(i) for i in indices if self.cells[i].search)
            trials = [trial for index in indices for trial in probe_trials(self.sweep, self.cells[index])]
            if self._missing(trials) or open_ended:
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
                    for trial in self.cells[index].finals({}, self.sweep.suite.num_seeds):
                        why = "its penalty is chosen over all tasks, and the search failed on one of them"
                        self._over(self.sweep.failed(trial, why), write=True)
            if len(good) < len(found):
                continue
            for index, url in zip(
                indices, choose_by_rank([self.cells[i] for i in indices], good, self.sweep.out), strict=True
            ):
                self._tell_selected(self.cells[index], url)
            for index in indices:
                cell = self.cells[index]
                self._queue.append({"name": f"{cell.task}-probes-{cell.init}", "cell": -1, "probes": [index]})

    # --- searches -----------------------------------------------------------------------------------------------------

    def _begin_search(self, index: int) -> None:
        cell = self.cells[index]
        self._waiting[index] = set()
        if cell.space is not None:
            self._searching[index] = []
            self.cells[index], settled = taken_up(cell, self.ledger)
            self._told |= settled
            self._count(self.cells[index].search)
        else:
            self._searching[index] = brackets(cell.points, self.sweep.scheduler)
            self._missing(list(cell.search))
        self._advance(index)

    def _advance(self, index: int) -> None:
        """Queue what a cell's search can do next; select when there is nothing left of it."""
        if self.cells[index].space is not None:
            self._advance_generation(index)
        for number, bracket in enumerate(self._searching[index]):
            self._advance_bracket(index, number, bracket)
        if not self._waiting[index]:
            del self._searching[index]
            self._search_over(index)

    def _advance_generation(self, index: int) -> None:
        """Run what has been asked for; once all of it is over, ask again."""
        while True:
            cell = self.cells[index]
            self._run(index, [i for i, trial in enumerate(cell.search) if self._is_open(trial)], 0)
            if self._waiting[index] or len(cell.search) >= cell.num_search:
                return
            self.cells[index] = asked(cell, self.ledger)
            new = self.cells[index].search[len(cell.search) :]
            self._tell(
                {"event": "asked", "cell": cell.name, "num": len(new), "done": len(cell.search), "of": cell.num_search}
            )
            self._count(new)

    def _count(self, trials: Sequence[Trial]) -> None:
        """Candidates that a model asked for: those of an earlier start are done, and so is what it asks for twice."""
        new = {t.digest: t for t in trials if t.digest not in self._told}
        self.done += len(trials) - len(new)
        self._missing(list(new.values()))

    def _advance_bracket(self, index: int, number: int, bracket: Bracket) -> None:
        cell, out = self.cells[index], self.sweep.out
        alive = list(bracket.members)
        for step in bracket.rungs:
            stood = {i: self._stands(cell.search[i], step) for i in alive}
            late = [i for i in alive if stood[i] == "missing"]
            if late and not objects.exists(self._decision(cell, number, step)):
                self._run(index, late, step)
                return
            here = {i: (cell.search[i].digest, r if isinstance(r := stood[i], Rung) else None) for i in alive}
            url = self._decision(cell, number, step)
            is_new = not objects.exists(url)
            decision = decide(out, cell.name, number, bracket, step, self.sweep.scheduler, here)
            for i in alive:
                if i not in decision.kept:
                    self._stop(cell.search[i], read_rung(out, cell.search[i].digest, step))
            if is_new:
                kept = {"kept": len(decision.kept), "of": len(alive)}
                self._tell({"event": "decided", "cell": cell.name, "step": step, **kept})
            alive = decision.kept
        self._run(index, [i for i in alive if self._is_open(cell.search[i])], 0)

    def _decision(self, cell: Cell, number: int, step: int) -> str:
        return decision_url(self.sweep.out, cell.name, number, step)

    def _stands(self, trial: Trial, step: int) -> Rung | str:
        """Where a candidate stands at a rung: its record, "failed", or "missing"."""
        found = read_rung(self.sweep.out, trial.digest, step)
        if found is not None:
            return found
        return "failed" if trial.digest in self._told else "missing"

    def _is_open(self, trial: Trial) -> bool:
        return trial.digest not in self._told and not self.ledger.is_done(trial)

    def _run(self, index: int, candidates: list[int], until: int) -> None:
        for i in candidates:
            trial = self.cells[index].search[i]
            if trial.digest not in self._waiting[index]:
                self._waiting[index].add(trial.digest)
                self._queue.append(_job(index, trial, until))

    def _stop(self, trial: Trial, rung: Rung | None) -> None:
        """The entry of a candidate that did not go on from a rung."""
        if trial.digest in self._told:
            return
        if rung is None:  # it had failed before the decision, which stands
            self._told.add(trial.digest)
            self.done += 1
            return
        self._over(self._stopped(trial, rung.rows, rung.seconds_s), write=True)
        objects.remove_tree(work_url(self.sweep.out, trial.digest))

    def _stopped(self, trial: Trial, rows: list[dict[str, float]], seconds_s: float) -> Entry:
        task, method = self.sweep.task(trial.task), self.sweep.suite.method(trial.method)
        num_test = task.parts(method.settings, trial.shots, 0).holdout.num
        return finetune_entry(
            self.sweep,
            trial,
            rows,
            value=rows[-1]["accuracy"],
            num_test=num_test,
            seconds_s=seconds_s,
            stopped_at=int(rows[-1]["step"]),
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
        self._tell_selected(cell, url)
        self._release(index)

    def _tell_selected(self, cell: Cell, url: str) -> None:
        facts = {"task": cell.task, "method": cell.method, "init": cell.init, "shots": cell.shots}
        self._tell({"event": "selected", **facts, "url": url})

    def _release(self, index: int) -> bool:
        """Queue the missing final trials of a cell that has its selection record; False if it has none yet."""
        cell = self.cells[index]
        url = cell.selection_url(self.sweep.out)
        if not objects.exists(url):
            return False
        missing = self._missing(cell.finals(read_selection(url).hyperparameters, self.sweep.suite.num_seeds))
        self._queue.extendleft(_job(index, trial) for trial in reversed(missing))
        return True

    # --- what happened ------------------------------------------------------------------------------------------------

    def reported(self, job_id: str, job: Job, row: dict[str, Any]) -> None:
        """A row of a running job: `digest` of a finished probe trial, or step, time_s, loss, accuracy of a search trial."""
        if job["cell"] < 0:
            found = self.ledger.find(str(row.get("digest")))
            if found is not None:
                self._over(found)
        elif "accuracy" in row:
            rows = self._rows.setdefault(job_id, [])
            if not rows or rows[-1]["step"] < row["step"]:  # Tune repeats a trial's last row at its end
                rows.append({k: row[k] for k in ("step", "time_s", "loss", "accuracy")})

    def ended(self, job_id: str, job: Job, *, crashed: bool) -> None:
        """A job is over: by itself, at its rung, stopped by ASHA, or with its process gone. Each of its trials that ended gets
        its entry."""
        rows, seconds_s = self._rows.pop(job_id, []), time.time() - self._began_s.pop(job_id)
        self.num_died += crashed
        until = int(job.get("until", 0))
        for trial in self._trials(job):
            found = self.ledger.find(trial.digest)
            if found is not None:
                self._over(found)
            elif until and not crashed and read_rung(self.sweep.out, trial.digest, until) is not None:
                pass  # it stands at its rung
            elif rows and not crashed and not until:
                self._over(self._stopped(trial, rows, seconds_s), write=True)
                objects.remove_tree(work_url(self.sweep.out, trial.digest))
            else:
                self._over(self.sweep.failed(trial, self._why(crashed, seconds_s)), write=True)
        if job["cell"] < 0:
            self._fail_unsearched(job, self._why(crashed, seconds_s))
            self._rank_select()
        elif job["cell"] in self._searching:
            self._waiting[job["cell"]].discard(str(Trial(**job["trial"]).digest))
            self._advance(job["cell"])

    def _fail_unsearched(self, job: Job, why: str) -> None:
        """Finals of probes whose search failed: they will not be run."""
        for index in job["probes"]:
            cell = self.cells[index]
            searched = self.ledger.find(cell.search[0].digest) if cell.search else None
            if not self._is_selected(index) and (searched is None or not searched.is_ok):
                for trial in cell.finals({}, self.sweep.suite.num_seeds) if cell.search else []:
                    self._over(self.sweep.failed(trial, (searched.error if searched else None) or why), write=True)
            elif cell.search and self._is_selected(index):
                for trial in cell.finals({}, self.sweep.suite.num_seeds):
                    self.ledger.remove(trial.digest)

    def _why(self, crashed: bool, seconds_s: float) -> str:
        if not crashed:
            return "it ended without a result"
        if self.limit_s and seconds_s >= self.limit_s:
            return f"it was not done after {self.limit_s:.0f} s (--trial-limit) and was ended"
        return "its process died (killed, or out of memory)"

    def _over(self, found: Entry, *, write: bool = False) -> None:
        if write:
            self.ledger.write(found)
        if found.digest in self._told:
            return
        self._told.add(found.digest)
        self.num_run += 1
        self.done += 1
        self._images += found.images_seen
        self.num_failed += found.status == "failed"
        key = (found.task, found.method)
        if found.kind == "final" and found.value is not None:
            self._best[key] = max(found.value, self._best.get(key, 0.0))
        event = {"event": "trial", "done": self.done, "total": self.total}
        self._tell({**event, "entry": asdict(found), "best": self._best.get(key)})


def _job(index: int, trial: Trial, until: int = 0) -> Job:
    name = "-".join(map(str, (trial.task, trial.method, trial.init, trial.shots)))
    return {"name": name, "cell": index, "trial": dataclasses.asdict(trial), "until": until}
