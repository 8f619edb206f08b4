"""THE loop: pretraining and fine-tuning are the same generator of records.

    plan -> newest verified checkpoint, or the named weights, or fresh ones -> steps -> evaluation -> checkpoint

`train` yields what happens (`pipeline.records`) and knows nobody who reads it. Nothing is decided by one rank alone: finite
or not, stop or go on are agreed over all ranks before an update. All random choices are functions of (seed, step) or (seed,
epoch, sample), so a run's whole state is weights, momentum, averages, and one integer.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch

from pipeline import distributed
from pipeline.data.augment.transforms import normalise
from pipeline.data.format.manifest import Manifest
from pipeline.data.loading.batches import Batch
from pipeline.distributed import World
from pipeline.fitting.micro_batch import Asked, find
from pipeline.join import library_settings
from pipeline.join.agreement import joined
from pipeline.models.teacher import Teacher
from pipeline.profiling.asked import Steps
from pipeline.profiling.profiler import Profiler
from pipeline.profiling.ranges import span
from pipeline.records import Changed, Notice, Phase, Record
from pipeline.supervision.fault_points import STEP, reach
from pipeline.supervision.phase_clock import Clock, DeviceTimeline
from pipeline.supervision.rank_environment import place
from pipeline.supervision.stop_signals import StopSignal
from pipeline.supervision.watchdog import Watchdog
from pipeline.training import identity
from pipeline.training.check_run import check_room
from pipeline.training.evaluate import OnScores
from pipeline.training.leaving import finish, leave_over_budget, leave_stopped, leave_unfinished
from pipeline.training.rollback import Rollback, without_skipped
from pipeline.training.run import Run
from pipeline.training.sample_account import lost_in
from pipeline.training.trainer import Job


def train(
    run: Run,
    out: str,
    *,
    stop: StopSignal | None = None,
    on_scores: OnScores | None = None,
    leave_at: int = 0,
    may_save: Callable[[], bool] = lambda: True,
    goes_back: bool = True,
    profile: Steps | None = None,
    teacher: str = "",
) -> Iterator[Record]:
    """Train `run` to its end, starting from the newest verified checkpoint in the folder `out` if there is one.

    Every rank iterates it; records are equal on all ranks but for times, and but for what becomes of saves (`Saved`,
    `SaveFailed`, `SaveSkipped`), which the main rank alone yields, as soon as it knows. `on_scores` is called on every rank
    with what each evaluation's numbers are computed from, before they are yielded. Raises UserError for what the user
    can mend.

    Args:
        stop: the caller's, entered already, where it is to hear of signals before and after the loop too.
        leave_at: end after this step, evaluated and saved, with the run unfinished: the same call without it goes on. 0 = its
            end.
        may_save: asked on every rank where a save is due, and must say the same on all; False leaves that one out.
        goes_back: to the newest checkpoint, from updates that are not finite; False ends the run there (`Diverged`), so that
            its numbers do not depend on which saves there were.
        profile: steps to look at closely (`pipeline.profiling`).
        teacher: a checkpoint of the same classes that takes the place of the labels (`pipeline.models.teacher`).
    """
    clock = Clock()
    with (
        StopSignal(grace_s=run.watchdog.grace_s) if stop is None else nullcontext(stop) as stop,
        Watchdog(run.watchdog, clock=clock, stop=stop, out=out),
    ):

        def records() -> Iterator[Record]:
            yield Phase(step=0, name="reading the data's manifest")
            with joined(
                out,
                facts=lambda: identity.facts(run, place().local_rank),
                room=lambda: check_room(run, out),
                allow=run.join.allow,
            ) as (me, differences):
                fitted, found = distributed.together(me, lambda: _fitted(run, out, me))
                job = distributed.together(me, lambda: _job(fitted, out, me, clock, stop, on_scores, profile, teacher))
                yield from job.start()
                yield from differences
                yield from library_settings.compared(out, me, job.engine.library_defaults, job.step)
                if found is not None:
                    micro = job.micro_batch
                    distributed.from_main(me, lambda: identity.keep_micro_batch(out, me.size, micro))
                    yield Changed(step=job.step, what="micro_batch", text=found)
                profiler = _profiler(job, profile)
                yield from profiler.starts(job.step)
                yield from _steps(job, Rollback(job, is_allowed=goes_back), profiler, leave_at, may_save)

        for record in records():
            with clock("log"):
                yield record


def _fitted(run: Run, out: str, me: World) -> tuple[Run, str | None]:
    """The run with a micro-batch that is a number, and how it was found where it was to be."""
    if run.micro_batch != "auto":
        return run, None
    run.batch_plan(me.size)
    candidates = run.micro_batches(me.size)
    known = distributed.from_main(me, lambda: identity.read(out))
    kept = known.micro_batches.get(str(me.size)) if known is not None else None
    if kept in candidates:
        text = f"micro_batch auto: {kept} images, as at an earlier start of this run on {me.size} processes"
        return dataclasses.replace(run, micro_batch=kept), text
    classes = {name for url, _ in run.data.sources() for name in Manifest.open(url).outputs}
    asked = Asked(
        model=run.model,
        num_classes=len(classes),
        image_px=run.augment.image_px,
        optim=run.optim,
        engine=run.engine,
        global_batch=run.global_batch,
        candidates=candidates,
    )
    fit = find(asked, me)
    return dataclasses.replace(run, micro_batch=fit.micro_batch), fit.text


def _job(
    run: Run,
    out: str,
    me: World,
    clock: Clock,
    stop: StopSignal,
    on_scores: OnScores | None,
    profile: Steps | None,
    teacher: str,
) -> Job:
    job = Job(without_skipped(run, out, me), out, me, clock, stop, on_scores)
    job.teacher = Teacher(teacher, job.data.classes, me.device) if teacher else None
    if profile is not None:
        profile.check(job.total_steps)
    return job


def _profiler(job: Job, profile: Steps | None) -> Profiler:
    clock = job.clock
    names = {"wait": "data", "transfer": "transfer", "log": "records", "evaluate": "evaluation", "save": "saving"}
    clock.span = lambda phase: span(names[phase]) if phase in names else nullcontext()
    is_main = job.world.is_main
    return Profiler(profile, job.out, is_main=is_main, calls=lambda: job.engine.reductions, charge=lambda: clock("log"))


def _steps(
    job: Job, rollback: Rollback, profiler: Profiler, leave_at: int, may_save: Callable[[], bool]
) -> Iterator[Record]:
    optim, clock, stop = job.run.optim, job.clock, job.stop
    batches = job.batches()
    yield Phase(step=job.step, name="training")
    stop.started()
    _start_clock(job)
    with job.saver, profiler:
        while job.step < job.total_steps:
            yield from profiler.at(job.step)
            if job.step == leave_at > 0:
                yield from leave_unfinished(job)
                return
            reach(STEP)
            rate = optim.rate(job.step, total_steps=job.total_steps, warmup_steps=job.warmup_steps)
            seen = _forward_backward(job, batches)
            with clock("compute"):
                stats = job.engine.update(
                    rate,
                    stop_requested=stop.requested,
                    num_lost=lost_in(seen),
                    lost_allowed=job.account.allowed(job.step),
                    measure=job.reports_after(job.step + 1),
                )
            if stats.stop_requested and math.isinf(stats.num_lost):  # on some rank no batch came: the step is not done
                yield from leave_stopped(job)
                return
            yield from job.account.enter(job.step, stats, seen)
            if stats.num_lost > 0:
                yield from leave_over_budget(job)
            job.step += 1
            yield from _no_gradient(job)
            job.updates.append(stats)
            yield from job.check.updated(job.step, stats, [b.samples.numpy() for b in seen])
            yield from job.saver.poll()
            if stats.applied:
                rollback.applied()
            else:
                yield rollback.skipped(stats)
                if rollback.is_due:
                    yield from rollback.roll_back()
                    batches = job.batches()
                    continue
            if job.reports_after(job.step):
                yield job.report(rate)
            yield from job.account.closed(job.step)
            if stats.stop_requested and job.step < job.total_steps:
                yield from leave_stopped(job)
                return
            if job.due(job.eval_steps) and job.step < job.total_steps and job.step != leave_at:
                yield from job.evaluate()
                if job.must_leave:
                    yield from leave_stopped(job)
                    return
            if job.due(job.save_steps) and job.step < job.total_steps and job.step != leave_at and may_save():
                yield from job.save()
        yield from profiler.at(job.step)
    yield from finish(job)


def _start_clock(job: Job) -> None:
    job.clock.first_step = job.step
    if job.world.device.type == "cuda":
        job.clock.follow(DeviceTimeline(job.world.device))
    job.clock.take()


def _no_gradient(job: Job) -> Iterator[Record]:
    """After the first step of a start."""
    if job.step != job.first_step + 1 or not job.engine.unused:
        return
    unused, more = job.engine.unused, len(job.engine.unused) - 1
    text = f"no gradient reaches the network's {unused[0]}{f' and {more} more of its parameters' if more else ''}: nothing but "
    yield Notice(step=job.step, text=f"{text}weight decay moves them; optim.frozen leaves them as they are")


def _forward_backward(job: Job, batches: Iterator[Batch]) -> list[Batch]:
    """This rank's micro-batches of a step, whose gradients the engine has added up."""
    world, clock = job.world, job.clock
    seen: list[Batch] = []
    for micro in range(job.accumulation):
        with clock("wait"):
            batch = next(batches)
        seen.append(batch)
        _seed_step(job.run.seed, job.step, job.data.micro_batch_number(micro, world, job.accumulation))
        with clock("transfer"):
            images = normalise(batch.images, job.run.augment, world.device)
            labels = batch.targets(world.device, job.label_table)
        with clock("compute"):
            taught = job.teacher(images, labels) if job.teacher else labels
            job.engine.forward_backward(images, taught, is_last=micro == job.accumulation - 1)
    return seen


def _seed_step(seed: int, step: int, micro: int) -> None:
    """Dropout and stochastic depth as a function of (seed, step, global micro-batch): nothing to save, nothing to drift."""
    word = hashlib.sha256(f"{seed}:{step}:{micro}".encode()).digest()
    torch.manual_seed(int.from_bytes(word[:8], "little", signed=True))
