"""A model asks for the points of a search, in generations; what it asks follows from what is written down, and from nothing else.

<sweep>/decisions/<cell>-generation-<number>.json   what was asked, and from which results that follows

A generation is asked when all earlier ones are over, from their results alone: the study is built again each time, with a
sampler seeded by the suite and the generation. So any two sweeps ask the same, however many trials run at a time and in which
order they end, and a driver that was killed asks the same again. A trial that failed is reported as failed.

The model is Optuna's: TPE (Bergstra et al. 2011), over all ranges jointly (Falkner et al. 2018), trials of the generation at hand
counted as poor ones so that they keep apart (constant liar). It sees scores on the held-out part, never a test split.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, TypedDict

from pipeline import documents
from pipeline.configuration import from_dict
from pipeline.documents import Count, Text
from pipeline.errors import UserError
from pipeline.storage import objects
from transfer.protocol.methods import sha256
from transfer.protocol.search_space import Axis, Search, Space

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution

Point = dict[str, float | int]
DIGITS = 6
"""Significant digits of a point: what another processor's logarithm rounds otherwise must not make another trial."""

REMEDY = "restore it, or run the sweep again in another folder: what was asked is not asked again"


class Row(TypedDict):
    """Of a trial: its score on the held-out part, null where it had failed."""

    hyperparameters: Point
    digest: Text
    score: float | None


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What was asked at one time."""

    cell: Text
    number: Count
    search: dict[str, Any]
    """`Search.plain`."""
    axes: list[Axis]
    fixed: dict[str, float | int]
    rows: list[Row]
    """Of every trial of the earlier generations, in their order."""
    points: list[Point]
    library: Text
    """And its version: another one may ask otherwise."""
    time_s: float = field(default_factory=time.time)

    @property
    def space(self) -> Space:
        return Space(search=from_dict(Search, self.search, "search"), axes=tuple(self.axes), fixed=self.fixed)


def generation_url(sweep: str, cell: str, number: int) -> str:
    return objects.join(sweep, "decisions", f"{cell}-generation-{number}.json")


def read_generation(url: str) -> Generation | None:
    """None where there is none; UserError for what is damaged, or could not have been asked."""
    try:
        found = documents.read(url, Generation, remedy=REMEDY)
        space, names = found.space, {axis.name for axis in found.axes}
    except FileNotFoundError:
        return None
    for axis in found.axes:
        if not axis.low < axis.high or (axis.scale == "log" and axis.low <= 0):
            raise UserError(
                f"{url}: {axis.name} runs from {axis.low:g} to {axis.high:g} on a {axis.scale} scale; {REMEDY}"
            )
    if any(not names <= set(row["hyperparameters"]) for row in found.rows):
        raise UserError(f"{url}: a row lacks one of {', '.join(sorted(names))}; {REMEDY}")
    if len(found.points) != space.size(found.number):
        raise UserError(
            f"{url} asks for {len(found.points)} trials, its search for {space.size(found.number)}; {REMEDY}"
        )
    return found


def written(sweep: str, cell: str) -> list[Generation]:
    """The generations of a cell that have been asked, in order."""
    found: list[Generation] = []
    while (one := read_generation(generation_url(sweep, cell, len(found)))) is not None:
        found.append(one)
    return found


def next_generation(sweep: str, cell: str, space: Space, number: int, rows: Sequence[Mapping[str, Any]]) -> Generation:
    """The generation that is written, or else a new one, written before anybody acts on it.

    Args:
        rows: `Generation.rows`; all trials of all earlier generations.
    """
    url = generation_url(sweep, cell, number)
    there = read_generation(url)
    if there is not None:
        return there
    generation = Generation(
        cell=cell,
        number=number,
        search=space.search.plain(),
        axes=list(space.axes),
        fixed=space.fixed,
        rows=[Row(hyperparameters=row["hyperparameters"], digest=row["digest"], score=row["score"]) for row in rows],
        points=ask(space, number, rows),
        library=library(),
    )
    objects.write_bytes(url, (json.dumps(asdict(generation), indent=1) + "\n").encode())
    return generation


def replay(generation: Generation) -> list[Point]:
    """What is asked by the numbers in a record; its `points`, unless somebody changed either, or the library is another."""
    return ask(generation.space, generation.number, generation.rows)


def library() -> str:
    import optuna

    return f"optuna {optuna.__version__}"


def ask(space: Space, number: int, rows: Sequence[Mapping[str, Any]]) -> list[Point]:
    """The points of generation `number`, after the results in `rows` (hyperparameters, and score or None): pure."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    axes = {axis.name: _distribution(axis) for axis in space.axes}
    study = optuna.create_study(direction="maximize", sampler=_sampler(space.search, number))
    for row in rows:
        _tell(study, axes, row)
    return [_point(space, study.ask(axes).params) for _ in range(space.size(number))]


def _sampler(search: Search, number: int) -> Any:
    from optuna.samplers import RandomSampler, TPESampler

    seed = int(sha256([search.seed, number])[:8], 16)
    if search.sampler == "random":
        return RandomSampler(seed=seed)
    return TPESampler(seed=seed, n_startup_trials=search.num_random, multivariate=True, constant_liar=True)


def _distribution(axis: Axis) -> "BaseDistribution":
    from optuna.distributions import FloatDistribution, IntDistribution

    if axis.is_whole:
        return IntDistribution(int(axis.low), int(axis.high), log=axis.scale == "log")
    return FloatDistribution(axis.low, axis.high, log=axis.scale == "log")


def _tell(study: "Study", axes: dict[str, "BaseDistribution"], row: Mapping[str, Any]) -> None:
    from optuna.trial import TrialState, create_trial

    state = TrialState.FAIL if row["score"] is None else TrialState.COMPLETE
    params = {name: row["hyperparameters"][name] for name in axes}
    study.add_trial(create_trial(state=state, value=row["score"], params=params, distributions=axes))


def _point(space: Space, asked: Mapping[str, float | int]) -> Point:
    """Rounded, and still within the ranges; the learning rate first."""
    point: Point = {}
    for axis in space.axes:
        value = asked[axis.name]
        point[axis.name] = value if axis.is_whole else min(axis.high, max(axis.low, float(f"{value:.{DIGITS}g}")))
    return {**point, **space.fixed}
