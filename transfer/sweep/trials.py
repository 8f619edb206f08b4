"""The trials of a sweep, run in this process; who runs them where and when is the floor above's business.

One probe job does all probes, shots and seeds of a (task, backbone), since they share one pass over the images; a
fine-tuning trial is one Run of THE loop, or a part of one up to a rung. Each finished trial is in the ledger before anybody is
told.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from pipeline import distributed
from pipeline.configuration import to_dict
from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.data.sampling.subset import select
from pipeline.distributed import World
from pipeline.duration import Duration
from pipeline.errors import UserError
from pipeline.records import Evaluation, Saved, SaveFailed, Step, Stopped
from pipeline.storage import objects
from pipeline.training.evaluate import Scores
from transfer import metrics
from transfer.measurement import extra_test_sets, predictions
from transfer.measurement.resource_usage import Memory, Power
from transfer.probes import fit
from transfer.probes.features import Backbone, features, from_scratch, pretrained
from transfer.protocol.methods import HyperruleSettings, Method, sha256
from transfer.protocol.sealed_splits import TestSplit, open_test, read_selection, selection_url
from transfer.protocol.tasks import Part, Task
from transfer.search.grids import candidates, grace_steps
from transfer.search.successive_halving import Rung, read_rung, work_url, write_rung
from transfer.sweep.cells import Cell, Sweep, choose_point, name_of, plan
from transfer.sweep.finetune import at_resolution, finetune_run, num_processes
from transfer.sweep.ledger import Entry, Ledger, Trial
from transfer.sweep.trial_ranks import SavePace, used, whole

Report = Callable[[dict[str, Any]], None]
RunRanks = Callable[[Sweep, Trial, Report, int, int], None]
"""Runs a fine-tuning trial up to a rung (0 = its end) as a number of processes."""


def run_job(
    sweep: Sweep, job: dict[str, Any], report: Report, *, max_processes: int = 1, run_ranks: RunRanks | None = None
) -> None:
    """A job of `transfer.sweep.scheduler`. An exception becomes the failed entry of the trials that it ends.

    Args:
        max_processes: of a fine-tuning trial; `run_ranks` runs it where it is more than one and its batch can be shared.
    """
    ledger = Ledger(sweep.out)
    if job["cell"] >= 0:
        trial, until, ranks = Trial(**job["trial"]), int(job.get("until", 0)), 1
        try:
            ranks = processes_of(sweep, trial, max_processes) if run_ranks else 1
            if run_ranks and ranks > 1:
                run_ranks(sweep, trial, report, until, ranks)
            else:
                run_finetune(sweep, trial, report, until=until)
        except Exception as error:
            if ledger.find(trial.digest) is None:
                ledger.write(dataclasses.replace(sweep.failed(trial, reason(error)), num_processes=ranks))
        report({"digest": trial.digest})
        return
    planned, _ = plan(sweep)
    for found in run_probes(sweep, [planned[index] for index in job["probes"]]):
        report({"digest": found.digest})
    report({"digest": ""})


def reason(error: Exception) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


# --- probes -----------------------------------------------------------------------------------------------------------


def probe_trials(sweep: Sweep, cell: Cell) -> list[Trial]:
    """All trials of a probe cell that can be named now: its search, and its finals once its point is known."""
    found = list(cell.search)
    if not cell.search:
        found += cell.finals(dict(cell.points[0]), sweep.suite.num_seeds)
    elif objects.exists(cell.selection_url(sweep.out)):
        chosen = read_selection(cell.selection_url(sweep.out)).hyperparameters
        found += cell.finals(chosen, sweep.suite.num_seeds)
    return found


def run_probes(sweep: Sweep, cells: list[Cell]) -> Iterator[Entry]:
    """All missing trials of the probes of one (task, backbone): an entry each, written to the ledger before it is yielded.

    Per seed another support and, from scratch, another network. What is chosen by rank over tasks (`ridge_selected`) stops
    after its search until the conductor has written the record.
    """
    task = sweep.task(cells[0].task)
    networks = _Networks(sweep, cells[0])
    ledger = Ledger(sweep.out)
    for cell in cells:
        if not objects.exists(cell.selection_url(sweep.out)):
            yield from _guarded(sweep, ledger, cell, _search(sweep, ledger, task, cell, networks))
    for seed in range(sweep.suite.num_seeds):
        for cell in cells:
            if objects.exists(cell.selection_url(sweep.out)):
                final = cell.finals(read_selection(cell.selection_url(sweep.out)).hyperparameters, seed + 1)[seed]
                if not ledger.is_done(final):
                    yield from _guarded(sweep, ledger, cell, _final(sweep, ledger, task, cell, final, networks), final)


class _Networks:
    """The backbone of a probe job: one for all seeds, or from scratch one a seed; made when features are not kept yet."""

    def __init__(self, sweep: Sweep, cell: Cell) -> None:
        self.source = sweep.source_of(cell.any_trial)
        self._init, self._made = cell.init, -1
        self._backbone: Backbone | None = None

    def __call__(self, seed: int) -> Backbone:
        wanted = 0 if self._init == "pretrained" else seed
        if self._backbone is None or self._made != wanted:
            if self._init == "pretrained":
                self._backbone = pretrained(self.source.checkpoint_url)
            else:
                self._backbone = from_scratch(self.source.model, self.source.backbone_options(), seed)
            self._made = wanted
        return self._backbone


def _guarded(
    sweep: Sweep, ledger: Ledger, cell: Cell, entries: Iterator[Entry], final: Trial | None = None
) -> Iterator[Entry]:
    """What goes wrong in one probe is that probe's failed entry; the others go on."""
    try:
        yield from entries
    except Exception as error:
        ended = [final] if final else [*cell.search] or cell.finals(dict(cell.points[0]), sweep.suite.num_seeds)
        for trial in ended:
            found = sweep.failed(trial, reason(error))
            ledger.write(found)
            yield found


