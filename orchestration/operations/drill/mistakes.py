"""Scenarios of damaged or changed data, and of two commands that do not know of each other."""

from dataclasses import replace

from orchestration.operations.drill.crashes import held
from orchestration.operations.drill.evidence import Lost
from orchestration.operations.drill.own_data import with_another_class, with_flipped_byte
from orchestration.operations.drill.play import Play
from orchestration.run.rank_end import EXIT_USER
from pipeline.data.loading.datasets import TrainData

HELD_S = 900.0
"""The watchdog of a run whose rank is held while another command starts waits so long: a busy machine starts slowly."""


def corrupt_shard(play: Play) -> None:
    run = play.run
    source, _, shard, key = TrainData(run.data, run.augment, seed=run.seed).keys(2, run.global_batch)[0]
    data = with_flipped_byte(run.data, play.folder / "flipped", source=source, shard=shard, key=key)
    play.run = replace(run, data=data)
    start = play.start()
    if not data.max_lost_samples:  # the real run's budget allows none
        play.ended(start, {EXIT_USER})
        play.expect(start, "max_lost")
        return
    play.to_the_end(start, interrupted=())
    lost = play.expect_record("Lost", key)
    play.note(
        f"{key} of {shard} is counted as lost ({lost['samples'][0]['reason']}), another of its batch took its place"
    )
    play.expect_account(lost=[key])


def two_starts(play: Play) -> None:
    watchdog = play.run.watchdog
    play.run = replace(play.run, watchdog=replace(watchdog, limit_s=max(watchdog.limit_s, HELD_S)))
    hold, first, _ = held(play)
    second = play.start()
    play.ended(second, {EXIT_USER})
    play.expect(second, "is in use")
    hold.go()
    play.to_the_end(first, interrupted=())
    if play.records.resumed_at():
        raise Lost("the second start trained in the same folder")
    play.expect_undisturbed()


def changed_data(play: Play) -> None:
    """On the folder of the undisturbed run, which must stay as it is."""
    play.out = str(play.stage.folder / "undisturbed" / "run")
    play.checkpoints = play.stage.folder / "undisturbed" / "run"
    play.run = replace(play.run, data=with_another_class(play.run.data, play.folder / "renamed"))
    start = play.start()
    play.ended(start, {EXIT_USER})
    play.expect(start, "holds a run on data with digest")
    play.expect_undisturbed()
