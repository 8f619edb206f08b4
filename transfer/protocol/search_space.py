"""What a suite may state in place of a grid: ranges, a number of trials, and who asks for them (`transfer.search.optuna_search`).

    search: {num_trials: 16, learning_rate: [0.003, 3.0], num_steps: [20, 120], weight_decay: [1.0e-6, 1.0e-2], clipping: 0.02}

A range is searched on the scale that its field has here; a plain number holds the field there. A space is one for both starts
of a cell, from scratch and pretrained, and so is the number of trials: each start picks its own point.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pipeline.configuration import check_fields
from pipeline.errors import UserError
from pipeline.field_types import Count, CountOrZero, Items, NonNegative, Positive, Range, Share, ShareBelowOne

Sampler = Literal["tpe", "random"]
Scale = Literal["log", "linear"]
Ends = Items(most=2, text="[low, high] or one number that holds")
"""(low, high), or (value,), which holds the field there; () = not searched."""
Positives = Annotated[tuple[Positive, ...], Ends]
NonNegatives = Annotated[tuple[NonNegative, ...], Ends]
Shares = Annotated[tuple[Share, ...], Ends]
SharesBelowOne = Annotated[tuple[ShareBelowOne, ...], Ends]
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


@dataclass(frozen=True, kw_only=True)
class Search:
    """A search by a model of the space: trials are asked for in generations, each from the results of those before it.

    Every trial runs to its end: what a scheduler would stop early is no result that the model could learn from.
    """

    num_trials: Count
    """In all, for each task, number of shots and start."""
    sampler: Sampler = "tpe"
    """Tree-structured Parzen estimator (Bergstra et al. 2011), as Optuna has it; random: its baseline."""
    num_parallel: Count = 4
    """Trials of a generation. It decides what is asked, so it is the suite's to state and no matter of how many run at a
    time."""
    num_random: Count = 8
    """Before the model is asked: random ones, in whole generations, until so many have ended well."""
    seed: CountOrZero = 0
    """Of the sampler."""
    learning_rate: Positives = ()
    num_steps: Annotated[tuple[Count, ...], Ends] = ()
    """Length of the schedule in updates."""
    epochs: Positives = ()
    """In place of num_steps: passes over the training images."""
    weight_decay: NonNegatives = ()
    clipping: NonNegatives = ()
    area_min: Annotated[tuple[Annotated[float, Range(0, 1, without="low")], ...], Ends] = ()
    warmup_share: Shares = ()
    drop_rate: SharesBelowOne = ()
    stochastic_depth: SharesBelowOne = ()
    label_smoothing: SharesBelowOne = ()
    sam_rho: NonNegatives = ()

    def __post_init__(self) -> None:
        check_fields(self, "search")
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

    def _check_range(self, name: str, ends: tuple[float, ...]) -> None:
        if len(ends) < 2:
            return
        low, high = ends
        if not low < high:
            raise UserError(f"the search's {name} runs from {low:g} to {high:g}; give the lower end first")
        if SCALES[name] == "log" and not low > 0:
            raise UserError(
                f"the search's {name} begins at {low:g}; it is searched on a logarithmic scale, so begin above 0"
            )

    @property
    def searched(self) -> tuple[str, ...]:
        """Fields of the recipe that the search states."""
        return tuple(name for name in SCALES if getattr(self, name))

    def plain(self) -> dict[str, Any]:
        """As a suite's YAML holds it; fields that are not configured are omitted, so that later ones change no digest."""
        found: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in SCALES:
                found[field.name] = value
            elif value:
                found[field.name] = list(value) if len(value) == 2 else value[0]
        return found


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
