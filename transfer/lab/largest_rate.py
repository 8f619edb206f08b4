"""The largest rate at which each line trains, by bisection: rounds of short trials, each round an ordinary sweep of its own.

    round 0         the bounds `low` and `high`, of every line
    round 1, 2, ... of each line whose bounds hold (low is stable, high is not): the geometric mean of its bracket

A rate is stable where every seed finishes with a last training loss below 2 ln K of K classes. What comes out is a bracket: the
largest rate seen stable, the smallest seen unstable, for this length and this batch; between them nothing is known, and stability
is taken to fall with the rate. Everything follows from the ledgers, so that the same command goes on where it was killed.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from pipeline.data.format.manifest import Manifest
from pipeline.storage import objects
from transfer.lab.build import Line, lines_of, sweep_of_experiment
from transfer.lab.experiment import Experiment, RateSearch
from transfer.lab.table import LabRow, Largest, lab_rows
from transfer.sweep.cells import Sweep

Known = dict[float, bool | None]
"""Of one line: whether a rate is stable; None: a trial has no result."""
Asked = list[tuple[Line, float]]
Name = tuple[str, int, int | None]


def name_of(line: Line) -> Name:
    """What a line is but for its rate."""
    return line.word, line.batch, line.stat_group


def base_lines(experiment: Experiment) -> list[Line]:
    """The experiment's lines, each rate's once."""
    return list({name_of(line): line for line in lines_of(experiment)}.values())


def bracket(search: RateSearch, known: Mapping[float, bool | None]) -> Largest:
    """What is known of a line."""
    unstable = min((r for r, stable in known.items() if stable is False), default=None)
    stable = max((r for r, s in known.items() if s and (unstable is None or r < unstable)), default=None)
    return Largest(stable=stable, unstable=unstable, low=search.low, high=search.high)


def next_rates(search: RateSearch, known: Mapping[float, bool | None]) -> list[float]:
    """The rates that a line is to be tried at next; [] = it is done, or a trial has no result."""
    bounds = [rate for rate in (search.low, search.high) if rate not in known]
    if bounds or None in known.values():
        return bounds
    found = bracket(search, known)
    if found.stable is None or found.unstable is None or len(known) >= 2 + search.halvings:
        return []
    middle = float(f"{math.sqrt(found.stable * found.unstable):.4g}")
    return [] if middle in known else [middle]


def is_stable(row: LabRow, limit: float, num_seeds: int) -> bool | None:
    """False as soon as one seed is not; None where a seed that could tell has no result."""
    losses = [e.measures.get("train_loss") for e in row.good]
    if row.num_diverged or any(not isinstance(x, float) or x >= limit for x in losses):
        return False
    return True if len(losses) >= num_seeds else None


@dataclass
class Bisection:
    """The rounds of one experiment: `next_round` until it is None, and `learn` after each was run."""

    experiment: Experiment
    search: RateSearch
    data: str
    out: str
    known: dict[Name, Known] = field(default_factory=dict)
    number: int = 0

    def next_round(self) -> tuple[Sweep, Asked] | None:
        """The next round as a sweep, and its lines; None: all lines are done."""
        asked = [
            (replace(line, rate=rate), rate)
            for line in base_lines(self.experiment)
            for rate in next_rates(self.search, self.known.get(name_of(line), {}))
        ]
        if not asked:
            return None
        name = f"{self.experiment.name} rates {self.number}"
        short = replace(self.experiment, name=name, title="", epochs=self.search.epochs, compare=())
        sweep, _ = sweep_of_experiment(short, data=self.data, out=self.out, lines=[line for line, _ in asked])
        # Other seeds may lead to other rates: the folder is that of what is asked.
        folder = objects.join(sweep.out, "largest_rate", f"round-{self.number}-{sweep.suite.digest()[:12]}")
        return replace(sweep, out=folder), asked

    def learn(self, sweep: Sweep, asked: Asked) -> None:
        """Whether each rate of a round is stable."""
        limit = 2 * math.log(len(Manifest.open(self.data).classes))
        rows = lab_rows(sweep, [line for line, _ in asked])
        for (line, rate), row in zip(asked, rows, strict=True):
            stable = is_stable(row, limit, sweep.suite.num_seeds)
            self.known.setdefault(name_of(line), {})[rate] = stable
        self.number += 1

    @property
    def lacks_result(self) -> bool:
        return any(stable is None for known in self.known.values() for stable in known.values())

    def enter(self, rows: Sequence[LabRow]) -> list[LabRow]:
        """The rows of the table, each with its line's bracket."""
        return [replace(row, largest=bracket(self.search, self.known.get(name_of(row.line), {}))) for row in rows]
