"""A run in progress: what the loop (`pipeline.training.train`) needs, made in the order in which mistakes are cheapest to find.

Everything that happens between two steps is a method here: the decision where to start, reports, evaluations, saves, ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

from pipeline import distributed
from pipeline.checkpoint import load, retention
from pipeline.checkpoint.commit import Commit
from pipeline.checkpoint.part_writer import sentence
from pipeline.checkpoint.retention import Policy
from pipeline.checkpoint.saver import Saver
from pipeline.configuration import to_dict
from pipeline.data.loading.batches import Batch
from pipeline.data.loading.datasets import EvalData, TrainData
from pipeline.data.loading.sample_ledger import plan
from pipeline.distributed import World
from pipeline.duration import Duration
from pipeline.engine import parity_check
from pipeline.engine.engine import Engine
from pipeline.engine.update_stats import UpdateStats, over_updates
from pipeline.errors import Diverged, UserError
from pipeline.models import timm_models
from pipeline.models.backbone import build_model
from pipeline.records import Changed, Finished, Notice, Phase, Record, RolledBack, Skipped, Started, Step, Stopped
from pipeline.storage import objects
from pipeline.supervision.phase_clock import Clock
from pipeline.supervision.stop_signals import A_SIGNAL, StopSignal
from pipeline.training import identity, resume, rollback
from pipeline.training.batch_fetcher import Supply, void_batch
from pipeline.training.evaluate import OnScores, evaluate
from pipeline.training.rollback import Trouble
from pipeline.training.run import Run
from pipeline.training.sample_account import Account

STALLED = 0.5
"""The share of the watchdog's limit for saves after which one that does not move is given up, and its state kept here instead:
the watchdog would end the run without it."""
KEPT_FOR_THE_DISK = 0.5
"""The share of the grace period that a save into the run's own place leaves for one onto this machine's disk."""


class Job:
    """One run on this rank. All ranks call the same methods at the same steps."""

    def __init__(
        self, run: Run, out: str, me: World, clock: Clock, stop: StopSignal, on_scores: OnScores | None = None
    ) -> None:
        run = rollback.with_left_out(run, out, me)
        self.run, self.out, self.world, self.clock, self.stop = run, out, me, clock, stop
        self._on_scores = on_scores
        clock.steps_done = lambda: self.step
        self.step = 0
        self.micro_batch, self.accumulation = run.batch_plan(me.size)
        self.data = TrainData(run.data, run.augment, seed=run.seed)
        self.eval_data = EvalData(run.data, run.augment) if run.data.eval_split else None
        self.cache_dir = load.default_cache()
        self.total_steps = self._steps(run.duration)
        self.warmup_steps = self._steps(run.optim.warmup)
        self.eval_steps = self._steps(run.eval_every) if run.eval_every else 0
        self.save_steps = self._steps(run.save_every) if run.save_every else 0
        if self.total_steps < 1:
            raise UserError(f"duration {run.duration} gives no step of {run.global_batch} samples; make it longer")
        self.account = Account(self.data, run, total_steps=self.total_steps, out=out, world=me)
        self.updates: list[UpdateStats] = []  # since the last report
        self.must_leave = False
        """All ranks have agreed to stop."""
        self.trouble = Trouble()
        self.evaluation: dict[str, float] = {}
        """loss, top1, top5 of the last one."""

    def _steps(self, duration: Duration) -> int:
        return duration.steps(samples_per_epoch=self.data.samples_per_epoch, global_batch=self.run.global_batch)

    def start(self) -> Iterator[Record]:
        """Resume decision (own newest checkpoint > named weights > fresh), engine, plan."""
        for what, text in identity.refuse_mixed_ranks(self.world, self.run, identity.of_run(self.data)).items():
            yield Changed(step=0, what=f"{what} of machines", text=text)
        found = distributed.from_main(
            self.world,
            lambda: resume.find(self.run, self.out, self.data, cache_dir=self.cache_dir, num_steps=self._steps),
        )
        commit, self.data.names = found.commit, list(found.names)
        yield from found.records
        yield Phase(step=0, name="starting the engine")
        if self.run.engine.parity_check:
            parity_check.check(self.run.engine, world=self.world, accumulation=self.accumulation)
        # Restored weights take the place of all that it would start from, which may be gone by now.
        config = self.run.model if commit is None else replace(self.run.model, init_from=None)
        model, start = build_model(config, len(self.data.classes), seed=self.run.seed)
        if commit is None:
            distributed.from_main(self.world, lambda: identity.claim_start(self.out, start))
        timm_models.refuse_buffers(config.name, model)
        self.engine = Engine(
            model,
            optim=self.run.optim,
            config=self.run.engine,
            world=self.world,
            micro_batch=self.micro_batch,
            accumulation=self.accumulation,
        )
        if commit is not None:
            self._restore(commit)
        self._start_saver(commit)
        self.first_step = self.step
        self.account.restore(self.step)
        yield self._plan(commit, sum(p.numel() for p in model.parameters()))

    def _restore(self, commit: Commit) -> None:
        self.engine.restore(load.load_state(commit, self.cache_dir), commit.num_updates)
        self.step, self.evaluation = commit.step, dict(commit.evaluation)

    def _start_saver(self, commit: Commit | None) -> None:
        run, saving = self.run, self.run.saving
        policy = Policy(
            last=run.keep_checkpoints,
            every_steps=self._steps(saving.keep_every) if saving.keep_every else 0,
            best=saving.keep_best,
            metric=saving.best_metric,
        )
        taken = retention.folder_names(self.out) if self.world.is_main else set()
        watchdog = run.watchdog
        self.saver = Saver(
            self.out,
            config=saving,
            policy=policy,
            world=self.world,
            taken=taken,
            stall_s=STALLED * max(watchdog.save_limit_s, watchdog.limit_s),
            is_enough=lambda: self.stop.left_s < KEPT_FOR_THE_DISK * self.stop.grace_s,
        )
        self.saver.newest = commit
        if self.save_steps or run.save_final:
            weights = sum(v.numel() for k, v in self.engine.local_fragments().items() if k.startswith("weights/"))
            self.saver.reserve(4 * weights * (2 + (run.optim.ema_decay is not None)))

    def _plan(self, commit: Commit | None, num_parameters: int) -> Started:
        run, per_epoch = self.run, self.data.samples_per_epoch
        return Started(
            step=self.step,
            run_name=run.name,
            run_dir=self.out,
            total_steps=self.total_steps,
            total_samples=self.total_steps * run.global_batch,
            samples_per_epoch=per_epoch,
            steps_per_epoch=per_epoch / run.global_batch,
            dropped_samples=self.account.dropped(),
            global_batch=run.global_batch,
            micro_batch=self.micro_batch,
            accumulation=self.accumulation,
            num_ranks=self.world.size,
            num_parameters=num_parameters,
            device=distributed.device_name(self.world.device),
            zero_stage=run.engine.zero_stage,
            precision=run.engine.precision,
            resumed_from=commit.url if commit else None,
            config=to_dict(run),
            config_digest=run.digest(),
            dataset_digest=self.data.digest,
            data_plan=plan(self.data, global_batch=run.global_batch, total_steps=self.total_steps),
        )

    def batches(self) -> Iterator[Batch]:
        """This rank's micro-batches from the next step on."""
        source = self.data.batches(
            steps=range(self.step, self.total_steps),
            global_batch=self.run.global_batch,
            micro_batch=self.micro_batch,
            world=self.world,
        )
        void = void_batch(self.micro_batch, self.run.augment.image_px)
        return Supply(source, stop=self.stop, void=void, device=self.world.device)

    def due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def reports_after(self, step: int) -> bool:
        return step == self.total_steps or step % self.run.log_every_steps == 0

    @property
    def samples(self) -> int:
        return self.step * self.run.global_batch

    def skipped(self, stats: UpdateStats) -> Skipped:
        """All ranks left the update of the step before out; UserError if the run must end for it."""
        step = self.step - 1
        reason = f"loss {stats.loss}, gradient not finite"
        self.account.left_out(step, reason)
        self.trouble.left_out(step)
        return Skipped(step=self.step, reason=reason, samples=self.samples, keys=self._keys([step]))

    def _keys(self, steps: list[int]) -> tuple[str, ...]:
        """Of the different samples of all ranks at these steps."""
        return tuple(key for step in steps for *_, key in self.data.keys(step, self.run.global_batch))

    def diverged(self) -> UserError:
        """What ends a run that may not go back."""
        steps = self.trouble.steps
        return Diverged(
            f"the updates of steps {steps[0]} to {steps[-1]} were not finite; lower optim.learning_rate or optim.clipping"
        )

    def roll_back(self) -> Iterator[Record]:
        """Go back to the newest checkpoint that verifies; the data of the updates in trouble are left out from now on."""
        steps = self.trouble.steps
        yield from self.saver.settle()
        with self.clock("save"):
            commit, passed = distributed.from_main(self.world, lambda: resume.newest(self.out, self.cache_dir))
        yield from passed
        reason = f"the updates of steps {steps[0]} to {steps[-1]} were not finite"
        if commit is None or commit.url == self.trouble.went_back_to:
            why = "no checkpoint stands" if commit is None else f"{commit.url} has been gone back to before"
            raise UserError(
                f"{reason}, and {why}; lower optim.learning_rate or optim.clipping, or save more often (save_every)"
            )
        steps = [s for s in steps if s >= commit.step]
        data = self.run.data
        left_out, keys = f"{data.data_step(steps[0])}:{data.data_step(steps[-1]) + 1}", self._keys(steps)
        yield from self._write_left_out(
            {"steps": left_out, "reason": reason, "checkpoint": commit.url, "keys": list(keys)}
        )
        went = RolledBack(step=commit.step, from_step=self.step, checkpoint=commit.url, reason=reason, keys=keys)
        self.trouble.went_back(commit.url, steps[0])
        self.run = rollback.without(self.run, [left_out])
        self.data.config = self.run.data
        with self.clock("save"):
            self._restore(commit)
        self.saver.newest, self.updates = commit, []
        self.account.rewind(self.step)
        self.clock.take()
        yield went

    def _write_left_out(self, row: dict[str, Any]) -> list[Record]:
        """The run goes on without the file; only a later start would meet the same updates again."""
        if not self.world.is_main:
            return []
        try:
            rollback.write(self.out, row)
        except Exception as error:  # clients of stores raise what they like
            text = f"what is left out could not be written: {sentence(error, objects.join(self.out, rollback.NAME))}"
            return [Notice(step=self.step, text=text)]
        return []

    def leave_over_budget(self) -> Iterator[Record]:
        """Ends the run on all ranks where the step lost more than is allowed; it was not applied, what came before is saved."""
        error = self.account.over_budget
        if error is None:
            return
        yield from self.account.write(self.step, final=True)
        yield from self.save_last(if_any=self.run.save_every is not None)
        raise error

    def report(self, rate: float) -> Step:
        updates = self.updates
        num = len(updates)
        wall_s, spent_s = self.clock.take()
        step_s = (wall_s - spent_s["save"] - spent_s["evaluate"]) / num
        applied = [u for u in updates if u.applied] or updates  # a skipped one's loss would hide the others'
        n = len(applied)
        record = Step(
            step=self.step,
            num_updates=num,
            samples=self.samples,
            epoch=self.account.epochs(self.step),
            loss=sum(u.loss for u in applied) / n,
            accuracy=sum(u.accuracy for u in applied) / n,
            learning_rate=rate,
            clipped_share=sum(u.clipped_share for u in applied) / n,
            gradient_norm=applied[-1].gradient_norm,
            parts=over_updates([u.parts for u in applied]),
            images_per_s=self.run.global_batch / step_s,
            data_wait_s=spent_s["wait"] / num,
            transfer_s=spent_s["transfer"] / num,
            compute_s=spent_s["compute"] / num,
            save_s=spent_s["save"] / num,
            log_s=spent_s["log"] / num,
            evaluate_s=spent_s["evaluate"] / num,
            other_s=spent_s["other"] / num,
            wall_s=wall_s / num,
            step_s=step_s,
            remaining_s=(self.total_steps - self.step) * step_s,
        )
        self.updates = []
        return record

    def evaluate(self) -> Iterator[Record]:
        """Nothing, on all ranks, where the evaluation was given up for a stop."""
        assert self.eval_data is not None
        yield Phase(step=self.step, name="evaluating")
        with self.clock("evaluate"), self.engine.evaluation_network() as (network, weights):
            found = evaluate(
                network,
                self.eval_data,
                self.run.augment,
                world=self.world,
                batch_size=max(self.micro_batch, 64),
                step=self.step,
                weights=weights,
                bf16=self.run.engine.precision == "bf16",
                on_scores=self._on_scores,
                stop=self.stop,
                tick=self.clock.tick,
            )
        self.must_leave = found is None
        if found is not None:
            self.evaluation = {"loss": found.loss, "top1": found.top1, "top5": found.top5}
            yield found

    def save(self, *, final: bool = False) -> list[Record]:
        """Begin a save; when `final`, see it through."""
        with self.clock("save"):
            return self._save(final)

    def save_last(self, *, if_any: bool = True) -> Iterator[Record]:
        """Before the run leaves, its state is saved: in its own place, or else on this machine's disk."""
        with self.clock("save"):
            records = self.saver.settle()
            if if_any and self._is_unsaved():
                records += self._save(final=True)
            if if_any and self._is_unsaved():
                records += self.saver.keep(step=self.step, fragments=self.engine.whole_state(), facts=self._facts())
        yield from records

    def _is_unsaved(self) -> bool:
        """Rank 0's word: of a save that was given up, the others may know less."""
        return cast(bool, distributed.broadcast(self.world, self.saver.newest_step < self.step))

    def _save(self, final: bool) -> list[Record]:
        said = self.account.write(self.step)
        facts, fragments = self._facts(), self.engine.local_fragments()
        return said + self.saver.save(step=self.step, fragments=fragments, facts=facts, final=final)

    def _facts(self) -> dict[str, Any]:
        """What a commit file says besides its files."""
        manifest = self.data.manifest
        return {
            "samples": self.samples,
            "num_updates": self.engine.num_updates,
            "shapes": {n: list(s) for n, s in self.engine.shapes.items()},
            "config": to_dict(self.run),
            "config_digest": self.run.digest(),
            "dataset": {"name": manifest.name, "url": self.run.data.url, "digest": self.data.digest},
            "classes": self.data.classes,
            "evaluation": self.evaluation,
        }

    def leave_stopped(self) -> Iterator[Record]:
        """All ranks have agreed to stop before the same step: it is saved, if it is not yet, and the run ends."""
        yield from self.save_last()
        yield self.stopped(self._why_stopped())
        self.engine.close()

    def _why_stopped(self) -> str:
        """The reason of a rank that has one of its own, or rank 0's."""
        reasons = [cast(str, reason) for reason in distributed.gather(self.world, self.stop.reason)]
        return next((reason for reason in reasons if reason != A_SIGNAL), A_SIGNAL)

    def leave_saved(self) -> Iterator[Record]:
        """The caller wants no more than these steps for now: they are evaluated and saved, and the run can go on from there.

        One that was killed after that save comes here at once, and is told the same numbers.
        """
        if self.eval_data is not None:
            yield from self.evaluate()
            if self.must_leave:
                yield from self.leave_stopped()
                return
        yield from self.save_last()
        if self.saver.newest_step < self.step:
            raise UserError(f"step {self.step} could not be saved ({self.saver.last_error}); mend that and start again")
        self.engine.close()

    def stopped(self, reason: str) -> Stopped:
        newest = self.saver.newest
        if self.saver.newest_step < self.step:
            reason += f"; step {self.step} could not be saved ({self.saver.last_error})"
        return Stopped(step=self.step, checkpoint=newest.url if newest else None, reason=reason)

    def finished(self) -> Finished:
        """The end, if its last checkpoint stands; else UserError, so that the exit code says so."""
        newest = self.saver.newest
        if self.run.save_final and self.saver.newest_step < self.step:
            raise UserError(
                f"all {self.step} steps are done, but the last checkpoint could not be written ({self.saver.last_error}); "
                "mend that and run the same command again"
            )
        return Finished(
            step=self.step,
            checkpoint=newest.url if newest else None,
            samples=(self.step - self.first_step) * self.run.global_batch,
            seconds_s=self.clock.elapsed_s,
            evaluation=self.evaluation,
        )
