"""What a suite may state in place of a grid: ranges, a number of trials, and who asks for them (`transfer.search.optuna_search`).

    search: {num_trials: 16, learning_rate: [0.003, 3.0], num_steps: [20, 120], weight_decay: [1.0e-6, 1.0e-2], clipping: 0.02}

A range is searched on the scale that its field has here; a plain number holds the field there. A space is one for both starts
of a cell, from scratch and pretrained, and so is the number of trials: each start picks its own point.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pipeline.configuration import nearest, number, whole
from pipeline.errors import UserError

Sampler = Literal["tpe", "random"]
Scale = Literal["log", "linear"]
Range = tuple[float, ...]
"""(low, high), or (value,); () = not stated."""
SCALES: dict[str, Scale] = {
    "learning_rate": "log",
    "num_steps": "log",
    "epochs": "log",
    "weight_decay": "log",
    "clipping": "log",
    "area_min": "linear",
    "warmup_share": "linear",
    "drop_rate": "linear",
    "stochastic_depth": "linear",
    "label_smoothing": "linear",
    "sam_rho": "linear",
}
"""Fields of `FinetuneSettings` that may be searched. Not the batch: with it a pass over the images would cost other steps."""
SHARES = ("area_min", "warmup_share")
"""At most 1."""
RATES = ("drop_rate", "stochastic_depth", "label_smoothing")
"""Below 1: at 1 nothing would be left of the images' signal."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """A search by a model of the space: trials are asked for in generations, each from the results of those before it.

    Every trial runs to its end: what a scheduler would stop early is no result that the model could learn from.
    """

    num_trials: int
    """In all, for each task, number of shots and start."""
    sampler: Sampler = "tpe"
    """Tree-structured Parzen estimator (Bergstra et al. 2011), as Optuna has it; random: its baseline."""
    num_parallel: int = 4
    """Trials of a generation. It decides what is asked, so it is the suite's to state and no matter of how many run at a
    time."""
    num_random: int = 8
    """Before the model is asked: random ones, in whole generations, until so many have ended well."""
    seed: int = 0
    learning_rate: Range = ()
    num_steps: Range = ()
    epochs: Range = ()
    """In place of num_steps: passes over the training images."""
    weight_decay: Range = ()
    clipping: Range = ()
    area_min: Range = ()
    warmup_share: Range = ()
    drop_rate: Range = ()
    stochastic_depth: Range = ()
    label_smoothing: Range = ()
    sam_rho: Range = ()

    def __post_init__(self) -> None:
        if not self.learning_rate or bool(self.num_steps) == bool(self.epochs):
            raise UserError("a search needs learning_rate, and either num_steps or epochs; state each as [low, high]")
        if len(self.learning_rate) == 1:
            raise UserError(
                f"the search holds learning_rate at {self.learning_rate[0]:g}; state it as [low, high], or use "
                "learning_rates in place of a search"
            )
        for name in SCALES:
            self._check_range(name, getattr(self, name))
        if self.sampler == "tpe" and not self.num_random < self.num_trials:
            raise UserError(
                f"all {self.num_trials} trials of the search are among the {self.num_random} random ones; raise num_trials "
                "or lower num_random"
            )

    def _check_range(self, name: str, stated: Range) -> None:
        if not stated:
            return
        low, high = stated[0], stated[-1]
        is_range = len(stated) == 2
        if is_range and not low < high:
            raise UserError(f"the search's {name} runs from {low:g} to {high:g}; give the lower end first")
        if is_range and SCALES[name] == "log" and not low > 0:
            raise UserError(
                f"the search's {name} begins at {low:g}; it is searched on a logarithmic scale, so begin above 0"
            )
        if (name in SHARES and high > 1) or (name in RATES and high >= 1):
            raise UserError(f"the search's {name} reaches {high:g}; it is a share, keep it below 1")

    @property
    def searched(self) -> tuple[str, ...]:
        """Fields of the recipe that the search states."""
        return tuple(name for name in SCALES if getattr(self, name))

    def plain(self) -> dict[str, Any]:
        """As a suite's YAML holds it; fields that are not stated are left out, so that later ones change no digest."""
        found: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in SCALES:
                found[field.name] = value
            elif value:
                found[field.name] = list(value) if len(value) == 2 else value[0]
        return found


def parse_search(content: Any, where: str) -> Search:
    """The `search` of a method. UserError for what is wrong."""
    if not isinstance(content, dict):
        raise UserError(
            f"{where} is {content!r}; give a mapping, as {{num_trials: 16, learning_rate: [0.003, 3.0], ...}}"
        )
    known = {field.name for field in dataclasses.fields(Search)}
    values: dict[str, Any] = {}
    for key, value in content.items():
        if key not in known:
            raise UserError(f"{where} has an unknown field {key!r}; {nearest(str(key), known)}")
        if key == "sampler":
            if value not in get_args(Sampler):
                raise UserError(f"{where}: sampler is {value!r}; {nearest(str(value), get_args(Sampler))}")
            values[key] = value
        elif key in SCALES:
            values[key] = _range(key, value, f"{where}: {key}")
        else:
            values[key] = whole(value, f"{where}: {key}", zero=key == "seed")
    if "num_trials" not in values:
        raise UserError(f"{where} lacks num_trials; set it")
    try:
        return Search(**values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _range(name: str, value: Any, where: str) -> Range:
    ends = value if isinstance(value, list) else [value]
    if isinstance(value, list) and len(value) != 2:
        raise UserError(f"{where} is {value!r}; give [low, high], or one number that holds")
    if name == "num_steps":
        return tuple(whole(end, where) for end in ends)
    return tuple(number(end, where, zero=name not in ("learning_rate", "epochs", "area_min")) for end in ends)


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A range of one hyper-parameter of a trial."""

    name: str
    low: float
    high: float
    scale: Scale
    is_whole: bool = False


@dataclass(frozen=True, kw_only=True)
class Space:
    """The search of one cell: `Search`, with schedules in steps of that cell's number of images."""

    search: Search
    axes: tuple[Axis, ...]
    fixed: dict[str, float | int]

    @property
    def num_generations(self) -> int:
        return -(-self.search.num_trials // self.search.num_parallel)

    def size(self, generation: int) -> int:
        """Trials of a generation: the last takes what is left."""
        first = generation * self.search.num_parallel
        return min(self.search.num_parallel, self.search.num_trials - first)


def space_of(search: Search, steps_of: Callable[[float], int]) -> Space:
    """Args: steps_of: updates that so many passes over the images take."""
    axes: list[Axis] = []
    fixed: dict[str, float | int] = {}
    for name in search.searched:
        ends: tuple[float, ...] = getattr(search, name)
        if name == "epochs":
            name, ends = "num_steps", tuple(dict.fromkeys(map(steps_of, ends)))
        is_whole = name == "num_steps"
        if len(ends) == 1:
            fixed[name] = int(ends[0]) if is_whole else float(ends[0])
        else:
            axes.append(Axis(name=name, low=ends[0], high=ends[1], scale=SCALES[name], is_whole=is_whole))
    return Space(search=search, axes=tuple(axes), fixed=fixed)
