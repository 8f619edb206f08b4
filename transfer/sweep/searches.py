"""The searches of a sweep's cells: rung by rung, or by generations, until each cell selects; and the count of what is done."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from pipeline.storage import objects
from transfer.search.grids import Bracket, brackets
from transfer.search.successive_halving import Rung, decide, decision_url, read_rung, remove_work
from transfer.sweep.cells import Cell, Sweep
from transfer.sweep.choices import NothingChosen, asked, choose, taken_up
from transfer.sweep.entry import LedgerEntry, Trial
from transfer.sweep.failures import Cause
from transfer.sweep.ledger import Ledger
from transfer.sweep.trials import finetune_entry

OnEvent = Callable[[dict[str, Any]], None]


class Book:
    """What is done, what is to be done, and who is told."""

    def __init__(self, sweep: Sweep, cells: list[Cell], tell: OnEvent) -> None:
        self.sweep, self.cells, self.ledger = sweep, list(cells), Ledger(sweep.out)
        self.num_run = self.num_failed = self.done = self.total = 0
        self.images = 0
        """Seen by trials that ended in this start."""
        self.tell = tell
        self.settled: set[str] = set()
        """Digests of trials that are counted as done."""
        self.lack_results: set[str] = set()
        """Of those that ended in this start without a result."""
        self._best: dict[tuple[str, str], float] = {}

    def missing(self, trials: Sequence[Trial]) -> list[Trial]:
        """Those that are not done; the others are counted."""
        missing = [t for t in trials if not self.ledger.is_done(t)]
        self.done += len(trials) - len(missing)
        self.settled |= {t.digest for t in trials} - {t.digest for t in missing}
        return missing

    def over(self, found: LedgerEntry, *, write: bool = False) -> None:
        """A trial has its entry."""
        if write:
            self.ledger.write(found)
        if found.digest in self.settled:
            return
        self.settled.add(found.digest)
        if found.lacks_result:
            self.lack_results.add(found.digest)
        self.num_run += 1
        self.done += 1
        self.images += found.images_seen
        self.num_failed += found.status == "failed"
        key = (found.task, found.method)
        if found.kind == "final" and found.value is not None:
            self._best[key] = max(found.value, self._best.get(key, 0.0))
        event = {"event": "trial", "done": self.done, "total": self.total}
        self.tell({**event, "entry": asdict(found), "best": self._best.get(key)})

    def tell_selected(self, cell: Cell, url: str) -> None:
        facts = {"task": cell.task, "method": cell.method, "init": cell.init, "shots": cell.shots}
        self.tell({"event": "selected", **facts, "url": url})

    def no_finals(self, cell: Cell, why: str, cause: Cause = "search") -> None:
        """Entries in the place of a cell's final trials, which wait for its search."""
        for trial in self.missing(cell.finals({}, self.sweep.suite.num_seeds)):
            self.over(self.sweep.failed(trial, why, cause), write=True)

    def stopped(self, trial: Trial, rows: list[dict[str, float]], seconds_s: float) -> None:
        """The entry of a candidate that its search has stopped early."""
        task, method = self.sweep.task(trial.task), self.sweep.suite.method(trial.method)
        found = finetune_entry(
            self.sweep,
            trial,
            rows,
            value=rows[-1]["accuracy"],
            num_test=task.parts(method.settings, trial.shots, 0).holdout.num,
            seconds_s=seconds_s,
            stopped_at=int(rows[-1]["step"]),
        )
        self.over(found, write=True)
        remove_work(self.sweep.out, trial.digest)


