"""A probe job: all probes, shots and seeds of a (task, backbone), since they share one pass over the images."""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from pipeline.configuration import to_dict
from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.data.sampling.subset import select
from pipeline.storage import objects
from transfer import metrics
from transfer.measurement import extra_test_sets, predictions, reference_values
from transfer.measurement.resource_usage import Memory, Power
from transfer.probes import fit
from transfer.probes.features import Backbone, features, from_scratch, pretrained
from transfer.protocol.methods import Method, draws_nothing, sha256
from transfer.protocol.sealed_splits import GridRow, TestSplit, open_test
from transfer.protocol.tasks import Part, Task
from transfer.sweep.cells import Cell, Sweep
from transfer.sweep.choices import choose_point
from transfer.sweep.entry import LedgerEntry, Trial
from transfer.sweep.failures import cause_of, reason
from transfer.sweep.finetune import at_resolution
from transfer.sweep.ledger import Ledger

Networks = Callable[[int], Backbone]
"""Of a seed."""


def probe_trials(sweep: Sweep, cell: Cell) -> list[Trial]:
    """All trials of a probe cell that can be named now: its search, and its finals once its point is known."""
    found = list(cell.search)
    if not cell.search:
        found += cell.finals(dict(cell.points[0]), sweep.suite.num_seeds)
    elif objects.exists(cell.selection_url(sweep.out)):
        found += cell.finals(cell.selected(sweep.out), sweep.suite.num_seeds)
    return found


def run_probes(sweep: Sweep, cells: list[Cell]) -> Iterator[LedgerEntry]:
    """All missing trials of the probes of one (task, backbone): an entry each, written to the ledger before it is yielded.

    Per seed another support and, from scratch, another network. What is chosen by rank over tasks (`ridge_selected`) stops
    after its search until the conductor has written the record.
    """
    task = sweep.task_of(cells[0].any_trial)
    networks = _networks_of(sweep, cells[0])
    ledger = Ledger(sweep.out)
    for cell in cells:
        if not objects.exists(cell.selection_url(sweep.out)):
            yield from _guarded(sweep, ledger, cell, _search(sweep, ledger, task, cell, networks))
    for seed in range(sweep.suite.num_seeds):
        for cell in cells:
            if objects.exists(cell.selection_url(sweep.out)):
                (*_, final) = cell.finals(cell.selected(sweep.out), seed + 1)
                if not ledger.is_done(final):
                    yield from _guarded(sweep, ledger, cell, _final(sweep, ledger, task, cell, final, networks), final)


def _networks_of(sweep: Sweep, cell: Cell) -> Networks:
    """The backbones of a probe job: one for all seeds, or from scratch one a seed, of which the last is kept."""
    source = sweep.source_of(cell.any_trial)
    if cell.init == "pretrained":
        loaded = functools.cache(lambda: pretrained(source.checkpoint_url, source.digest))
        return lambda seed: loaded()
    return functools.lru_cache(maxsize=1)(lambda seed: from_scratch(source.model, source.backbone_options(), seed))


def _guarded(
    sweep: Sweep, ledger: Ledger, cell: Cell, entries: Iterator[LedgerEntry], final: Trial | None = None
) -> Iterator[LedgerEntry]:
    """What goes wrong in one probe is that probe's failed entry; the others go on."""
    try:
        yield from entries
    except Exception as error:
        ended = [final] if final else [*cell.search] or cell.finals(dict(cell.points[0]), sweep.suite.num_seeds)
        for trial in ended:
            found = sweep.failed(trial, reason(error), cause_of(error))
            ledger.write(found)
            yield found


def _of_part(
    sweep: Sweep, task: Task, method: Method, part: Part, augment: AugmentConfig, backbone: Backbone
) -> tuple[np.ndarray, np.ndarray]:
    """Features (N, D) and truth (`Task.truth`) of some training images."""
    splits, icc = part.split.split("+"), method.settings.convert_icc
    found = [features(backbone, task, augment, sweep.out, split=split, convert_icc=icc) for split in splits]
    if not np.array_equal(found[0][1], task.train_labels) and part.split.startswith(task.train_split):
        raise RuntimeError(f"features of {task.name} are not in the order of its index")
    train, labels = (np.concatenate(column) for column in zip(*found, strict=True))
    truth = np.concatenate([task.truth.of(f[1], task.url, split) for f, split in zip(found, splits, strict=True)])
    chosen = np.arange(len(labels)) if part.subset is None else select(task.truth.strata(labels), part.subset)
    return train[chosen], truth[chosen]


