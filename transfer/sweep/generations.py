"""Generations of a cell whose points a model proposes (`transfer.search.optuna_search`): taken up where written, or asked."""

from __future__ import annotations

from typing import Any

from transfer.search.optuna_search import next_generation, written
from transfer.sweep.cells import Cell
from transfer.sweep.ledger import Ledger


def taken_up(cell: Cell, ledger: Ledger) -> tuple[Cell, set[str]]:
    """The cell with the points that an earlier start asked for, and the digests of those whose results are settled.

    A trial that failed is run again by the next start, unless a later generation follows from its failure.
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


def _rows(cell: Cell, ledger: Ledger) -> list[dict[str, Any]]:
    rows = []
    for trial in cell.search:
        found = ledger.find(trial.digest)
        score = found.value if found is not None and found.is_ok else None
        rows.append({"hyperparameters": trial.hyperparameters, "digest": trial.digest, "score": score})
    return rows
