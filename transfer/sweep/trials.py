"""The trials of a sweep, run in this process; who runs them where and when is the floor above's business.

One probe job does all probes, shots and seeds of a (task, backbone) (`transfer.sweep.probe_job`); a fine-tuning trial is one Run
of THE loop, or a part of one up to a rung. Each finished trial is in the ledger before anybody is told.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from pipeline import distributed
from pipeline.configuration import to_dict
from pipeline.data.sampling.subset import select
from pipeline.distributed import World
from pipeline.duration import Duration
from pipeline.models.backbone import load_backbone
from pipeline.records import Evaluation, Record, Saved, SaveFailed, Step
from pipeline.storage import objects
from pipeline.training.evaluate import Scores
from pipeline.training.run import Run
from transfer import metrics
from transfer.measurement import extra_test_sets, network_measures, predictions, reference_values
from transfer.measurement.downstream import PREFIX, downstream
from transfer.measurement.resource_usage import Memory, Power
from transfer.protocol.methods import Method
from transfer.protocol.sealed_splits import TestSplit, open_test, selection_url
from transfer.protocol.tasks import Task
from transfer.search.grids import candidates, grace_steps
from transfer.search.successive_halving import Rung, read_rung, remove_work, work_url, write_rung
from transfer.sweep.cells import Sweep, name_of, open_again, plan
from transfer.sweep.entry import LedgerEntry, Trial
from transfer.sweep.failures import TrialFailed, cause_of, reason
from transfer.sweep.finetune import begin_stages, finetune_run, num_processes, refuse_stop, repeats_of
from transfer.sweep.ledger import Ledger
from transfer.sweep.probe_job import run_probes
from transfer.sweep.sources import Backbone
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
    Raises:
        TrialFailed: what a trial needed was lost (memory, device, store), after its entry is written: this process should end.
    """
    open_again()
    if job["cell"] >= 0:
        lost = _run_one(sweep, job, report, max_processes, run_ranks)
    else:
        planned, _ = plan(sweep)
        lost = ""
        for found in run_probes(sweep, [planned[index] for index in job["probes"]]):
            report({"digest": found.digest})
            lost = found.error or "" if found.cause == "lost" else lost
    report({"digest": Trial(**job["trial"]).digest if job["cell"] >= 0 else ""})
    if lost:
        raise TrialFailed(lost, "lost")


def _run_one(sweep: Sweep, job: dict[str, Any], report: Report, max_processes: int, run_ranks: RunRanks | None) -> str:
    """A fine-tuning trial; why it was lost, or ""."""
    ledger, trial, until, ranks = Ledger(sweep.out), Trial(**job["trial"]), int(job.get("until", 0)), 1
    try:
        ranks = processes_of(sweep, trial, max_processes) if run_ranks else 1
        if run_ranks and ranks > 1:
            run_ranks(sweep, trial, report, until, ranks)
        else:
            run_finetune(sweep, trial, report, until=until)
    except Exception as error:
        if ledger.find(trial.digest) is None:
            failed = sweep.failed(trial, reason(error), cause_of(error))
            ledger.write(dataclasses.replace(failed, num_processes=ranks))
            return failed.error or "" if failed.cause == "lost" else ""
    return ""


def processes_of(sweep: Sweep, trial: Trial, wanted: int) -> int:
    """As how many processes a fine-tuning trial runs where `wanted` may: its global batch is shared equally."""
    task, method = sweep.task(trial.task), sweep.recipe_of(trial)
    return num_processes(sweep.source_of(trial), task, method, _num_images(task, method, trial), wanted=wanted)


def _num_images(task: Task, method: Method, trial: Trial) -> int:
    """That the trial trains on."""
    parts = task.parts(method.settings, trial.shots, trial.seed)
    return (parts.search if trial.kind == "search" else parts.final).num


def _baselines(task: Task, method: Method, trial: Trial, scores: Scores) -> dict[str, float]:
    part = task.parts(method.settings, trial.shots, trial.seed).final
    labels = task.train_labels
    fitted = labels if part.subset is None else labels[select(task.truth.strata(labels), part.subset)]
    return reference_values.baselines(trial.metric, scores.logits, scores.labels, task.truth.of(fitted))


def run_finetune(sweep: Sweep, trial: Trial, report: Report, *, until: int = 0) -> LedgerEntry | None:
    """One fine-tuning trial, its entry written to the ledger; or its part up to the rung `until`, and None.

    Under ASHA `report` gets every evaluation but the last, and may raise to end the trial early; nothing is written then. A
    trial that was begun before, and killed or left at a rung, goes on from its own newest checkpoint. Where it runs as several
    processes each of them calls this; the main one alone opens the test split, reports and writes.
    """
    from pipeline.training.train import train

    begin, memory, power = time.perf_counter(), Memory(), Power()
    me = distributed.join()
    task, method, source = sweep.task_of(trial), sweep.recipe_of(trial), sweep.source_of(trial)
    if trial.init == "pretrained":
        source.check_weights()
    test: TestSplit | None = None
    if trial.kind == "final":  # the permission to read the test split, opened once, by the main rank
        place = selection_url(sweep.out, name_of(trial))
        test = distributed.from_main(me, lambda: open_test(task, place, trial=trial.digest))
    live = sweep.search_rule(method).get("scheduler") == "asha" and trial.kind == "search"
    run = _run_of(trial, task, method, source, test, live=live)
    seen, earlier, pace = _Seen(trial, task, me), _earlier(sweep, trial, until), SavePace(me)
    work = work_url(sweep.out, trial.digest)
    begun, taught = begin_stages(run, method, source.first, sweep.data_root, work)
    records = train(begun, work, on_scores=seen.take, leave_at=until, may_save=pace, goes_back=False, teacher=taught)
    _follow(records, seen, pace, report if live and me.is_main else None)
    first = seen.curve[0]["step"] if seen.curve else int(trial.hyperparameters["num_steps"]) + 1
    rows = [r for r in (earlier.rows if earlier else []) if r["step"] < first] + seen.curve
    seconds_s = time.perf_counter() - begin + (earlier.seconds_s if earlier else 0.0)
    spent = used(memory, power, me)
    if not me.is_main:
        return None
    assert seen.value is not None
    if until:
        write_rung(
            sweep.out,
            Rung(digest=trial.digest, step=until, score=seen.value, loss=seen.loss, rows=rows, seconds_s=seconds_s),
        )
        return None
    assert seen.scores is not None  # the loop always evaluates at its end
    if test is not None:
        _measure(sweep, task, trial, test, run, seen)
    found = finetune_entry(
        sweep,
        trial,
        rows,
        value=seen.value,
        seconds_s=seconds_s,
        num_test=len(seen.scores.labels),
        metrics=seen.numbers if trial.kind == "final" else {},
        baselines=_baselines(task, method, trial, seen.scores) if trial.kind == "final" else {},
        config=to_dict(run),
        config_digest=run.digest(),
        num_processes=me.size,
        measures=seen.measures,
        **spent,
    )
    Ledger(sweep.out).write(found)
    remove_work(sweep.out, trial.digest)
    return found


