"""A run in progress: what the loop (`pipeline.training.train`) needs, made in the order in which mistakes are cheapest to find.

What happens between two steps is a method here: the decision where to start, reports, evaluations, saves. Rollbacks and ends
of runs are in `pipeline.training.rollback` and `pipeline.training.leaving`.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from nfnet.analysis.flops import training_flops
from nfnet.analysis.matrix_rate import matrix_rate
from pipeline import distributed
from pipeline.checkpoint import load, retention
from pipeline.checkpoint.commit import Commit
from pipeline.checkpoint.retention import Policy
from pipeline.checkpoint.saver import Saver
from pipeline.compilation.compile_engine import compiled
from pipeline.configuration import to_dict
from pipeline.data.loading.batches import Batch
from pipeline.data.loading.datasets import EvalData, TrainData
from pipeline.data.loading.sample_ledger import plan
from pipeline.distributed import World
from pipeline.duration import Duration
from pipeline.engine import parity_check
from pipeline.engine.engine import Engine
from pipeline.engine.update_stats import UpdateStats, over_updates
from pipeline.models.backbone import build_model
from pipeline.models.teacher import Teacher
from pipeline.records import Notice, Phase, Record, Started, Step
from pipeline.supervision.phase_clock import Clock
from pipeline.supervision.stop_signals import StopSignal
from pipeline.training import identity, resume
from pipeline.training.batch_fetcher import BatchFetcher, placeholder_batch
from pipeline.training.evaluate import OnScores, evaluate
from pipeline.training.resume_check import ResumeCheck
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
        self.run, self.out, self.world, self.clock, self.stop = run, out, me, clock, stop
        self._on_scores = on_scores
        clock.steps_done = lambda: self.step
        self.step = 0
        self.micro_batch, self.accumulation = run.batch_plan(me.size)
        self.data = TrainData(run.data, run.augment, seed=run.seed, global_batch=run.global_batch, world=me)
        self.eval_data = EvalData(run.data, run.augment, world=me) if run.data.eval_split else None
        self.cache_dir = load.default_cache()
        self.total_steps = self._steps(run.duration)
        self.warmup_steps = self._steps(run.optim.warmup)
        self.eval_steps = self._steps(run.eval_every)
        self.save_steps = self._steps(run.save_every)
        self.account = Account(self.data, run, total_steps=self.total_steps, out=out, world=me)
        self.updates: list[UpdateStats] = []  # since the last report
        self.check = ResumeCheck(run.saving.stop_after_resume, me)
        self.teacher: Teacher | None = None
        self.must_leave = False
        """All ranks have agreed to stop."""
        self.evaluation: dict[str, float] = {}
        """loss, top1, top5 of the last one."""

    def _steps(self, duration: Duration | None) -> int:
        """0 of None."""
        if duration is None:
            return 0
        return duration.steps(samples_per_epoch=self.data.samples_per_epoch, global_batch=self.run.global_batch)

    def start(self) -> Iterator[Record]:
        """Resume decision (own newest checkpoint > named weights > fresh), engine, plan."""
        found = resume.find(
            self.run, self.out, self.data, world=self.world, cache_dir=self.cache_dir, num_steps=self._steps
        )
        commit, self.data.names = found.commit, list(found.names)
        yield from found.records
        if self.run.optim.advice:
            yield Notice(step=0, text=self.run.optim.advice)
        yield Phase(step=0, name="starting the engine")
        if self.run.engine.parity_check:
            parity_check.check(self.run.engine, world=self.world, accumulation=self.accumulation)
        # Restored weights take the place of all that it would start from, which may be gone by now.
        config = self.run.model if commit is None else replace(self.run.model, init_from=None)
        model, start = build_model(config, len(self.data.classes), seed=self.run.seed)
        if commit is None:
            distributed.from_main(self.world, lambda: identity.claim_start(self.out, start))
        num_parameters = sum(p.numel() for p in model.parameters())  # before stage 3 empties them
        px = self.run.augment.image_px
        self.image_flops, why_not = distributed.from_main(self.world, lambda: training_flops(model, px))
        if why_not:
            yield Notice(step=0, text=why_not)
        batches = {"micro_batch": self.micro_batch, "accumulation": self.accumulation}
        self.engine = Engine(model, optim=self.run.optim, config=self.run.engine, world=self.world, **batches)
        if commit is not None:
            self.restore(commit)
        table = self.data.label_table
        self.label_table = None if table is None else table.to(self.world.device)
        num = len(self.data.classes)
        how = yield from compiled(self.engine, self.run.engine, self.run.augment, num, table is not None)
        self.device_flops = matrix_rate(self.world.device, bf16=self.run.engine.precision == "bf16")
        self._start_saver(commit)
        self.first_step = self.step
        yield from self.account.restore(self.step)
        yield self._plan(commit, num_parameters, how)
        yield from self.check.judge()

    def restore(self, commit: Commit) -> None:
        resume.refuse_other_network(commit, self.engine.shapes, self.engine.buffer_types)
        self.engine.restore(
            commit.kinds, lambda pieces: load.fill(commit, self.cache_dir, pieces, self.world), commit.num_updates
        )
        self.step, self.evaluation = commit.step, dict(commit.evaluation)
        same_data = list(self.run.data.skip_steps) == commit.config.get("data", {}).get("skip_steps")
        self.check.restored(self.step, commit.expected, self.engine.state_sums(), same_data=same_data)

    def go_back(self, run: Run, commit: Commit) -> None:
        """To the state of an earlier checkpoint, with other data from there on."""
        self.run = run
        self.data.config = run.data
        with self.clock("save"):
            self.restore(commit)
        self.saver.newest, self.updates = commit, []
        self.account.rewind(self.step)
        self.clock.take()

    def _start_saver(self, commit: Commit | None) -> None:
        run, saving = self.run, self.run.saving
        policy = Policy(
            last=run.keep_checkpoints,
            every_steps=self._steps(saving.keep_every),
            best=saving.keep_best,
            metric=saving.best_metric,
        )
        taken = retention.folder_names(self.out) if self.world.is_main else set()
        self.saver = Saver(
            self.out,
            config=saving,
            policy=policy,
            world=self.world,
            taken=taken,
            stall_s=STALLED * max(run.watchdog.save_limit_s, run.watchdog.limit_s),
            is_enough=lambda: self.stop.left_s < KEPT_FOR_THE_DISK * self.stop.grace_s,
        )
        self.saver.newest = commit
        if self.save_steps or run.save_final:
            weights = sum(v.numel() for k, v in self.engine.local_fragments().items() if k.startswith("weights/"))
            self.saver.reserve(4 * weights * run.optim.num_states)

    def _plan(self, commit: Commit | None, num_parameters: int, passes: str) -> Started:
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
            passes=passes,
            resumed_from=commit.url if commit else None,
            config=to_dict(run),
            config_digest=run.digest(),
            dataset_digest=self.data.digest,
            image_flops=self.image_flops,
            device_flops=self.device_flops,
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
        placeholder = placeholder_batch(self.micro_batch, self.run.augment.image_px)
        return BatchFetcher(source, stop=self.stop, placeholder=placeholder, device=self.world.device)

    def sample_keys(self, steps: list[int]) -> tuple[str, ...]:
        """Of the different samples of all ranks at these steps."""
        return tuple(key for step in steps for *_, key in self.data.keys(step, self.run.global_batch))

    def due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def reports_after(self, step: int) -> bool:
        return step == self.total_steps or step % self.run.log_every_steps == 0

    @property
    def samples(self) -> int:
        return self.step * self.run.global_batch

    def report(self, rate: float) -> Step:
        updates, num = self.updates, len(self.updates)
        times = self.clock.means(num)
        flops_s = self.image_flops * self.run.global_batch / self.world.size / times["step_s"]
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
            images_per_s=self.run.global_batch / times["step_s"],
            flops_share=flops_s / self.device_flops if flops_s else None,
            remaining_s=(self.total_steps - self.step) * times["step_s"],
            **times,
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
                batch_size=self.engine.evaluation_batch,
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
        return distributed.broadcast(self.world, self.saver.newest_step < self.step)

    def _save(self, final: bool) -> list[Record]:
        records = self.account.write(self.step)
        facts, fragments = self._facts(), self.engine.local_fragments()
        return records + self.saver.save(step=self.step, fragments=fragments, facts=facts, final=final)

    def _facts(self) -> dict[str, Any]:
        """What a commit file says besides its files."""
        return {
            "samples": self.samples,
            "num_updates": self.engine.num_updates,
            "shapes": {n: list(s) for n, s in self.engine.shapes.items()},
            "buffers": self.engine.buffer_types,
            "config": to_dict(self.run),
            "config_digest": self.run.digest(),
            "dataset": {"name": self.data.manifest.name, "url": self.run.data.url, "digest": self.data.digest},
            "classes": self.data.classes,
            "evaluation": self.evaluation,
            "expected": self.check.expected(
                self.engine.state_sums(), self.data.numbers(self.step, self.run.global_batch)
            ),
        }