def _of_part(
    sweep: Sweep, task: Task, part: Part, augment: AugmentConfig, backbone: Callable[[], Backbone]
) -> tuple[np.ndarray, np.ndarray]:
    """Features (N, D) and labels (N,) of some training images."""
    found = [features(backbone, task, augment, sweep.out, split=split) for split in part.split.split("+")]
    if not np.array_equal(found[0][1], task.train_labels) and part.split.startswith(task.train_split):
        raise RuntimeError(f"features of {task.name} are not in the order of its index")
    train, labels = (np.concatenate(column) for column in zip(*found, strict=True))
    chosen = np.arange(len(labels)) if part.subset is None else select(labels, part.subset)
    return train[chosen], labels[chosen]


def _search(sweep: Sweep, ledger: Ledger, task: Task, cell: Cell, networks: _Networks) -> Iterator[Entry]:
    """All points of the grid on the held-out part, and the selection record that follows from them."""
    begin = time.perf_counter()
    method, memory, power = sweep.suite.method(cell.method), Memory(), Power()
    parts = task.parts(method.settings, cell.shots, 0)
    trial = cell.search[0] if cell.search else None
    there = ledger.find(trial.digest) if trial else None
    if there is not None and there.is_ok:
        if cell.kind != "ridge_selected":
            choose_point(cell, there, sweep.out)
        return
    augment = at_resolution(networks.source.augment, method)
    support, labels = _of_part(sweep, task, parts.search, augment, lambda: networks(0))
    held, held_labels = _of_part(sweep, task, parts.holdout, augment, lambda: networks(0))
    scorer = fit.fit(method, cell.points, support, labels, task.num_classes, seed=0, device=_device())
    scores = [metrics.compute(cell.any_trial.metric, s, held_labels) for s in scorer(held)]
    rows = [{"hyperparameters": dict(p), "score": s} for p, s in zip(cell.points, scores, strict=True)]
    if trial is None:
        row = {**rows[0], "loss": None, "step": 0, "status": "ok", "digest": ""}
        cell.select(sweep.out, dict(cell.points[0]), [row], "nothing was searched; the score is for information")
        return
    found = sweep.entry(
        trial,
        value=max(scores),
        num_train=len(support),
        num_test=len(held),
        seconds_s=time.perf_counter() - begin,
        images_seen=len(support),
        grid=rows,
        max_memory_bytes=memory.max_bytes(),
        watts=power.watts(),
    )
    ledger.write(found)
    if cell.kind != "ridge_selected":
        choose_point(cell, found, sweep.out)
    yield found