def _search(sweep: Sweep, ledger: Ledger, task: Task, cell: Cell, networks: Networks) -> Iterator[LedgerEntry]:
    """All points of the grid on the held-out part, and the selection record that follows from them; of one point, it alone."""
    if not cell.search:  # a fit on the held-out part would decide nothing, and cost as much as a final
        cell.select(sweep.out, dict(cell.points[0]), [], "nothing was searched: the method has one point")
        return
    (trial,) = cell.search
    there = ledger.find(trial.digest)
    if there is not None and there.is_ok:
        if cell.kind != "ridge_selected":
            choose_point(cell, there, sweep.out)
        return
    begin = time.perf_counter()
    method, memory, power = sweep.suite.method(cell.method), Memory(), Power()
    parts = task.parts(method.settings, cell.shots, 0)
    augment = at_resolution(sweep.source_of(trial).augment, method)
    support, labels = _of_part(sweep, task, method, parts.search, augment, networks(0))
    held, held_labels = _of_part(sweep, task, method, parts.holdout, augment, networks(0))
    scorer = fit.fit(method, cell.points, support, labels, task.num_classes, seed=0, device=_device())
    scores = [
        metrics.compute(cell.any_trial.metric, *fit.measured(s, held_labels, task.num_classes)) for s in scorer(held)
    ]
    rows: list[GridRow] = [{"hyperparameters": dict(p), "score": s} for p, s in zip(cell.points, scores, strict=True)]
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


def _final(
    sweep: Sweep, ledger: Ledger, task: Task, cell: Cell, trial: Trial, networks: Networks
) -> Iterator[LedgerEntry]:
    begin = time.perf_counter()
    method, memory, power = sweep.suite.method(cell.method), Memory(), Power()
    part = task.parts(method.settings, cell.shots, trial.seed).final
    augment = at_resolution(sweep.source_of(trial).augment, method)
    support, labels = _of_part(sweep, task, method, part, augment, networks(trial.seed))
    opened = open_test(task, cell.selection_url(sweep.out), trial=trial.digest)
    icc = method.settings.convert_icc
    test, test_labels = features(networks(trial.seed), task, augment, sweep.out, test=opened, convert_icc=icc)
    fitting: dict[str, Any] = {"seed": trial.seed, "device": _device()}
    scorer = fit.fit(method, [trial.hyperparameters], support, labels, task.num_classes, **fitting)
    truth = task.truth.of(test_labels, task.url, opened.name)
    scores, test_labels = fit.measured(next(scorer(test)), truth, task.num_classes)
    numbers = predictions.all_metrics(scores, test_labels, [trial.metric])
    if cell.kind == "knn":  # each k is reported, whichever was chosen
        every = fit.fit(method, cell.points, support, labels, task.num_classes, **fitting)
        for point, found_k in zip(cell.points, every(test), strict=True):
            numbers[f"{trial.metric}_k{point['k']}"] = metrics.compute(trial.metric, found_k, test_labels)

    def score_other(
        other: Task, there: TestSplit, change: extra_test_sets.Corrupted = None, /
    ) -> tuple[np.ndarray, np.ndarray]:
        known: dict[str, Any] = {"test": there, "convert_icc": icc, "corruption": change}
        found, labels = features(networks(trial.seed), other, augment, sweep.out, **known)
        return next(scorer(found)), labels

    interval = None
    if draws_nothing(cell.kind, trial.init, trial.shots) or cell.kind == "detect":
        interval = reference_values.image_interval(trial.metric, scores, test_labels)
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
        baselines=reference_values.baselines(trial.metric, scores, test_labels, labels, truth),
        test_interval=interval,
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