def _follow(records: Iterator[Record], seen: "_Seen", pace: SavePace, report: Report | None) -> None:
    """The loop, to where it leaves; what it evaluates goes into `seen`, and before the trial's end to `report`."""
    num_steps = int(seen.trial.hyperparameters["num_steps"])
    with contextlib.closing(records):  # type: ignore[type-var]
        for record in records:
            if isinstance(record, Evaluation):
                row = seen.row(record)
                if report is not None and record.step < num_steps:
                    report(row)
            elif isinstance(record, Step) and seen.trial.kind == "final":
                seen.steps.append(record)
                seen.curve.append(
                    {"step": record.step, "time_s": record.time_s, "loss": record.loss, "accuracy": record.accuracy}
                )
            elif isinstance(record, Saved | SaveFailed):
                pace.saved()
            refuse_stop(record)


def _measure(sweep: Sweep, task: Task, trial: Trial, test: TestSplit, run: Run, seen: "_Seen") -> None:
    """Keeps a final trial's predictions, and measures it on the task's further test sets."""
    scores = seen.scores
    assert scores is not None
    work = work_url(sweep.out, trial.digest)
    predictions.write(sweep.out, trial.digest, scores.samples, scores.logits, scores.labels)
    seen.numbers |= extra_test_sets.numbers(
        task,
        test,
        trial=trial.digest,
        samples=scores.samples,
        scores=scores.logits,
        score=partial(extra_test_sets.scores_of, work, run),
    )
    source = sweep.source_of(trial)
    if source.is_fresh:
        measured = network_measures.of_training(seen.steps) | network_measures.of_network(work, run, test)
        for card in source.downstream:
            network, where = load_backbone(work).model, sweep.data_root
            measured[f"{PREFIX}{card}"] = downstream(network, card, run.augment, where, seed=trial.seed)
        seen.measures = network_measures.finite(measured)


def _run_of(trial: Trial, task: Task, method: Method, source: Backbone, test: TestSplit | None, *, live: bool) -> Run:
    """The trial's Run, saved once a pass over its images; `live`: evaluated where ASHA decides."""
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
    return dataclasses.replace(
        run,
        save_every=Duration(epoch_steps, "steps") if epoch_steps < int(trial.hyperparameters["num_steps"]) else None,
        save_final=test is not None and (task.extra_tests.needs_passes or source.is_fresh),  # it is needed once more
    )


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
    """What a trial's evaluations found."""

    def __init__(self, trial: Trial, task: Task, me: World) -> None:
        self.trial, self.task, self.me = trial, task, me
        self.curve: list[dict[str, float]] = []
        self.steps: list[Step] = []
        self.measures: network_measures.Measures = {}
        self.scores: Scores | None = None
        """With the truth (`Task.truth`) for labels."""
        self.numbers: dict[str, float] = {}
        self.value: float | None = None
        self.loss = float("nan")

    def take(self, scores: Scores) -> None:
        found = whole(scores, self.me)
        self.scores = dataclasses.replace(found, labels=self.task.truth.of(found.labels))

    def row(self, record: Evaluation) -> dict[str, float]:
        """The evaluation as a row of the history; `accuracy` is what candidates are compared by."""
        assert self.scores is not None
        name = self.trial.metric
        if self.trial.kind == "final":
            self.numbers = predictions.all_metrics(self.scores.logits, self.scores.labels, [name])
            self.value = self.numbers[name]
        else:
            self.value = metrics.compute(name, self.scores.logits, self.scores.labels)
        self.loss = record.loss
        row = {"step": record.step, "time_s": record.time_s, "loss": record.loss, "accuracy": self.value}
        if self.trial.kind == "search":
            self.curve.append(row)
        return row


def finetune_entry(
    sweep: Sweep, trial: Trial, curve: list[dict[str, float]], *, value: float | None, seconds_s: float, **facts: Any
) -> LedgerEntry:
    """The entry of a fine-tuning trial that got as far as the last row of `curve`, which may be short of its end."""
    task, method = sweep.task(trial.task), sweep.recipe_of(trial)
    num_train = _num_images(task, method, trial)
    settings: Any = method.settings
    batch = min(settings.batch, num_train * repeats_of(settings, num_train))
    return sweep.entry(
        trial,
        value=value,
        num_train=num_train,
        history=curve,
        seconds_s=seconds_s,
        images_seen=int(curve[-1]["step"]) * batch if curve else 0,
        **facts,
    )
