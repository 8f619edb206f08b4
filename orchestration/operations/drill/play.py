"""One scenario in progress: starts of the run, what has happened, and the laws that hold after every fault.

exit code of each start as documented | the same command goes on from the newest checkpoint | the last state is the undisturbed
run's | the ledger adds up | nothing is left running
"""

import threading
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestration.operations.drill import evidence
from orchestration.operations.drill.commands import END_S, POLL_S, Group, Hold, Start
from orchestration.operations.drill.evidence import Lost, Records
from orchestration.spool.spool import records_folder
from pipeline import places
from pipeline.checkpoint.load import State
from pipeline.storage import objects
from pipeline.supervision.fault_points import STEP
from pipeline.supervision.planned_faults import Fault
from pipeline.training.run import Run, dump_yaml

MAX_STARTS = 4
GONE_S = 90.0
"""What a command leaves at work for a while (the uploader of its records) has ended by then."""


@dataclass(frozen=True)
class Stage:
    """What all scenarios share."""

    run: Run
    """The shrunk configuration."""
    num_ranks: int
    folder: Path
    tracking_uri: str
    mark: str
    undisturbed: dict[str, State] = field(default_factory=dict)
    """The last state of a run to which nothing happened, by what its data skip."""
    is_over: threading.Event = field(default_factory=threading.Event)
    """The drill was stopped: nothing is started any more."""

    @property
    def num_steps(self) -> int:
        return int(self.run.duration.value)

    @property
    def positions(self) -> int:
        return self.num_steps * self.run.global_batch


class Play:
    """A scenario's own folder, processes and findings."""

    def __init__(self, stage: Stage, name: str) -> None:
        self.stage, self.run = stage, stage.run
        self.folder = stage.folder / name
        self.group = Group(f"{stage.mark}-{name}.", self.folder)
        self.out = str(self.folder / "run")
        self.checkpoints = self.folder / "run"
        """Where the run's checkpoints lie as files."""
        self.environment: dict[str, str] = {}
        self.tracking_uri = stage.tracking_uri
        self.happened: list[str] = []
        self.codes: list[int] = []
        self._newest = -1

    @property
    def last_rank(self) -> int:
        return self.stage.num_ranks - 1

    @property
    def records(self) -> Records:
        if objects.is_local(self.out):
            return Records(records_folder(self.out))
        return Records(self.group.cache / "spools" / places.name_of_url(self.out))

    def note(self, text: str) -> None:
        self.happened.append(text)

    # --- starts -------------------------------------------------------------------------------------------------------

    def start(self, *faults: Fault) -> Start:
        """`normfree pretrain` on the scenario's configuration, as a user types it; again it is the same command."""
        if self.stage.is_over.is_set():
            raise Lost("the drill was stopped")
        recipe = self.folder / "run.yaml"
        recipe.write_text(dump_yaml(self.run))
        words = ["pretrain", str(recipe), "--out", self.out, "--num-processes", str(self.stage.num_ranks)]
        words += ["--tracking-uri", self.tracking_uri]
        return self.group.start(words, faults=faults, environment=self.environment)

    def hold(self, step: int) -> Hold:
        """A place for the last rank to stand still in the first start: before that step, counted from 1."""
        file = self.folder / f"held-{self.last_rank}"
        return Hold(file, Fault(rank=self.last_rank, point=STEP, first=step, last=step, do="hold", file=str(file)))

    def wait_for_checkpoint(self, step: int) -> None:
        """Until a checkpoint of this step or a later one stands: what happens then must not cost more than what came after."""
        end_s = time.monotonic() + END_S
        while (newest := evidence.newest_step(self.checkpoints)) < step:
            if time.monotonic() > end_s:
                raise Lost(f"no checkpoint of step {step} stood after {END_S:.0f} s")
            time.sleep(POLL_S)
        self._newest = newest

    def ended(self, start: Start, allowed: Collection[int]) -> int:
        """The start's exit code. Lost unless it is one of those."""
        code = start.wait()
        self.codes.append(code)
        if code not in allowed:
            wanted = " or ".join(str(each) for each in sorted(allowed, key=lambda c: (c < 0, c)))
            raise Lost(f"start {len(self.codes)} ended with code {code} in place of {wanted}: {start.last_words()}")
        return code

    def to_the_end(self, start: Start, *, interrupted: Collection[int]) -> Start:
        """Wait for `start`, then the same command again until one ends with 0; those before end with one of `interrupted`."""
        while self.ended(start, {0, *interrupted} if len(self.codes) < MAX_STARTS else {0}) != 0:
            self._newest = max(self._newest, evidence.newest_step(self.checkpoints))
            start = self.start()
        return start

    # --- laws ---------------------------------------------------------------------------------------------------------

    def expect(self, start: Start, sentence: str) -> None:
        """Lost unless the command has said this."""
        if sentence not in " ".join(start.text.split()):
            raise Lost(f"the sentence '{sentence}' was expected, and the last one was: {start.last_words()}")
        self.note(f"it says '{sentence}'")

    def expect_record(self, kind: str, fragment: str = "") -> dict[str, Any]:
        """The first record of that kind which holds the fragment. Lost if there is none."""
        for record in self.records.of(kind):
            if fragment in str(record):
                return record
        raise Lost(f"the run has no record {kind}" + (f" of '{fragment}'" if fragment else ""))

    def expect_resumed(self) -> None:
        """Lost unless the run was started again after the fault, and from the newest checkpoint that stood."""
        steps = self.records.resumed_at()
        if not steps:
            raise Lost("nothing was started again")
        if steps[0] < self._newest:
            raise Lost(f"it went on at step {steps[0]}, and the checkpoint of step {self._newest} stood")
        self.note(f"went on at step {' and '.join(map(str, steps))}")

    def expect_undisturbed(self, skipped: str = "") -> None:
        """Lost unless the last state is the undisturbed run's, and the ledger adds up with no key missing."""
        state = evidence.final_state(self.checkpoints, num_steps=self.stage.num_steps)
        self.note(evidence.compare(state, self.stage.undisturbed[skipped]))
        self.expect_account()

    def expect_account(self, lost: Sequence[str] = ()) -> None:
        """Lost unless the ledger adds up with exactly these keys missing."""
        found = evidence.account(self.checkpoints, positions=self.stage.positions)
        if found.lost_keys != list(lost):
            raise Lost(f"the ledger lists {found.lost_keys or 'no sample'} as lost, and {list(lost) or 'none'} was")
        self.note("the ledger adds up")

    def expect_nothing_left(self) -> None:
        left = self.group.wait_until_gone(GONE_S)
        if left:
            raise Lost(f"{len(left)} processes were left {GONE_S:.0f} s after the end: {left[0][:200]}")
        if not any("left running" in text for text in self.happened):
            self.note("nothing is left running")
