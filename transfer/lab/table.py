"""A laboratory's table: means over seeds with their standard errors, line by line, from the sweep's ledger."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from transfer.lab.build import Line
from transfer.measurement.downstream import PREFIX
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
class Largest:
    """What bisection knows of the largest stable rate (`transfer.lab.largest_rate`)."""

    stable: float | None
    """The largest seen stable; None: not even `low` is."""
    unstable: float | None
    """The smallest seen unstable; None: not even `high` is."""
    low: float
    high: float

    @property
    def text(self) -> str:
        if self.stable is None and self.unstable is None:
            return "–"
        if self.stable is None:
            return f"below {self.unstable:g}"
        return f"{self.stable:g} or more" if self.unstable is None else f"{self.stable:g} to {self.unstable:g}"


@dataclass(frozen=True, kw_only=True)
class LabRow:
    line: Line
    entries: list[LedgerEntry] = field(default_factory=list)
    """Final trials by seed."""
    searched: list[LedgerEntry] = field(default_factory=list)
    """Of the rates to choose from."""
    largest: Largest | None = None

    @property
    def good(self) -> list[LedgerEntry]:
        return [e for e in self.entries if e.is_ok]

    @property
    def num_diverged(self) -> int:
        return sum(e.cause == "diverged" for e in self.entries)

    @property
    def diverged_share(self) -> float:
        """Of the seeds that have a result; 0 where none has."""
        return self.num_diverged / max(1, len(self.entries) - self.lacking)

    @property
    def lacking(self) -> int:
        """Seeds whose trial says nothing about the line."""
        return sum(e.lacks_result for e in self.entries)

    @property
    def rate(self) -> float | None:
        """Used by the final trials."""
        used = (e.hyperparameters.get("learning_rate") for e in self.entries)  # none where every candidate diverged
        return next((float(rate) for rate in used if rate is not None), self.line.rate)

    def mean(self, statistic: str) -> Mean | None:
        """Of a statistic of `transfer.lab.experiment.Comparison`, or a measure; None where no seed has it."""
        if statistic in ("largest_rate", "unstable_rate"):
            bound = "stable" if statistic == "largest_rate" else "unstable"
            rate = getattr(self.largest, bound, None)  # of a line whose rates were not looked for, none
            return None if rate is None else Mean(rate, 0.0, 1)
        if statistic == "finishes":
            done = [e for e in self.entries if e.is_ok or e.cause == "diverged"]
            return mean_of([float(e.is_ok) for e in done])
        values = [_value(e, statistic) for e in self.good]
        return mean_of([v for v in values if v is not None])


def _value(entry: LedgerEntry, statistic: str) -> float | None:
    if statistic == "accuracy":
        return entry.value
    if statistic == "mode_gap":
        one, other = entry.measures.get("eval_mode"), entry.measures.get("train_mode")
        return one - other if isinstance(one, float) and isinstance(other, float) else None
    if statistic == "generalisation_gap":
        seen = entry.measures.get("eval_mode")
        return seen - entry.value if isinstance(seen, float) and entry.value is not None else None
    if statistic == "constant_share":
        return _constant_share(entry.measures.get("squared_mean"), entry.measures.get("variance"))
    if statistic == "downstream":
        scores = [v for name, v in entry.measures.items() if name.startswith(PREFIX) and isinstance(v, float)]
        return statistics.fmean(scores) if scores else None
    value = entry.measures.get(statistic)
    if isinstance(value, list):  # by block
        return statistics.fmean(value) if value else None
    return float(value) if isinstance(value, float | int) else None


def _constant_share(squared_mean: object, variance: object) -> float | None:
    if not isinstance(squared_mean, list) or not isinstance(variance, list) or not variance:
        return None
    return statistics.fmean(m / (m + v) if m + v else 0.0 for m, v in zip(squared_mean, variance, strict=True))


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
