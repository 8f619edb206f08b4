"""A sweep as cells: what is to be measured, which trials that takes, and how hyper-parameters are chosen.

    cell (task, method, backbone, init, shots) -> search on the held-out part -> selection record -> finals on the test

A fine-tuning cell searches with a trial for each candidate, a probe with one trial for its whole grid. Where there is nothing to
choose there is no search, and the record states the one setting. Where a model searches (`transfer.search.optuna_search`), a
cell's candidates come in generations, and `with_points` adds them.
"""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline import documents
from pipeline.configuration import from_dict, to_dict
from pipeline.errors import UserError
from pipeline.provenance import code_revision
from transfer.probes.fit import grid
from transfer.protocol.method_settings import Scheduler
from transfer.protocol.methods import PROBES, Method, as_before, draws_nothing, sha256
from transfer.protocol.sealed_splits import (
    Candidate,
    Selection,
    read_selection,
    selection_name,
    selection_url,
    write_selection,
)
from transfer.protocol.search_space import Space
from transfer.protocol.suite_files import suite_of
from transfer.protocol.tasks import Init, Suite, Task, TaskEntry, not_prepared, open_task, task_protocol
from transfer.search.grids import REDUCTION, Point, candidates, of_family, ranges
from transfer.sweep.entry import LedgerEntry, Trial, entry
from transfer.sweep.failures import Cause
from transfer.sweep.ledger import Ledger
from transfer.sweep.sources import Backbone, refuse_without_maps


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What every trial of a sweep needs to know; small, and made of plain values, so that it travels to workers."""

    out: str
    data_root: str
    sources: tuple[Backbone, ...]
    suite: Suite
    scheduler: Scheduler = "halving"

    @property
    def source(self) -> Backbone:
        return self.sources[0]

    def task(self, name: str) -> Task:
        """Opened once a process, or since `open_again`."""
        return _opened(next(e for e in self.suite.tasks if e.name == name), self.data_root)

    def task_of(self, trial: Trial) -> Task:
        """UserError if its dataset is another one now than when the trial was planned."""
        task = self.task(trial.task)
        if task.data_digest != trial.data_digest:
            digests = f"{task.data_digest[:12]}, then {trial.data_digest[:12]}"
            raise UserError(f"{task.url} holds other data now (digest {digests}); restore them, or run another sweep")
        return task

    def source_of(self, trial: Trial) -> Backbone:
        """The backbone of a trial; from scratch any that has its architecture."""
        if trial.init == "scratch":
            return next(s for s in self.sources if s.backbone_digest == trial.backbone_digest)
        return next(s for s in self.sources if s.digest == trial.checkpoint_digest)

    def recipe_of(self, trial: Trial) -> Method:
        """The trial's method, with the recipe of its backbone's family where that is what the method asks for."""
        method, source = self.suite.method(trial.method), self.source_of(trial)
        return of_family(method, self.task(trial.task), trial.shots, source.model, source.backbone_options())

    def search_rule(self, method: Method) -> dict[str, Any]:
        """How candidates are drawn and stopped: part of the protocol."""
        if method.kind == "ridge":
            return {}
        if method.is_probe:
            return {"search": "all points of the grid"}
        search = getattr(method.settings, "search", None)
        if search is not None:
            return {"search": search.sampler, "scheduler": "none"}
        return {"search": "grid", "scheduler": self.scheduler, "reduction": REDUCTION}

    def plain(self) -> dict[str, Any]:
        """For `sweep.json`: everything that `sweep_of` needs."""
        return {
            "data_root": self.data_root,
            "suite": self.suite.plain(),
            "sources": [to_dict(s) for s in self.sources],
            "scheduler": self.scheduler,
        }

    def failed(self, trial: Trial, error: str, cause: Cause = "error") -> LedgerEntry:
        return self.entry(trial, value=None, error=error, cause=cause)

    def entry(self, trial: Trial, *, value: float | None, **facts: Any) -> LedgerEntry:
        """`transfer.sweep.entry.entry` with what the sweep knows about the trial."""
        task, method, source = self.task(trial.task), self.suite.method(trial.method), self.source_of(trial)
        return entry(
            trial,
            task_title=task.card.title,
            classes_ordered=task.card.ordered,
            checkpoint_url=source.checkpoint_url,
            value=value,
            backbone=source.name if trial.init == "pretrained" or source.is_fresh else source.model,
            model=source.model,
            method_kind=method.kind,
            method_title=method.title,
            selection=name_of(trial),
            code_revision=code_revision(),
            **facts,
        )


@functools.lru_cache
def _opened(asked: TaskEntry, data_root: str) -> Task:
    return open_task(asked, data_root)


def open_again() -> None:
    """Tasks from now on as their datasets are now."""
    _opened.cache_clear()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """`Sweep.plain`, as sweep.json holds it."""

    data_root: str
    suite: dict[str, Any]
    sources: list[dict[str, Any]]
    scheduler: Scheduler


def sweep_of(out: str) -> Sweep:
    """The sweep in a folder, as it was last started. UserError if there is none, or one of an earlier version."""
    info = Ledger(out).info()
    if not info.plan:
        raise UserError(f"{out} was made by an earlier version, which did not keep its plan; run the sweep again")
    plan = documents.convert(info.plan, Plan, f"the plan of {out}", remedy="start the sweep again with its command")
    suite = suite_of(as_before(plan.suite), out)
    if info.suite_digest and suite.digest() != info.suite_digest:
        raise UserError(f"{out}/sweep.json holds another suite than its suite_digest says; start the sweep again")
    sources = tuple(from_dict(Backbone, source) for source in plan.sources)
    return Sweep(out=out, data_root=plan.data_root, sources=sources, suite=suite, scheduler=plan.scheduler)


IDENTITY = ("task", "method", "init", "shots", "protocol_digest", "data_digest", "checkpoint_digest", "backbone_digest")
"""What a selection record and the trials that follow it have in common."""


@dataclass(frozen=True)
class Cell:
    """One number of the scorecard, with all its seeds."""

    task: str
    method: str
    kind: str
    init: Init
    shots: int
    search: tuple[Trial, ...]
    """One for each candidate of a fine-tuning; one for the whole grid of a probe; none where there is nothing to choose."""
    points: tuple[Point, ...]
    """Candidates; of a probe the points of its grid."""
    any_trial: Trial
    """Of this cell; finals differ from it by kind, seed and hyper-parameters."""
    space: Space | None = None
    """Where a model asks for the candidates: what it may ask for. `search` and `points` then hold those so far."""

    @property
    def is_probe(self) -> bool:
        return self.kind in PROBES

    @property
    def name(self) -> str:
        return name_of(self.any_trial)

    @property
    def backbone(self) -> tuple[str, str]:
        """Equal for cells that share features: weights (empty from scratch), architecture."""
        return self.any_trial.checkpoint_digest, self.any_trial.backbone_digest

    @property
    def num_search(self) -> int:
        """Search trials in all."""
        return len(self.search) if self.space is None else self.space.search.num_trials

    def with_points(self, points: Sequence[Point]) -> "Cell":
        """The cell with more candidates."""
        more = tuple(dataclasses.replace(self.any_trial, hyperparameters=dict(p)) for p in points)
        return dataclasses.replace(self, search=self.search + more, points=self.points + tuple(points))

    def num_finals(self, num_seeds: int) -> int:
        """Final trials: one where a seed draws nothing."""
        return 1 if draws_nothing(self.kind, self.init, self.shots) else num_seeds

    def finals(self, hyperparameters: dict[str, Any], num_seeds: int) -> list[Trial]:
        return [
            dataclasses.replace(self.any_trial, kind="final", seed=seed, hyperparameters=hyperparameters)
            for seed in range(self.num_finals(num_seeds))
        ]

    def selection_url(self, sweep: str) -> str:
        return selection_url(sweep, self.name)

    def selected(self, sweep: str) -> dict[str, Any]:
        """The hyper-parameters of the selection record. UserError if there is none, or it is of other data, weights, protocol."""
        url = self.selection_url(sweep)
        found = read_selection(url)
        for name in IDENTITY:
            there, ours = getattr(found, name), getattr(self.any_trial, name)
            if there != ours:
                raise UserError(
                    f"{url} was written for {name} {there}, and this sweep has {ours}; use another sweep folder"
                )
        return found.hyperparameters

    def select(self, sweep: str, hyperparameters: dict[str, Any], rows: list[Candidate], rule: str = "") -> str:
        """Write the selection record; its URL."""
        trial = self.any_trial
        return write_selection(
            self.selection_url(sweep),
            Selection(
                **{name: getattr(trial, name) for name in IDENTITY},
                hyperparameters=hyperparameters,
                candidates=rows,
                rule=rule or f"highest {trial.metric} on the held-out part, then lowest loss",
            ),
        )


def name_of(trial: Trial) -> str:
    """Of a trial's cell, and of its selection record."""
    weights = (trial.checkpoint_digest or trial.backbone_digest)[:8]
    return selection_name(trial.task, trial.method, trial.init, trial.shots, weights)


