"""A sweep as cells: what is to be measured, which trials that takes, and how hyper-parameters are chosen.

    cell (task, method, init, shots) -> search trials on the held-out part -> selection record -> finals on the test

Ridge has nothing to search; its record states the one fixed setting.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline import checkpoint
from pipeline.config import Run, from_dict
from pipeline.data.cards import load_card
from transfer.finetune import Source, finetune_augment
from transfer.ledger import Entry, Ledger, Trial, entry
from transfer.spaces import candidates
from transfer.splits import Selection, selection_url, write_selection
from transfer.tasks import (
    INITS,
    FinetuneSettings,
    Init,
    Method,
    RidgeSettings,
    Suite,
    Task,
    open_task,
    protocol,
    sha256,
)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What every trial of a sweep needs to know; small, and made of plain values, so that it travels to workers."""

    out: str
    data_root: str
    source: Source
    suite: Suite

    def task(self, name: str) -> Task:
        found = next(e for e in self.suite.tasks if load_card(e.card).name == name)
        return open_task(found, self.data_root)

    def trial(self, task: Task, method: Method, init: Init, **rest: Any) -> Trial:
        settings = self.suite.settings(method)
        model = {"name": self.source.model, "options": self.source.backbone_options()}
        augment = self.source.augment
        if isinstance(settings, FinetuneSettings):
            augment = finetune_augment(self.source, task, settings)
        return Trial(
            task=task.name,
            method=method,
            init=init,
            protocol_digest=sha256(protocol(task, method, settings, model=model, augment=augment)),
            checkpoint_digest=self.source.digest if init == "pretrained" else "",
            data_digest=task.data_digest,
            **rest,
        )

    def failed(self, trial: Trial, error: str) -> Entry:
        title = self.task(trial.task).card.title
        return entry(trial, task_title=title, checkpoint_url=self.source.checkpoint_url, value=None, error=error)


def open_source(url: str) -> Source:
    """The checkpoint at `url`, or the newest verified one of a run folder. UserError if none verifies."""
    cache = checkpoint.default_cache()
    commit = checkpoint.resolve(url, cache)
    checkpoint.verify(commit, cache)
    run: Run = from_dict(Run, commit.config)
    return Source(
        checkpoint_url=commit.url,
        digest=commit.digest,
        model=run.model.name,
        options=run.model.options,
        augment=run.augment,
    )


@dataclass(frozen=True)
class Cell:
    """One number of the scorecard, with all its seeds."""

    task: str
    method: Method
    init: Init
    shots: int
    search: tuple[Trial, ...]
    """Empty for ridge."""
    protocol_digest: str
    checkpoint_digest: str
    data_digest: str

    def finals(self, hyperparameters: dict[str, Any], num_seeds: int) -> list[Trial]:
        return [
            Trial(
                kind="final",
                task=self.task,
                method=self.method,
                init=self.init,
                shots=self.shots,
                seed=seed,
                hyperparameters=hyperparameters,
                protocol_digest=self.protocol_digest,
                checkpoint_digest=self.checkpoint_digest,
                data_digest=self.data_digest,
            )
            for seed in range(num_seeds)
        ]

    def selection_url(self, sweep: str) -> str:
        return selection_url(sweep, self.task, self.method, self.init, self.shots)

    def select(self, sweep: str, hyperparameters: dict[str, Any], rows: list[dict[str, Any]]) -> str:
        """Write the selection record; its URL."""
        return write_selection(
            sweep,
            Selection(
                task=self.task,
                method=self.method,
                init=self.init,
                shots=self.shots,
                hyperparameters=hyperparameters,
                candidates=rows,
                protocol_digest=self.protocol_digest,
                data_digest=self.data_digest,
                checkpoint_digest=self.checkpoint_digest,
            ),
        )


def plan(sweep: Sweep) -> tuple[list[Cell], list[dict[str, Any]]]:
    """All cells that the data can give, and rows (task, method, shots, reason) for those that it cannot."""
    cells, not_run = [], []
    for name in sweep.suite.tasks:
        task = open_task(name, sweep.data_root)
        for method in sweep.suite.methods:
            settings = sweep.suite.settings(method)
            for shots in settings.shots:
                reason = task.cannot(shots)
                if reason is not None:
                    not_run.append({"task": task.name, "method": method, "shots": shots, "reason": reason})
                    continue
                for init in INITS:
                    cells.append(_cell(sweep, task, method, init, shots, settings))
    return cells, not_run


def _cell(
    sweep: Sweep, task: Task, method: Method, init: Init, shots: int, settings: RidgeSettings | FinetuneSettings
) -> Cell:
    points = candidates(settings) if isinstance(settings, FinetuneSettings) else []
    search = tuple(
        sweep.trial(task, method, init, kind="search", shots=shots, seed=0, hyperparameters=point) for point in points
    )
    any_trial = sweep.trial(task, method, init, kind="search", shots=shots, seed=0, hyperparameters={})
    return Cell(
        task.name, method, init, shots, search, any_trial.protocol_digest, any_trial.checkpoint_digest, task.data_digest
    )


def choose(cell: Cell, ledger: Ledger) -> str | None:
    """Select among the search trials in the ledger and write the record; its URL, or None if none ran to its end.

    The highest accuracy on the held-out part wins, then the lowest loss. A candidate that the scheduler stopped early
    is listed with what it had reached, and is not chosen: its number belongs to an unfinished schedule.
    """
    rows: list[dict[str, Any]] = []
    for trial in cell.search:
        found = ledger.find(trial.digest)
        last = found.history[-1] if found and found.history else {"step": 0, "loss": None}
        rows.append(
            {
                "hyperparameters": trial.hyperparameters,
                "score": found.value if found else None,
                "loss": last["loss"],
                "step": int(last["step"] or 0),
                "status": found.status if found else "not run",
                "digest": trial.digest,
            }
        )
    whole = [r for r in rows if r["status"] == "ok" and r["step"] == r["hyperparameters"]["num_steps"]]
    if not whole:
        return None
    best = min(whole, key=lambda r: (-r["score"], r["loss"]))
    return cell.select(ledger.sweep, best["hyperparameters"], rows)
