"""Saves alongside training: the step waits for a copy into host memory, a thread writes, hashes, uploads and commits.

    all ranks, main thread    wait for the save before (bounded) | agree on the folder | copy the state | go on training
    each rank, background     write its files, hashed on the way | upload them | write its part record
    main rank, background     wait for every rank's part record | write the commit file | retention

No collective runs off the main thread: ranks agree in the background by part records alone, and the main thread speaks to
the others only where every rank stands at the same place, which is at the next save and at the end. A folder's name is never
used twice, so nothing that an earlier attempt left can be taken for this one's.
"""

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from pipeline.checkpoint import retention, unsaved
from pipeline.checkpoint.commit import Commit, checkpoint_url, unused_url, write_commit
from pipeline.checkpoint.part_writer import Cancelled, sentence, wait_for_parts, write_part
from pipeline.checkpoint.retention import Policy
from pipeline.checkpoint.saving_config import SavingConfig
from pipeline.checkpoint.snapshot import HostMemory, room_bytes
from pipeline.distributed import World, from_main, gather
from pipeline.records import Notice, Record, Saved, SaveFailed, SaveSkipped
from pipeline.storage import objects
from pipeline.supervision import fault_points
from pipeline.supervision.fault_points import reach

POLL_S = 0.05


@dataclass
class _Work:
    """A save in flight on this rank. The thread fills in what follows `begin_s`; `done` is set last."""

    url: str
    step: int
    note: str
    waited_s: float
    begin_s: float = field(default_factory=time.perf_counter)
    stalled_s: float = 0.0
    seconds_s: float = 0.0
    commit: Commit | None = None
    error: str | None = None
    done: threading.Event = field(default_factory=threading.Event)
    give_up: threading.Event = field(default_factory=threading.Event)
    is_reported: bool = False


