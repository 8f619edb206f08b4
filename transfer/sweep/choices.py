"""What follows from the results of a search: the point that a cell uses, or the points that a model asks for next."""

from collections.abc import Sequence
from typing import Any

from transfer.probes.ridge import rank_selected
from transfer.protocol.sealed_splits import Candidate, GridRow
from transfer.search.optuna_search import Row, next_generation, written
from transfer.sweep.cells import Cell
from transfer.sweep.entry import LedgerEntry, Trial
from transfer.sweep.failures import Cause
from transfer.sweep.ledger import Ledger


class NothingChosen(Exception):
    """Why a search that is over selects nothing; `cause` is that of the final trials that are not run for it."""

    def __init__(self, message: str, cause: Cause = "search") -> None:
        super().__init__(message)
        self.cause: Cause = cause


def choose(cell: Cell, ledger: Ledger) -> str:
    """Select among the search trials in the ledger and write the record; its URL.

    The highest value on the held-out part wins, then the lowest loss. A candidate that the scheduler stopped early is listed
    with what it had reached, and is not chosen: its number belongs to an unfinished schedule.

    Raises:
        NothingChosen: none ran to its end. Or one has no result: its process died, or it is not in the ledger. It may have been
            the best one, and among the others another one would win.
    """
    found: list[tuple[Trial, LedgerEntry]] = []
    for trial in cell.search:
        entry = ledger.find(trial.digest)
        if entry is None or entry.lacks_result:
            why = entry.error if entry is not None else "it was not run"
            point = ", ".join(f"{name} {value:g}" for name, value in trial.hyperparameters.items())
            raise NothingChosen(
                f"nothing was selected, for the candidate of {point} has no result ({why}); the same command runs it again"
            )
        found.append((trial, entry))
    whole = [(t, e) for t, e in found if e.is_ok and _last(e)[0] == t.hyperparameters["num_steps"]]
    if not whole:
        if all(entry.cause == "diverged" for _, entry in found):
            raise NothingChosen("every candidate of the search diverged", "diverged")
        raise NothingChosen("no candidate of the search ran to its end")
    best, _ = min(whole, key=lambda one: (-(one[1].value or 0.0), _last(one[1])[1]))
    return cell.select(ledger.sweep, best.hyperparameters, [_candidate(*one) for one in found])


def choose_point(cell: Cell, found: LedgerEntry, sweep: str) -> str:
    """The record of a probe from its search trial: the first of the best points."""
    best = max(found.grid, key=lambda row: row["score"])
    rule = f"highest {found.metric} on the held-out part, the first of equals"
    return cell.select(sweep, best["hyperparameters"], of_grid(found.grid, found.digest), rule)


def choose_by_rank(cells: Sequence[Cell], found: Sequence[LedgerEntry], sweep: str) -> list[str]:
    """One penalty for several tasks at one number of shots: the best mean rank (`transfer.probes.ridge.rank_selected`)."""
    l2s = [float(p["l2"]) for p in cells[0].points]
    l2 = rank_selected({e.task: [row["score"] for row in e.grid] for e in found}, l2s)
    rule = f"best mean rank over {', '.join(sorted(e.task for e in found))}, by the metric on the held-out part"
    return [
        cell.select(sweep, {"l2": l2}, of_grid(own.grid, own.digest), rule)
        for cell, own in zip(cells, found, strict=True)
    ]


def of_grid(grid: Sequence[GridRow], digest: str) -> list[Candidate]:
    """The candidates of a probe's search trial."""
    return [Candidate(**row, loss=None, step=0, status="ok", digest=digest) for row in grid]


def _candidate(trial: Trial, found: LedgerEntry) -> Candidate:
    step, loss = _last(found)
    return {
        "hyperparameters": trial.hyperparameters,
        "score": found.value,
        "loss": loss,
        "step": step,
        "status": found.status,
        "digest": trial.digest,
    }


def _last(found: LedgerEntry) -> tuple[int, Any]:
    """Step and loss of the last row of its history."""
    return (int(found.history[-1]["step"]), found.history[-1]["loss"]) if found.history else (0, None)


# --- points that a model asks for -------------------------------------------------------------------------------------


def taken_up(cell: Cell, ledger: Ledger) -> tuple[Cell, set[str]]:
    """The cell with the points that an earlier start asked for, and the digests of those whose results are settled.

    A trial that failed without a result is run again by the next start, unless a later generation follows from its failure.
    """
    generations = written(ledger.sweep, cell.name)
    for generation in generations:
        cell = cell.with_points(generation.points)
    followed = {row["digest"] for row in generations[-1].rows} if generations else set()
    return cell, {digest for digest in followed if ledger.find(digest) is not None}


def asked(cell: Cell, ledger: Ledger) -> Cell:
    """The cell with one more generation, asked from the results of all its trials so far, which are over."""
    assert cell.space is not None
    number = len(cell.points) // cell.space.search.num_parallel
    return cell.with_points(next_generation(ledger.sweep, cell.name, cell.space, number, _rows(cell, ledger)).points)


def _rows(cell: Cell, ledger: Ledger) -> list[Row]:
    rows: list[Row] = []
    for trial in cell.search:
        found = ledger.find(trial.digest)
        score = found.value if found is not None and found.is_ok else None
        rows.append({"hyperparameters": trial.hyperparameters, "digest": trial.digest, "score": score})
    return rows
