"""The trials of a sweep, run in this process; who runs them where and when is the floor above's business.

One ridge job does all shots and seeds of a (task, init), since they share one pass over the images; a fine-tuning
trial is one Run of THE loop. Each finished trial is in the ledger before anybody is told.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from pipeline.data.subset import Subset, select
from pipeline.errors import UserError
from pipeline.records import Evaluation, Step
from transfer.cells import Cell, Sweep, plan
from transfer.features import features, from_scratch, pretrained
from transfer.finetune import finetune_run
from transfer.ledger import Entry, Ledger, Trial, entry
from transfer.probes import fit_ridge
from transfer.splits import open_test, selection_url
from transfer.tasks import FinetuneSettings, RidgeSettings, Task

Report = Callable[[dict[str, Any]], None]


def run_job(sweep: Sweep, job: dict[str, Any], report: Report) -> None:
    """A job of `transfer.conductor`. An exception becomes the failed entry of the trials that it ends."""
    ledger = Ledger(sweep.out)
    if job["cell"] >= 0:
        trials = [Trial(**job["trial"])]
    else:
        planned, _ = plan(sweep)
        cells = [planned[index] for index in job["ridge"]]
        trials = [trial for cell in cells for trial in ridge_finals(sweep, cell)]
    try:
        if job["cell"] >= 0:
            run_finetune(sweep, trials[0], report)
        else:
            for found in run_ridge(sweep, cells):
                report({"digest": found.digest})
    except Exception as error:
        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        for trial in trials:
            if ledger.find(trial.digest) is None:
                ledger.write(sweep.failed(trial, text))
    report({"digest": trials[-1].digest})


def ridge_finals(sweep: Sweep, cell: Cell) -> list[Trial]:
    """The final trials of a ridge cell, whose one setting needs no search."""
    settings = sweep.suite.settings("ridge")
    assert isinstance(settings, RidgeSettings)
    return cell.finals({"l2": settings.l2}, sweep.suite.num_seeds)


def run_ridge(sweep: Sweep, cells: list[Cell]) -> Iterator[Entry]:
    """All missing ridge trials of one (task, init): an entry each, written to the ledger before it is yielded.

    Per seed another support and, from scratch, another network; features of the test split are read only once the
    records of all shots are written.
    """
    settings = sweep.suite.settings("ridge")
    assert isinstance(settings, RidgeSettings)
    ledger, l2 = Ledger(sweep.out), settings.l2
    task, init, augment = sweep.task(cells[0].task), cells[0].init, sweep.source.augment
    todo = [[t for t in ridge_finals(sweep, c) if not ledger.is_done(t)] for c in cells]
    seeds = sorted({t.seed for trials in todo for t in trials})
    backbone = pretrained(sweep.source.checkpoint_url) if init == "pretrained" and seeds else None
    begin = time.perf_counter()
    for number, seed in enumerate(seeds):
        if init == "scratch":
            backbone = from_scratch(sweep.source.model, sweep.source.backbone_options(), seed)
        assert backbone is not None
        train, labels = features(backbone, task, augment, sweep.out)
        if not np.array_equal(labels, task.train_labels):
            raise RuntimeError(f"features of {task.name} are not in the order of its index")
        if number == 0:
            urls = [_select_ridge(sweep, c, train, labels, l2) for c in cells]
        test, test_labels = features(backbone, task, augment, sweep.out, test=open_test(task, urls[0]))
        for url, trials in zip(urls, todo, strict=True):
            for trial in (t for t in trials if t.seed == seed):
                open_test(task, url)
                support = select(labels, _subset(task, trial.shots, seed, "support"))
                ridge = fit_ridge(train[support], labels[support], task.num_classes)
                found = entry(
                    trial,
                    task_title=task.card.title,
                    checkpoint_url=sweep.source.checkpoint_url,
                    value=ridge.accuracy(test, test_labels, l2),
                    num_train=len(support),
                    num_test=len(test_labels),
                    seconds_s=time.perf_counter() - begin,
                    images_seen=len(support),
                )
                ledger.write(found)
                yield found
                begin = time.perf_counter()


def _select_ridge(sweep: Sweep, cell: Cell, train: np.ndarray, labels: np.ndarray, l2: float) -> str:
    """The record of a cell with one fixed setting; its score on the held-out part is for information."""
    task = sweep.task(cell.task)
    support = select(labels, _subset(task, cell.shots, 0, "support"))
    holdout = select(labels, _subset(task, cell.shots, 0, "holdout"))
    score = fit_ridge(train[support], labels[support], task.num_classes).accuracy(train[holdout], labels[holdout], l2)
    row = {"hyperparameters": {"l2": l2}, "score": score, "loss": None, "step": 0, "status": "ok", "digest": ""}
    return cell.select(sweep.out, {"l2": l2}, [row])


def _subset(task: Task, shots: int, seed: int, part: Any) -> Subset:
    return Subset(per_class=shots, seed=seed, holdout_per_class=task.holdout_per_class, part=part)


def run_finetune(sweep: Sweep, trial: Trial, report: Report) -> Entry:
    """One fine-tuning trial, its entry written to the ledger; `report` gets every evaluation but the last.

    `report` may raise to end the trial early; nothing is written then.
    """
    from pipeline.train import train

    task, settings = sweep.task(trial.task), sweep.suite.settings("finetune")
    assert isinstance(settings, FinetuneSettings)
    url = None if trial.kind == "search" else selection_url(sweep.out, *trial.cell)
    run = finetune_run(
        sweep.source,
        task,
        settings,
        init=trial.init,
        shots=trial.shots,
        seed=trial.seed,
        hyperparameters=trial.hyperparameters,
        selection_url=url,
    )
    num_steps = int(trial.hyperparameters["num_steps"])
    curve: list[dict[str, float]] = []
    last: Evaluation | None = None
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="normfree-trial-") as folder:
        for record in train(run, folder):
            if isinstance(record, Evaluation):
                last = record
                row = {"step": record.step, "time_s": record.time_s, "loss": record.loss, "accuracy": record.top1}
                if trial.kind == "search":
                    curve.append(row)
                    if record.step < num_steps:
                        report(row)
            elif isinstance(record, Step) and trial.kind == "final":
                curve.append(
                    {"step": record.step, "time_s": record.time_s, "loss": record.loss, "accuracy": record.accuracy}
                )
    assert last is not None  # the loop always evaluates at its end
    found = finetune_entry(
        sweep, trial, curve, value=last.top1, num_test=last.num_samples, seconds_s=time.perf_counter() - begin
    )
    Ledger(sweep.out).write(found)
    return found


def finetune_entry(
    sweep: Sweep, trial: Trial, curve: list[dict[str, float]], *, value: float | None, num_test: int, seconds_s: float
) -> Entry:
    """The entry of a fine-tuning trial that got as far as the last row of `curve`, which may be short of its end."""
    task, settings = sweep.task(trial.task), sweep.suite.settings("finetune")
    assert isinstance(settings, FinetuneSettings)
    num_train = trial.shots * task.num_classes
    return entry(
        trial,
        task_title=task.card.title,
        checkpoint_url=sweep.source.checkpoint_url,
        value=value,
        num_train=num_train,
        num_test=num_test,
        history=curve,
        seconds_s=seconds_s,
        images_seen=int(curve[-1]["step"]) * min(settings.batch, num_train) if curve else 0,
    )