class Saver:
    """One rank's part in saving a run. Every rank calls `save` and `settle` at the same places."""

    def __init__(
        self,
        run_dir: str,
        *,
        config: SavingConfig,
        policy: Policy,
        world: World,
        taken: set[str],
        stall_s: float = math.inf,
        is_enough: Callable[[], bool] = lambda: False,
    ) -> None:
        """
        Args:
            taken: names of folders under the run's checkpoints that are there already (main rank).
            stall_s: a save that has no limit is given up when nothing of it moved on any rank for so long,
            is_enough: or when the main rank is told that it has waited enough.
        """
        self.run_dir, self.config, self.policy, self.world = run_dir, config, policy, world
        self.newest: Commit | None = None
        self.num_missed = 0
        self.last_error = ""
        self._taken = set(taken)
        self._memory = HostMemory(pin=world.device.type == "cuda")
        self._work: _Work | None = None
        self._abandoned: list[str] = []
        self._stall_s, self._is_enough = stall_s, is_enough

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """A run that ends by an error lets the save in flight end well if it can; no other rank is asked."""
        if kind is not None and self._work is not None and not self._work.done.wait(self.config.max_wait_s):
            self._work.give_up.set()

    @property
    def newest_step(self) -> int:
        """Of the newest checkpoint that this rank knows to stand; -1 if none."""
        return -1 if self.newest is None else self.newest.step

    def reserve(self, num_bytes: int) -> None:
        """Take the host memory for fragments of `num_bytes` before the first save needs it."""
        self._memory.reserve(room_bytes(num_bytes))

    def save(
        self, *, step: int, fragments: dict[str, torch.Tensor], facts: dict[str, Any], final: bool = False
    ) -> list[Record]:
        """Copy the state and have it written. `facts` are the commit file's other fields, equal on all ranks.

        Returns the records (main rank) of the save before, and of this one where it is not left to the background: when
        `final`, the wait for the save before has no limit, and this returns when the checkpoint stands or has failed.
        """
        begin_s = time.perf_counter()
        records = self.settle(None if final else self.config.max_wait_s)
        waited_s = time.perf_counter() - begin_s
        if self._work is not None:
            return records + self._skip(step, waited_s)
        url, note, writers = self._agree(step, bool(fragments))
        work = _Work(url, step, note, waited_s)
        stem = f"fragments-{self.world.rank:05d}-of-{self.world.size:05d}"
        images = self._memory.take(fragments, stem)
        reach("copied")
        work.stalled_s = time.perf_counter() - begin_s
        rank, size = self.world.rank, self.world.size
        abandoned, self._abandoned = self._abandoned, []

        def write() -> None:
            for old in abandoned:  # what a failed save left may be what this one has no room for
                retention.remove_abandoned(old)
            part = None
            if images:
                part = write_part(url, images, rank=rank, size=size, staging=self.config.staging, give_up=work.give_up)
            if rank == 0:
                parts = wait_for_parts(url, writers, size=size, mine=part, give_up=work.give_up)
                reach("commit")
                kinds = sorted({k for p in parts for k in p["kinds"]})
                files = [f for p in parts for f in p["files"]]
                work.commit = write_commit(url, step=step, kinds=kinds, files=files, facts=facts)
                work.seconds_s = time.perf_counter() - work.begin_s
                reach("committed")
                self._retain(work)
            reach("saved")

        self._start(work, write)
        if final or not self.config.in_background:
            records += self.settle()
        return records

    def poll(self) -> list[Record]:
        """What has become of the save in flight, on the main rank as soon as it knows. Waits for nobody."""
        work = self._work
        if work is None or not self.world.is_main or work.is_reported or not work.done.is_set():
            return []
        return self._report(work)

    def settle(self, limit_s: float | None = None) -> list[Record]:
        """Wait until the save in flight has ended on every rank, or for `limit_s`; then all ranks know how it ended.

        None: as long as it takes, but see `__init__`; what has not ended then is given up.
        """
        work = self._work
        if work is None:
            return []
        begin_s = moved_s = time.perf_counter()
        moves = -1
        while True:
            # Short talks in turn, not one long wait: a collective has a time limit, an upload has none.
            now_s = time.perf_counter()
            is_late = now_s - begin_s >= limit_s if limit_s is not None else self._is_hopeless(now_s - moved_s)
            answers = gather(
                self.world, (work.done.is_set(), work.error, work.commit, is_late, fault_points.num_reached)
            )
            errors = [f"rank {r}: {e}" if self.world.size > 1 else e for r, (_, e, *_) in enumerate(answers) if e]
            if (total := sum(num for *_, num in answers)) != moves:
                moves, moved_s = total, now_s
            if all(done for done, *_ in answers):
                break
            if errors:
                work.give_up.set()  # nobody writes on for a checkpoint that cannot come
            if answers[0][3]:
                if limit_s is None:
                    work.give_up.set()
                    self.last_error = "; ".join(errors) or f"{work.url} has not taken it in {now_s - begin_s:.0f} s"
                return []
            time.sleep(POLL_S) if work.done.is_set() else work.done.wait(POLL_S)
        work.commit = answers[0][2]
        work.error = None if work.commit else "; ".join(errors)
        records = [] if work.is_reported else self._report(work)
        self._work = None
        if limit_s is None:  # perhaps the last save, which no other one cleans up after; nobody writes any more
            for old in self._abandoned:
                retention.remove_abandoned(old)
            self._abandoned = []
        return records if self.world.is_main else []

    def _is_hopeless(self, still_s: float) -> bool:
        return self.world.is_main and (still_s > self._stall_s or self._is_enough())

    def keep(self, *, step: int, fragments: dict[str, torch.Tensor], facts: dict[str, Any]) -> list[Record]:
        """The whole state of a step that the run's place did not take, onto this machine's disk (main rank; others: nothing)."""
        if not self.world.is_main:
            return []
        # The memory of a save that still hangs is being read.
        memory = self._memory if self._work is None else HostMemory(pin=False)
        outcome = unsaved.keep(self.run_dir, memory.take(fragments, "fragments"), step=step, facts=facts)
        self.last_error += f"; it is not in {self.run_dir}, {outcome}"
        return [Notice(step=step, text=f"the state of step {step} could not be saved ({self.last_error})")]

    def _report(self, work: _Work) -> list[Record]:
        """Take in how a save has ended; once for each."""
        work.is_reported = True
        if work.commit is None:
            self.num_missed += 1
            self.last_error = work.error or ""
            # Room on a disk is given back by the next save. An object store may be dead, and asking it takes a minute:
            # there the leftovers wait for `retain`.
            self._abandoned += [work.url] if self.world.is_main and objects.is_local(work.url) else []
            return [SaveFailed(step=work.step, url=work.url, reason=self.last_error, num_missed=self.num_missed)]
        missed, self.num_missed, self.newest = self.num_missed, 0, work.commit
        return [
            Saved(
                step=work.step,
                url=work.url,
                digest=work.commit.digest,
                size_bytes=work.commit.size_bytes,
                seconds_s=work.seconds_s,
                stalled_s=work.stalled_s,
                waited_s=work.waited_s,
                num_missed=missed,
                note=work.note,
            )
        ]

    def _skip(self, step: int, waited_s: float) -> list[Record]:
        assert self._work is not None
        self.num_missed += 1
        reason = (
            f"the checkpoint of step {self._work.step} is still being written; if this goes on, save less often "
            "(save_every) or to a faster place"
        )
        skipped = SaveSkipped(step=step, reason=reason, waited_s=waited_s, num_missed=self.num_missed)
        return [skipped] if self.world.is_main else []

    def _agree(self, step: int, has_fragments: bool) -> tuple[str, str, list[int]]:
        """The folder, what is to be reported about it, and the ranks that write; equal on all ranks."""
        writers = [r for r, writes in enumerate(gather(self.world, has_fragments)) if writes]
        url, note = from_main(self.world, lambda: self._place(step))
        return url, note, writers

    def _place(self, step: int) -> tuple[str, str]:
        first, url = checkpoint_url(self.run_dir, step), unused_url(self.run_dir, step, self._taken)
        self._taken.add(url.rsplit("/", 1)[-1])
        return url, "" if url == first else f"{first} holds a damaged or unfinished checkpoint and was left as it is"

    def _start(self, work: _Work, write: Callable[[], None]) -> None:
        def run() -> None:
            try:
                write()
            except Cancelled as error:
                work.error = work.error or str(error)
            except Exception as error:
                work.error = sentence(error, work.url)
            finally:
                work.done.set()

        self._work = work
        # A daemon: a process that ends for another reason does not wait for a store that does not answer.
        threading.Thread(target=run, name="save", daemon=True).start()

    def _retain(self, work: _Work) -> None:
        try:
            retention.retain(self.run_dir, self.policy, in_flight=work.url)
        except Exception as error:  # the checkpoint stands; only the old ones could not go
            problem = f"old checkpoints could not be deleted: {sentence(error, self.run_dir)}"
            work.note = "; ".join(filter(None, (work.note, problem)))
