"""What a run does about updates that are not finite: it skips each, after three in a row rolls back, at a fourth stops.

A rollback restores the newest checkpoint that verifies and skips, from there on, the data of the three updates. They are
written to `left_out.json` in the run's folder, so that every later start skips them too: the run goes on as if
`data.skip_steps` had named these data from the beginning.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline import distributed, documents
from pipeline.checkpoint.part_writer import sentence
from pipeline.distributed import World
from pipeline.engine.update_stats import UpdateStats
from pipeline.errors import Diverged, UserError
from pipeline.records import Notice, Record, RolledBack, Skipped
from pipeline.storage import objects
from pipeline.training import resume
from pipeline.training.run import Run
from pipeline.training.trainer import Job

NAME = "left_out.json"
MAX_IN_A_ROW = 3


@dataclass
class NonFiniteStreak:
    """Updates in a row that were not finite. Equal on all ranks, since it follows from what they agree on."""

    steps: list[int] = field(default_factory=list)
    """In a row, as steps of the run; those before a rollback stay until the run has got past them."""
    went_back_to: str | None = None
    """URL of the checkpoint of the last rollback."""
    new_from: int = 0
    """Step from which, since then, the data are others than before."""

    def applied(self, step: int) -> None:
        """An update before `new_from` repeats one that had been applied before, and proves nothing."""
        if step >= self.new_from:
            self.steps.clear()

    def skipped(self, step: int) -> None:
        """UserError for the first one after a rollback that the run has not got past: a second one would not help."""
        self.steps.append(step)
        if len(self.steps) > MAX_IN_A_ROW:
            raise UserError(
                f"the update of step {step} was not finite, after {MAX_IN_A_ROW} others and going back to {self.went_back_to} "
                f"without their data; lower optim.learning_rate or optim.clipping in a run of its own folder, or look at the "
                f"data that {NAME} names"
            )

    @property
    def reason(self) -> str:
        return f"the updates of steps {self.steps[0]} to {self.steps[-1]} were not finite"


class Rollback:
    """The updates of a run that were not finite, and the way back. All ranks call the same methods at the same steps."""

    def __init__(self, job: Job, *, is_allowed: bool) -> None:
        """`is_allowed`: False ends the run (`Diverged`) in place of a rollback."""
        self._job, self._is_allowed, self._streak = job, is_allowed, NonFiniteStreak()

    def applied(self) -> None:
        """The update before the job's step was applied."""
        self._streak.applied(self._job.step - 1)

    def skipped(self, stats: UpdateStats) -> Skipped:
        """All ranks skipped the update before the job's step; UserError if the run must end for it."""
        job, step = self._job, self._job.step - 1
        reason = f"loss {stats.loss}, gradient not finite"
        job.account.skipped(step, reason)
        self._streak.skipped(step)
        return Skipped(step=job.step, reason=reason, samples=job.samples, keys=job.sample_keys([step]))

    @property
    def is_due(self) -> bool:
        return len(self._streak.steps) == MAX_IN_A_ROW

    def roll_back(self) -> Iterator[Record]:
        """Go back to the newest checkpoint that verifies; the data of the updates in the streak are skipped from now on."""
        job, streak, reason = self._job, self._streak, self._streak.reason
        if not self._is_allowed:
            raise Diverged(f"{reason}; lower optim.learning_rate or optim.clipping")
        yield from job.saver.settle()
        with job.clock("save"):
            commit, passed = resume.newest(job.out, job.cache_dir, job.world)
        yield from passed
        if commit is None or commit.url == streak.went_back_to:
            why = "no checkpoint stands" if commit is None else f"{commit.url} has been gone back to before"
            raise UserError(
                f"{reason}, and {why}; lower optim.learning_rate or optim.clipping, or save more often (save_every)"
            )
        steps = [s for s in streak.steps if s >= commit.step]
        data = job.run.data
        skipped, keys = f"{data.data_step(steps[0])}:{data.data_step(steps[-1]) + 1}", job.sample_keys(steps)
        row = {"steps": skipped, "reason": reason, "checkpoint": commit.url, "keys": list(keys)}
        yield from _write(job, row)
        went = RolledBack(step=commit.step, from_step=job.step, checkpoint=commit.url, reason=reason, keys=keys)
        streak.went_back_to, streak.new_from = commit.url, steps[0]
        job.go_back(without(job.run, [skipped]), commit)
        yield went
        yield from job.check.judge()


def _write(job: Job, row: dict[str, Any]) -> list[Record]:
    """The run goes on without the file; only a later start would meet the same updates again."""
    if not job.world.is_main:
        return []
    try:
        write(job.out, row)
    except Exception as error:  # clients of stores raise what they like
        text = f"what is skipped could not be written: {sentence(error, objects.join(job.out, NAME))}"
        return [Notice(step=job.step, text=text)]
    return []


def without_skipped(run: Run, out: str, me: World) -> Run:
    """The run without the data that earlier attempts in its folder skipped; rank 0 reads for all."""
    return without(run, distributed.from_main(me, lambda: [row["steps"] for row in read(out)]))


def without(run: Run, ranges: Iterable[str]) -> Run:
    """The run with more ranges of data steps, "FIRST:END", skipped."""
    return replace(run, data=replace(run.data, skip_steps=joined([*run.data.skip_steps, *ranges])))


def joined(ranges: Iterable[str]) -> tuple[str, ...]:
    """Ranges "FIRST:END" in order, those that touch or overlap made one."""
    found: list[list[int]] = []
    for first, end in sorted(tuple(map(int, text.split(":"))) for text in ranges):
        if found and first <= found[-1][1]:
            found[-1][1] = max(found[-1][1], end)
        else:
            found.append([first, end])
    return tuple(f"{first}:{end}" for first, end in found)


def read(out: str) -> list[dict[str, Any]]:
    """Rows of steps ("FIRST:END" of the data), reason, checkpoint, keys; none where nothing was skipped."""
    url = objects.join(out, NAME)
    try:
        content = documents.read(url, list[dict[str, Any]], remedy="restore it, or delete it to use those data")
        joined(row["steps"] for row in content)
    except FileNotFoundError:
        return []
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{url} does not list what the run skipped ({error}); restore it, or delete it to use those data"
        ) from None
    return content


def write(out: str, row: dict[str, Any]) -> None:
    objects.write_bytes(objects.join(out, NAME), (json.dumps([*read(out), row], indent=1) + "\n").encode())
