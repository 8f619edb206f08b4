"""A laboratory's table: means over seeds with their standard errors, line by line, from the sweep's ledger."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from transfer.lab.build import Line
from transfer.sweep.cells import Sweep
from transfer.sweep.entry import LedgerEntry
from transfer.sweep.ledger import Ledger


@dataclass(frozen=True)
class Mean:
    """Over seeds."""

    value: float
    error: float
    """Standard error of the mean; 0 for one seed, which says nothing about it."""
    n: int


@dataclass(frozen=True, kw_only=True)
class LabRow:
    line: Line
    entries: list[LedgerEntry] = field(default_factory=list)
    """Final trials by seed."""
    searched: list[LedgerEntry] = field(default_factory=list)
    """Of the rates to choose from."""

    @property
    def good(self) -> list[LedgerEntry]:
        return [e for e in self.entries if e.is_ok]

    @property
    def num_diverged(self) -> int:
        return sum(e.cause == "diverged" for e in self.entries)

    @property
    def rate(self) -> float | None:
        """Used by the final trials."""
        return next((float(e.hyperparameters["learning_rate"]) for e in self.entries), self.line.rate)

    def mean(self, statistic: str) -> Mean | None:
        """Of a statistic of `transfer.lab.experiment.Comparison`, or a measure; None where no seed has it."""
        if statistic == "finishes":
            done = [e for e in self.entries if e.is_ok or e.cause == "diverged"]
            return mean_of([float(e.is_ok) for e in done])
        found = [_value(e, statistic) for e in self.good]
        return mean_of([v for v in found if v is not None])


def _value(entry: LedgerEntry, statistic: str) -> float | None:
    if statistic == "accuracy":
        return entry.value
    if statistic == "mode_gap":
        one, other = entry.measures.get("eval_mode"), entry.measures.get("train_mode")
        return one - other if isinstance(one, float) and isinstance(other, float) else None
    value = entry.measures.get(statistic)
    if isinstance(value, list):  # by block
        return statistics.fmean(value) if value else None
    return float(value) if isinstance(value, float | int) else None


def mean_of(values: Sequence[float]) -> Mean | None:
    if not values:
        return None
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return Mean(statistics.fmean(values), error, len(values))


def lab_rows(sweep: Sweep, lines: Sequence[Line]) -> list[LabRow]:
    """A row for each line, whatever of it is done."""
    entries = list(Ledger(sweep.out).entries())
    found = []
    for line in lines:
        mine = [e for e in entries if e.method == line.recipe and e.backbone == line.network]
        finals = sorted((e for e in mine if e.kind == "final"), key=lambda e: e.seed)
        found.append(LabRow(line=line, entries=finals, searched=[e for e in mine if e.kind == "search"]))
    return found