class Searches:
    """Of all fine-tuning cells that have something to choose.

    Args:
        enqueue: takes (cell, trial, rung to run to; 0 = its end).
        selected: is called when a cell has its record.
    """

    def __init__(
        self, book: Book, enqueue: Callable[[int, Trial, int], None], selected: Callable[[int], object]
    ) -> None:
        self._book, self._enqueue, self._selected = book, enqueue, selected
        self._sweep, self._ledger, self._cells = book.sweep, book.ledger, book.cells
        self._brackets: dict[int, list[Bracket]] = {}
        """Of each cell that searches."""
        self._waiting: dict[int, set[str]] = {}
        """Of each of them, digests of trials that are queued or run."""

    @property
    def is_waiting(self) -> bool:
        return any(self._waiting.values())

    def begin(self, index: int) -> None:
        cell = self._cells[index]
        self._waiting[index] = set()
        if cell.space is not None:
            self._brackets[index] = []
            self._cells[index], settled = taken_up(cell, self._ledger)
            self._book.settled |= settled
            self._count(self._cells[index].search)
        else:
            self._brackets[index] = brackets(cell.points, self._sweep.scheduler)
            self._book.missing(list(cell.search))
        self._advance(index)

    def _advance(self, index: int) -> None:
        """Queue what a cell's search can do next; select when there is nothing left of it.

        Where a candidate has no result, nothing more is decided: by the others alone it would be another decision.
        """
        if self._book.lack_results.isdisjoint(trial.digest for trial in self._cells[index].search):
            if self._cells[index].space is not None:
                self._advance_generation(index)
            for number, bracket in enumerate(self._brackets[index]):
                self._advance_bracket(index, number, bracket)
        if not self._waiting[index]:
            del self._brackets[index]
            self._search_over(index)

    def _advance_generation(self, index: int) -> None:
        """Run what has been asked for; once all of it is over, ask again."""
        while True:
            cell = self._cells[index]
            self._run(index, [i for i, trial in enumerate(cell.search) if self._is_open(trial)], 0)
            if self._waiting[index] or len(cell.search) >= cell.num_search:
                return
            self._cells[index] = asked(cell, self._ledger)
            new = self._cells[index].search[len(cell.search) :]
            self._book.tell(
                {"event": "asked", "cell": cell.name, "num": len(new), "done": len(cell.search), "of": cell.num_search}
            )
            self._count(new)

    def _count(self, trials: Sequence[Trial]) -> None:
        """Candidates that a model asked for: those of an earlier start are done, and so is what it asks for twice."""
        new = {t.digest: t for t in trials if t.digest not in self._book.settled}
        self._book.done += len(trials) - len(new)
        self._book.missing(list(new.values()))

    def _advance_bracket(self, index: int, number: int, bracket: Bracket) -> None:
        cell, out = self._cells[index], self._sweep.out
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
            decision = decide(out, cell.name, number, step, self._sweep.scheduler, here)
            for i in alive:
                if i not in decision.kept:
                    self._stop(cell.search[i], read_rung(out, cell.search[i].digest, step))
            if is_new:
                kept = {"kept": len(decision.kept), "of": len(alive)}
                self._book.tell({"event": "decided", "cell": cell.name, "step": step, **kept})
            alive = decision.kept
        self._run(index, [i for i in alive if self._is_open(cell.search[i])], 0)

    def _decision(self, cell: Cell, number: int, step: int) -> str:
        return decision_url(self._sweep.out, cell.name, number, step)

    def _stands(self, trial: Trial, step: int) -> Rung | str:
        """Where a candidate stands at a rung: its record, "failed", or "missing"."""
        found = read_rung(self._sweep.out, trial.digest, step)
        if found is not None:
            return found
        return "failed" if trial.digest in self._book.settled else "missing"

    def _is_open(self, trial: Trial) -> bool:
        return trial.digest not in self._book.settled and not self._ledger.is_done(trial)

    def _run(self, index: int, candidates: list[int], until: int) -> None:
        for i in candidates:
            trial = self._cells[index].search[i]
            if trial.digest not in self._waiting[index]:
                self._waiting[index].add(trial.digest)
                self._enqueue(index, trial, until)

    def _stop(self, trial: Trial, rung: Rung | None) -> None:
        """The entry of a candidate that did not go on from a rung."""
        if trial.digest in self._book.settled:
            return
        if rung is None:  # it had failed before the decision, which stands
            self._book.settled.add(trial.digest)
            self._book.done += 1
            return
        self._book.stopped(trial, rung.rows, rung.seconds_s)

    def ended(self, index: int, trial: Trial) -> None:
        """A job of a cell is over."""
        if index not in self._brackets:  # of a final trial
            return
        self._waiting[index].discard(trial.digest)
        self._advance(index)

    def _search_over(self, index: int) -> None:
        cell = self._cells[index]
        try:
            url = choose(cell, self._ledger)
        except NothingChosen as error:
            self._book.no_finals(cell, str(error), error.cause)
            return
        for trial in cell.finals({}, self._sweep.suite.num_seeds):  # what an earlier start wrote in their place
            self._ledger.remove(trial.digest)
        self._book.tell_selected(cell, url)
        self._selected(index)