def plan(sweep: Sweep) -> tuple[list[Cell], list[dict[str, Any]]]:
    """All cells that data and backbones can give, and rows (task, method, shots, reason) for those that they cannot.

    A task whose dataset is not prepared is one row, with method "" and no shots.
    """
    open_again()
    absent = {asked.name: not_prepared(asked, sweep.data_root) for asked in sweep.suite.tasks}
    there = [sweep.task(name) for name, reason in absent.items() if reason is None]
    refuse_without_maps(sweep.sources, sweep.suite.methods, there)
    cells: list[Cell] = []
    not_run: list[dict[str, Any]] = []
    for asked in sweep.suite.tasks:
        if (reason := absent[asked.name]) is not None:
            not_run.append({"task": asked.name, "method": "", "shots": None, "reason": reason})
            continue
        task = sweep.task(asked.name)
        for method in sweep.suite.methods:
            for shots in method.settings.columns:
                row = {"task": task.name, "method": method.name, "shots": shots}
                if (reason := task.cannot(method.settings, shots)) is not None:
                    not_run.append({**row, "reason": reason})
                    continue
                scratch: set[str] = set()
                for source in sweep.sources:
                    for init in source.inits(method.name):
                        if init == "scratch" and source.backbone_digest in scratch:
                            continue
                        scratch |= {source.backbone_digest} if init == "scratch" else set()
                        cells.append(_cell(sweep, task, method, source, init, shots))
    return cells, not_run


def _cell(sweep: Sweep, task: Task, method: Method, source: Backbone, init: Init, shots: int) -> Cell:
    space = ranges(method, task, shots)
    points: Sequence[Point] = ()
    if method.is_probe:
        points = grid(method, task.parts(method.settings, shots, 0).search.num, shots)
    elif space is None:
        own = of_family(method, task, shots, source.model, source.backbone_options())
        points = candidates(own, task, shots)
    any_trial = Trial(
        kind="search",
        task=task.name,
        method=method.name,
        init=init,
        shots=shots,
        seed=0,
        hyperparameters={},
        protocol_digest=sha256(task_protocol(task, method, sweep.search_rule(method))),
        checkpoint_digest=source.digest if init == "pretrained" else "",
        backbone_digest=source.backbone_digest,
        data_digest=task.data_digest,
        metric=task.metric(method.settings),
    )
    cell = Cell(task.name, method.name, method.kind, init, shots, (), (), any_trial, space)
    if len(points) > 1 and not method.is_probe:
        return cell.with_points(points)
    return dataclasses.replace(cell, points=tuple(points), search=(any_trial,) if len(points) > 1 else ())
