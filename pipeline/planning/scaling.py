"""Loss against compute of finished runs, and what a budget should be spent on (Smith et al. 2023, arXiv 2310.16764, figure 2).

There the held-out loss of the best run at each compute lies on a straight line in log-log, and model size and epochs grow
together along it. So lines are fitted to the runs that no cheaper run beats, robustly (Theil-Sen, the median of all slopes
between two runs: single runs that went wrong pull little), and intervals come from drawing the runs anew with replacement.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from msgspec import Meta

from pipeline import documents
from pipeline.documents import Text
from pipeline.errors import UserError
from pipeline.storage import objects
from pipeline.yaml_files.parse import parse_yaml, read_yaml
from pipeline.yaml_files.refusals import located

AboveZero = Annotated[float, Meta(gt=0, lt=1e30)]
FEWEST, MOST, DRAWS = 4, 500, 400
LOW, HIGH = 5.0, 95.0
"""Percentiles of an interval."""


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    name: Text
    parameters: AboveZero
    epochs: AboveZero
    loss: AboveZero
    """Held out."""
    compute: AboveZero
    """In any unit that is the same for all runs: device-hours, operations, parameters x images."""


@dataclass(frozen=True)
class Line:
    """log10(y) = at + slope * log10(compute / centre)."""

    at: float
    slope: float
    centre: float

    def __call__(self, compute: float) -> float:
        power = self.at + self.slope * math.log10(compute / self.centre)
        return 10.0**power if power < 308 else math.inf  # a budget may be anything


@dataclass(frozen=True)
class Estimate:
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Scaling:
    runs: tuple[FinishedRun, ...]
    frontier: tuple[FinishedRun, ...]
    lines: dict[str, Line]
    """Of loss, parameters and epochs."""
    draws: dict[str, tuple[Line, ...]]

    def at(self, what: str, compute: float) -> Estimate:
        """loss, parameters or epochs at this compute, with its interval."""
        drawn = [line(compute) for line in self.draws[what]]
        low, high = np.percentile(drawn, [LOW, HIGH])
        return Estimate(self.lines[what](compute), float(low), float(high))

    def slope(self, what: str) -> Estimate:
        low, high = np.percentile([line.slope for line in self.draws[what]], [LOW, HIGH])
        return Estimate(self.lines[what].slope, float(low), float(high))

    def reach(self, compute: float) -> float:
        """How far beyond the dearest run this is, as a factor; below 1 within them."""
        return compute / max(run.compute for run in self.runs)


def read(place: str) -> list[FinishedRun]:
    """A YAML or JSON list of finished runs; without compute it is parameters times epochs."""
    if not objects.exists(place):
        raise UserError(f"no file {place}; give a YAML or JSON list of runs, or the URI of a tracker")
    data = read_yaml(place)
    rows = parse_yaml(data, place)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(
            f"{place} is no list of runs; write for each name, parameters, epochs, loss, and compute if you have it"
        )
    if len({"compute" in row for row in rows}) > 1:
        raise UserError(f"{place} has compute for some runs only; give it for all, or for none")
    rows = [{key: value if key == "name" else _number(value) for key, value in row.items()} for row in rows]
    whole = [{"compute": _product(row), **row} for row in rows]
    with located(place, data):
        found: list[FinishedRun] = documents.convert(whole, list[FinishedRun], place, remedy="correct it")
    return found


def _number(value: object) -> object:
    """YAML takes 1e+18, as JSON writes it, for text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _product(row: dict[str, object]) -> object:
    parameters, epochs = row.get("parameters"), row.get("epochs")
    is_product = isinstance(parameters, int | float) and isinstance(epochs, int | float)
    return parameters * epochs if is_product else 0  # type: ignore[operator]


def frontier(runs: Sequence[FinishedRun]) -> list[FinishedRun]:
    """The runs that none of as little compute beats, by compute."""
    found: list[FinishedRun] = []
    for run in sorted(runs, key=lambda r: (r.compute, r.loss)):
        if not found or run.loss < found[-1].loss:
            found.append(run)
    return found


def fit(runs: Sequence[FinishedRun], *, seed: int = 0) -> Scaling:
    """
    Raises:
        UserError: too few runs are on the frontier to tell a line from noise.
    """
    best = frontier(runs)
    if len(best) < FEWEST:
        raise UserError(
            f"{len(best)} of {len(runs)} runs are beaten by no cheaper one, and a line needs {FEWEST}; add runs of other budgets"
        )
    if len(best) > MOST:
        raise UserError(
            f"{len(best)} of {len(runs)} runs are beaten by no cheaper one, and each pair has a slope: give {MOST} at most"
        )
    centre = float(np.exp(np.mean(np.log([run.compute for run in best]))))
    lines = {what: _line(best, what, centre) for what in ("loss", "parameters", "epochs")}
    generator = np.random.default_rng(seed)
    draws: dict[str, list[Line]] = {what: [] for what in lines}
    for _ in range(DRAWS):
        drawn = [best[i] for i in generator.integers(len(best), size=len(best))]
        if len({run.compute for run in drawn}) < 2:
            continue
        for what in lines:
            draws[what].append(_line(drawn, what, centre))
    return Scaling(tuple(runs), tuple(best), lines, {what: tuple(found) for what, found in draws.items()})


def _line(runs: Sequence[FinishedRun], what: str, centre: float) -> Line:
    from scipy.stats import theilslopes

    x = np.log10([run.compute / centre for run in runs])
    y = np.log10([getattr(run, what) for run in runs])
    with np.errstate(invalid="ignore"):  # of its own interval, unused here, where all y are equal
        found = theilslopes(y, x)
    return Line(float(found.intercept), float(found.slope), centre)
