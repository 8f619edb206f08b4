"""What a run lost on the way, agreed over its ranks, entered in the ledger, and held against the budget."""

import threading
from collections.abc import Iterator
from dataclasses import asdict

from pipeline import distributed as world
from pipeline.checkpoint.part_writer import sentence
from pipeline.data.loading.batches import Batch
from pipeline.data.loading.datasets import TrainData
from pipeline.data.loading.sample_ledger import NAME, Ledger, Page
from pipeline.distributed import World
from pipeline.engine.update_stats import UpdateStats
from pipeline.errors import UserError
from pipeline.records import Accounted, Lost, Notice, Record
from pipeline.storage import objects
from pipeline.training.run import Run

FINAL_WAIT_S = 30.0
"""For which the end of a run waits for its account."""


class Account:
    """The ledger of a run in progress. All ranks call the same methods at the same steps."""

    def __init__(self, data: TrainData, run: Run, *, total_steps: int, out: str, world: World) -> None:
        self._data, self._run, self._out, self._world = data, run, out, world
        self._total_steps = total_steps
        self._ledger = Ledger(data, global_batch=run.global_batch)
        self._notices: set[str] = set()
        self._writing: threading.Thread | None = None
        self._failure = ""
        self.over_budget: UserError | None = None
        """Why the run must end; None while it may go on."""

    @property
    def _budget(self) -> int:
        """Images an epoch, copies counted."""
        return self._data.lost_allowed * self._run.data.repeats

    def allowed(self, step: int) -> int:
        """Images that this step may still lose on all ranks together."""
        return self._budget - self._ledger.lost_since_epoch_began(step)

    def enter(self, step: int, stats: UpdateStats, seen: list[Batch]) -> Iterator[Record]:
        """Enters what a step lost. The ranks talk to each other about it only where the step's one collective said so."""
        if stats.num_samples != self._run.global_batch:
            raise RuntimeError(f"step {step} saw {stats.num_samples} images, not {self._run.global_batch}")
        for text in {b.notice for b in seen if b.notice} - self._notices:
            self._notices.add(text)
            yield Notice(step=step, text=text)
        if not stats.num_lost:
            return
        allowed = self.allowed(step)
        of_ranks = world.gather(self._world, [loss for b in seen for loss in b.lost])
        found = [loss for losses in of_ranks for loss in losses]
        self._ledger.lost(step, found)
        num_epoch = self._ledger.lost_since_epoch_began(step)
        yield Lost(
            step=step, samples=tuple(asdict(loss) for loss in found), num_epoch=num_epoch, num_allowed=self._budget
        )
        if stats.num_lost > allowed:
            loss = found[0]
            self.over_budget = UserError(
                f"step {step} lost {len(found)} images, more than data.max_lost_share allows in an epoch "
                f"({self._data.lost_allowed}), the first {loss.key} of {loss.shard}: {loss.reason}; restore the data or raise "
                f"the budget, then run again: it goes on from the newest checkpoint"
            )

    def skipped(self, step: int, reason: str) -> None:
        """The update of this step was skipped, so none of its samples was used."""
        self._ledger.skipped(step, reason)

    def closed(self, step: int) -> Iterator[Record]:
        """The passes with losses that have just ended."""
        for page in self._ledger.closed(step):
            yield _accounted([page], step, page.epoch)

    def close(self, step: int) -> Iterator[Record]:
        """The account of the whole run, by source."""
        yield from self.write(step, final=True)
        pages = self._ledger.pages(step)
        for source in dict.fromkeys(page.source for page in pages):
            yield _accounted([page for page in pages if page.source == source], step, None)

    def epochs(self, step: int) -> float:
        return self._ledger.epochs(step)

    def dropped(self) -> int:
        """Samples of the last passes that the run will not reach."""
        return sum(page.dropped for page in self._ledger.pages(self._total_steps))

    def write(self, step: int, *, final: bool = False) -> list[Record]:
        """Write `ledger.json` alongside training, which a slow or dead store must not hold up; failures are reported, once each.

        While one writing is under way the next is skipped: the one after it holds everything. `final` waits.
        """
        if not self._world.is_main:
            return []
        if final and self._writing is not None:
            self._writing.join(FINAL_WAIT_S)
        if self._writing is None or not self._writing.is_alive():
            where, content = objects.join(self._out, NAME), self._ledger.to_json(step)
            self._writing = threading.Thread(target=self._put, args=(where, content), daemon=True)
            self._writing.start()
        if final or objects.is_local(self._out):
            self._writing.join(FINAL_WAIT_S)
        failure, self._failure = self._failure, ""
        if not failure and final and self._writing.is_alive():
            failure = f"the account of the samples was not written to {self._out} within {FINAL_WAIT_S:.0f} s"
        if not failure or failure in self._notices:
            return []
        self._notices.add(failure)
        return [Notice(step=step, text=failure)]

    def _put(self, where: str, content: bytes) -> None:
        try:
            objects.write_bytes(where, content)
        except Exception as error:  # clients of stores raise what they like; the run is worth more than its account
            self._failure = f"the account of the samples could not be written: {sentence(error, where)}"

    def restore(self, step: int) -> Iterator[Record]:
        """Rank 0 reads what was lost before, and the others take its account over."""
        found = world.from_main(self._world, lambda: self._ledger.read(self._out, step))
        self._ledger.restore(found or {}, step)
        if step and found is None:
            text = f"there is no {NAME} in {self._out}: what was lost before step {step} is not in the account"
            yield Notice(step=step, text=text)

    def rewind(self, step: int) -> None:
        """The run has gone back to `step`: what happened from there on will happen again, or will not."""
        self._ledger.rewind(step)


def lost_in(seen: list[Batch]) -> float:
    """Samples that a rank's share of a step could not read; infinite where a micro-batch had none to go on with."""
    return float("inf") if any(b.is_placeholder for b in seen) else float(sum(len(b.lost) for b in seen))


def _accounted(pages: list[Page], step: int, epoch: int | None) -> Accounted:
    names = ("manifest", "used", "skipped", "dropped", "excluded", "repeated")
    sums = {name: sum(getattr(page, name) for page in pages) for name in names}
    return Accounted(step=step, source=pages[0].source, epoch=epoch, **sums)