def _final(sweep: Sweep, ledger: Ledger, task: Task, cell: Cell, trial: Trial, networks: _Networks) -> Iterator[Entry]:
    begin = time.perf_counter()
    method, memory, power = sweep.suite.method(cell.method), Memory(), Power()
    part = task.parts(method.settings, cell.shots, trial.seed).final
    augment = at_resolution(networks.source.augment, method)
    support, labels = _of_part(sweep, task, part, augment, lambda: networks(trial.seed))
    opened = open_test(task, cell.selection_url(sweep.out), trial=trial.digest)
    test, test_labels = features(lambda: networks(trial.seed), task, augment, sweep.out, test=opened)
    scorer = fit.fit(
        method,
        [trial.hyperparameters],
        support,
        labels,
        task.num_classes,
        seed=trial.seed,
        device=_device(),
    )
    scores = next(scorer(test))
    numbers = predictions.all_metrics(scores, test_labels, [trial.metric])

    def score_other(other: Task, open_there: TestSplit) -> tuple[np.ndarray, np.ndarray]:
        found, labels = features(lambda: networks(trial.seed), other, augment, sweep.out, test=open_there)
        return next(scorer(found)), labels

    places = np.arange(len(test_labels))
    numbers |= extra_test_sets.numbers(
        task, opened, trial=trial.digest, samples=places, scores=scores, score=score_other
    )
    config = {"method": method.plain(), "augment": to_dict(augment), "part": to_dict(part), "data": task.url}
    predictions.write(sweep.out, trial.digest, places, scores, test_labels, kind=fit.scores_are(method))
    found = sweep.entry(
        trial,
        value=numbers[trial.metric],
        num_train=len(support),
        num_test=len(test_labels),
        seconds_s=time.perf_counter() - begin,
        images_seen=len(support),
        metrics=numbers,
        config=config,
        config_digest=sha256(config),
        max_memory_bytes=memory.max_bytes(),
        watts=power.watts(),
    )
    ledger.write(found)
    yield found


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


# --- fine-tuning ------------------------------------------------------------------------------------------------------


def processes_of(sweep: Sweep, trial: Trial, wanted: int) -> int:
    """As how many processes a fine-tuning trial runs where `wanted` may: its global batch is shared equally."""
    task, method, source = sweep.task(trial.task), sweep.suite.method(trial.method), sweep.source_of(trial)
    num_images = _num_images(task, method, trial)
    return num_processes(source, task, method, num_images, trial.hyperparameters, wanted=wanted)


def _num_images(task: Task, method: Method, trial: Trial) -> int:
    """That the trial trains on."""
    parts = task.parts(method.settings, trial.shots, trial.seed)
    return (parts.search if trial.kind == "search" else parts.final).num


