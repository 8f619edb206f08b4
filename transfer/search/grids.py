"""Search spaces, and the brackets in which their points meet: pure functions, so a decision can be played again.

A from-scratch network wants higher rates and longer schedules than a pretrained one; a space that serves only the latter
would make pretraining look better than it is, so the space is one, and each init picks its own point in it.

    halving      all points of one schedule length form a bracket; at a third of the schedule the best third goes on, and so
                 on. A decision waits for all points of its bracket, so it is the same however many run at a time
    hyperband    the points of a schedule length are dealt out to brackets that begin to decide later and later
    asha         Ray's asynchronous variant: quick, and dependent on which trial is first (`orchestration.tune.ray_tune`)
    none         every point runs to its end

That is for grids. Of a space of ranges a model (`transfer.search.optuna_search`) proposes the points; each runs to its end.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.models.families import kind_of
from transfer.protocol.image_sizes import median_area
from transfer.protocol.method_settings import FamilySettings, FinetuneSettings, HyperruleSettings, Scheduler
from transfer.protocol.methods import Method
from transfer.protocol.recipes.bit_hyperrule import hyperrule
from transfer.protocol.recipes.families import recipe
from transfer.protocol.search_space import Space, space_of
from transfer.protocol.tasks import Task
from transfer.protocol.vtab import TASKS

REDUCTION = 3
"""Of so many one goes on (halving, hyperband)."""
ASHA_REDUCTION = 2
Point = dict[str, float | int]


def candidates(method: Method, task: Task, shots: int) -> list[Point]:
    """All points of a fine-tuning space, long schedules and middle rates first: others are measured by them."""
    settings = method.settings
    num = task.parts(settings, shots, 0).final.num
    if isinstance(settings, HyperruleSettings):
        rule = hyperrule(num, image_area(task), variant=settings.variant)
        rates = [rule.learning_rate * factor for factor in settings.rate_factors]
        return [{"learning_rate": rate, "num_steps": settings.num_steps or rule.steps} for rate in _middle_first(rates)]
    assert isinstance(settings, FinetuneSettings) and settings.search is None
    lengths = settings.num_steps or tuple(_steps(settings, num, e) for e in settings.epochs)
    rates = _middle_first(settings.learning_rates)
    return [{"learning_rate": r, "num_steps": s} for s in sorted(set(lengths), reverse=True) for r in rates]


def _middle_first(rates: Sequence[float]) -> list[float]:
    return sorted(rates, key=lambda r: abs(rates.index(r) + 0.5 - len(rates) / 2))


def _steps(settings: FinetuneSettings, num: int, epochs: float) -> int:
    """Updates that so many passes over `num` images take."""
    return max(1, round(epochs * num / min(settings.batch, num * settings.repeats)))


def ranges(method: Method, task: Task, shots: int) -> Space | None:
    """The space of a method that states a search in place of a grid, on a task; None for every other."""
    settings = method.settings
    if not isinstance(settings, FinetuneSettings) or settings.search is None:
        return None
    num = task.parts(settings, shots, 0).final.num
    return space_of(settings.search, lambda epochs: _steps(settings, num, epochs))


def at_point(method: Method, point: Mapping[str, Any]) -> Method:
    """The recipe of one trial: what its search states, with the numbers of that point."""
    settings = method.settings
    if not isinstance(settings, FinetuneSettings) or settings.search is None:
        return method
    own = {k: v for k, v in point.items() if k not in ("learning_rate", "num_steps")}
    grid: dict[str, Any] = {"learning_rates": (float(point["learning_rate"]),), "num_steps": (int(point["num_steps"]),)}
    return dataclasses.replace(method, settings=dataclasses.replace(settings, search=None, **grid, **own))


def of_family(method: Method, task: Task, shots: int, model: str, options: Mapping[str, Any]) -> Method:
    """The method with the recipe of a network's own family, where that is what it asks for; else the method itself."""
    settings = method.settings
    if not isinstance(settings, FamilySettings):
        return method
    own = recipe(
        kind_of(model, dict(options)),
        settings,
        num_images=task.parts(settings, shots, 0).final.num,
        image_area_px=image_area(task),
        random_crop=exceptions(task).get("random_crop", True),
    )
    return dataclasses.replace(method, settings=own)


def exceptions(task: Task) -> dict[str, bool]:
    """Where a mirrored or cropped image has another label (Kolesnikov et al. 2020, suppl. F)."""
    known = TASKS.get(task.name)
    return {"flip": known.flip, "random_crop": known.random_crop} if known else {"flip": task.card.flip}


def image_area(task: Task) -> int:
    """Pixels of a raw training image, the median, from the images."""
    return median_area(task.url, task.data_digest, task.train_split)


@dataclass(frozen=True)
class Bracket:
    """Points that meet at rungs."""

    members: tuple[int, ...]
    """Indices of the points."""
    rungs: tuple[int, ...]
    """Steps at which the best go on; none: all run to the end."""


def brackets(points: Sequence[Point], scheduler: Scheduler) -> list[Bracket]:
    """Every point in one bracket, by schedule length."""
    groups: dict[int, list[int]] = {}
    for index, point in enumerate(points):
        groups.setdefault(int(point["num_steps"]), []).append(index)
    found = []
    for length, members in groups.items():
        if scheduler in ("none", "asha"):
            found.append(Bracket(tuple(members), ()))
        elif scheduler == "halving":
            found.append(Bracket(tuple(members), _rungs(length, _most_rungs(len(members)))))
        else:
            found += _hyperband(length, members)
    return found


def _most_rungs(num: int) -> int:
    """num points need log_3(num) rungs until one is left."""
    return int(math.log(num, REDUCTION) + 1e-9)


def _rungs(length: int, count: int) -> tuple[int, ...]:
    steps = [length // REDUCTION**k for k in range(count, 0, -1)]
    return tuple(sorted({s for s in steps if 0 < s < length}))


def _hyperband(length: int, members: Sequence[int]) -> list[Bracket]:
    """Brackets from many rungs to none, as many points in each as its first rung can thin out to one (Li et al. 2018)."""
    most = _most_rungs(len(members))
    weights = [math.ceil((most + 1) / (s + 1) * REDUCTION**s) for s in range(most, -1, -1)]
    total, found, begin = sum(weights), [], 0
    for s, weight in zip(range(most, -1, -1), weights, strict=True):
        end = len(members) if s == 0 else min(len(members), begin + max(1, round(len(members) * weight / total)))
        mine = tuple(members[begin:end])
        begin = end
        if mine:
            found.append(Bracket(mine, _rungs(length, s)))
    return found


def survivors(scores: Mapping[int, tuple[float, float] | None]) -> list[int]:
    """Who goes on from a rung, one of `REDUCTION`: by score, then by loss, then by place in the space.

    Args:
        scores: of the points that the rung before let through, by index (score, loss); None: it failed.
    """
    ranked = sorted((-found[0], found[1], index) for index, found in scores.items() if found is not None)
    return [index for *_, index in ranked[: max(1, math.ceil(len(scores) / REDUCTION))]]


def grace_steps(points: Sequence[Mapping[str, Any]]) -> int:
    """Steps before ASHA's first rung, and between evaluations on the held-out part: half of the shortest schedule."""
    return max(1, min(int(p["num_steps"]) for p in points) // 2)
