"""Scenarios in which a place does not take what a run writes: a full disk, a slow or failing store, a tracker that is away."""

import contextlib
import socket
from collections.abc import Iterator

from orchestration.operations.drill.crashes import at_fault
from orchestration.operations.drill.evidence import Lost
from orchestration.operations.drill.play import Play
from orchestration.operations.drill.store import BUCKET, Store
from orchestration.run.rank_end import EXIT_USER
from pipeline.supervision.planned_faults import Fault


def full_disk(play: Play) -> None:
    fault = Fault(rank=0, point="file opened", first=1, last=1, do="full")
    play.to_the_end(play.start(fault), interrupted=())
    failed = play.expect_record("SaveFailed", "no space left")
    play.note(f"the checkpoint of step {failed['step']} is missing, later ones stand")
    play.expect_undisturbed()


@contextlib.contextmanager
def _in_store(play: Play) -> Iterator[Store]:
    """The run in a bucket, whose objects are files of the scenario's folder."""
    with Store(play.folder / "store") as store:
        play.out = f"s3://{BUCKET}/run"
        play.checkpoints = store.folder / BUCKET / "run"
        play.environment = {**play.environment, **store.environment}
        yield store


def slow_store(play: Play) -> None:
    with _in_store(play) as store:
        store.delay_s, store.bytes_per_s = 0.2, 8e6
        play.to_the_end(play.start(), interrupted=())
        missed = len(play.records.of("SaveSkipped"))
        play.note(
            f"{len(play.records.of('Saved'))} checkpoints saved, {missed} left out as the one before was on its way"
        )
        play.expect_undisturbed()


def failing_store(play: Play) -> None:
    with _in_store(play) as store:
        hold, start, _ = at_fault(play)
        store.is_failing = True
        hold.go()
        play.ended(start, {EXIT_USER})
        play.expect(start, "the last checkpoint could not be written")
        play.expect(start, "the same command, there, takes it over")
        store.is_failing = False
        play.to_the_end(play.start(), interrupted=())
        at = play.records.resumed_at()
        if at != [play.stage.num_steps]:
            raise Lost(f"the state of the last step was kept on this machine, and the next start went on at {at}")
        play.note("the next start takes the kept state over")
        play.expect_undisturbed()


def dead_tracker(play: Play) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:  # takes connections and never answers one
        play.tracking_uri = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        play.environment["NORMFREE_WAIT_FOR_TRACKER"] = "4"
        start = play.to_the_end(play.start(), interrupted=())
        play.expect(start, "no record is lost")
        num = sum(int(record["num_updates"]) for record in play.records.of("Step"))
        if num != play.stage.num_steps:
            raise Lost(f"the records on disk speak of {num} updates of {play.stage.num_steps}")
        play.expect_undisturbed()
        play.expect_nothing_left()