def run_finetune(sweep: Sweep, trial: Trial, report: Report, *, until: int = 0) -> Entry | None:
    """One fine-tuning trial, its entry written to the ledger; or its part up to the rung `until`, and None.

    Under ASHA `report` gets every evaluation but the last, and may raise to end the trial early; nothing is written then. A
    trial that was begun before, and killed or left at a rung, goes on from its own newest checkpoint. Where it runs as several
    processes each of them calls this; the main one alone opens the test split, reports and writes.
    """
    from pipeline.training.train import train

    begin, memory, power = time.perf_counter(), Memory(), Power()
    me = distributed.join()
    task, method, source = sweep.task(trial.task), sweep.suite.method(trial.method), sweep.source_of(trial)
    num_steps = int(trial.hyperparameters["num_steps"])
    test = _open(sweep, task, trial, me) if trial.kind == "final" else None
    live = sweep.search_rule(method).get("scheduler") == "asha" and trial.kind == "search"
    run = finetune_run(
        source,
        task,
        method,
        init=trial.init,
        shots=trial.shots,
        seed=trial.seed,
        hyperparameters=trial.hyperparameters,
        test=test,
        eval_every=grace_steps(candidates(method, task, trial.shots)) if live else 0,
    )
    epoch_steps = max(1, _num_images(task, method, trial) * run.data.repeats // run.global_batch)
    run = dataclasses.replace(
        run,
        save_every=Duration(epoch_steps, "steps") if epoch_steps < num_steps else None,
        save_final=test is not None and bool(task.beside.v2_url),  # the network is needed once more
    )
    seen, pace = _Seen(trial, me), SavePace(me)
    earlier = _earlier(sweep, trial, until)
    work = work_url(sweep.out, trial.digest)
    records = train(run, work, on_scores=seen.take, leave_at=until, may_save=pace, goes_back=False)
    with contextlib.closing(records):  # type: ignore[type-var]
        for record in records:
            if isinstance(record, Evaluation):
                row = seen.row(record)
                if live and record.step < num_steps and me.is_main:
                    report(row)
            elif isinstance(record, Step) and trial.kind == "final":
                seen.curve.append(
                    {"step": record.step, "time_s": record.time_s, "loss": record.loss, "accuracy": record.accuracy}
                )
            elif isinstance(record, Saved | SaveFailed):
                pace.saved()
            elif isinstance(record, Stopped):
                raise UserError(f"{record.reason}; the same command again goes on from there")
    first = seen.curve[0]["step"] if seen.curve else num_steps + 1
    rows = [r for r in (earlier.rows if earlier else []) if r["step"] < first] + seen.curve
    seconds_s = time.perf_counter() - begin + (earlier.seconds_s if earlier else 0.0)
    spent = used(memory, power, me)
    if not me.is_main:
        return None
    if until:
        assert seen.value is not None
        write_rung(
            sweep.out,
            Rung(digest=trial.digest, step=until, score=seen.value, loss=seen.loss, rows=rows, seconds_s=seconds_s),
        )
        return None
    assert seen.scores is not None and seen.value is not None  # the loop always evaluates at its end
    if trial.kind == "final":
        s = seen.scores
        predictions.write(sweep.out, trial.digest, s.samples, s.logits, s.labels)
        assert test is not None
        seen.numbers |= extra_test_sets.numbers(
            task,
            test,
            trial=trial.digest,
            samples=s.samples,
            scores=s.logits,
            score=lambda other, opened: extra_test_sets.scores_of(work, run, other, opened),
        )
    found = finetune_entry(
        sweep,
        trial,
        rows,
        value=seen.value,
        seconds_s=seconds_s,
        num_test=len(seen.scores.labels),
        metrics=seen.numbers if trial.kind == "final" else {},
        config=to_dict(run),
        config_digest=run.digest(),
        num_processes=me.size,
        **spent,
    )
    Ledger(sweep.out).write(found)
    objects.remove_tree(work)
    return found


def _open(sweep: Sweep, task: Task, trial: Trial, me: World) -> TestSplit:
    """The permission to read the test split, opened once, by the main rank."""
    found: object = None
    if me.is_main:
        try:
            found = open_test(task, selection_url(sweep.out, name_of(trial)), trial=trial.digest)
        except UserError as error:
            found = error
    found = distributed.broadcast(me, found)
    if isinstance(found, UserError):
        raise found
    assert isinstance(found, TestSplit)
    return found


def _earlier(sweep: Sweep, trial: Trial, until: int) -> Rung | None:
    """The newest rung before `until` that this trial has reached."""
    found = [
        read_rung(sweep.out, trial.digest, int(url.rpartition("-")[2].removesuffix(".json")))
        for url in objects.list_urls(objects.join(sweep.out, "rungs"), ".json")
        if url.rpartition("/")[2].startswith(trial.digest)
    ]
    before = [r for r in found if r is not None and (not until or r.step < until)]
    return max(before, key=lambda r: r.step, default=None)


class _Seen:
    """What a trial's evaluations said."""

    def __init__(self, trial: Trial, me: World) -> None:
        self._trial, self._me = trial, me
        self.curve: list[dict[str, float]] = []
        self.scores: Scores | None = None
        self.numbers: dict[str, float] = {}
        self.value: float | None = None
        self.loss = float("nan")

    def take(self, scores: Scores) -> None:
        self.scores = whole(scores, self._me)

    def row(self, record: Evaluation) -> dict[str, float]:
        """The evaluation as a row of the history; `accuracy` is what candidates are compared by."""
        assert self.scores is not None
        name = self._trial.metric
        if self._trial.kind == "final":
            self.numbers = predictions.all_metrics(self.scores.logits, self.scores.labels, [name])
            self.value = self.numbers[name]
        else:
            self.value = metrics.compute(name, self.scores.logits, self.scores.labels)
        self.loss = record.loss
        row = {"step": record.step, "time_s": record.time_s, "loss": record.loss, "accuracy": self.value}
        if self._trial.kind == "search":
            self.curve.append(row)
        return row


def finetune_entry(
    sweep: Sweep, trial: Trial, curve: list[dict[str, float]], *, value: float | None, seconds_s: float, **facts: Any
) -> Entry:
    """The entry of a fine-tuning trial that got as far as the last row of `curve`, which may be short of its end."""
    task, method = sweep.task(trial.task), sweep.suite.method(trial.method)
    num_train = _num_images(task, method, trial)
    settings: Any = method.settings
    repeats = 1 if isinstance(settings, HyperruleSettings) else settings.repeats
    batch = min(settings.batch, num_train * repeats)
    return sweep.entry(
        trial,
        value=value,
        num_train=num_train,
        history=curve,
        seconds_s=seconds_s,
        images_seen=int(curve[-1]["step"]) * batch if curve else 0,
        **facts,
    )
