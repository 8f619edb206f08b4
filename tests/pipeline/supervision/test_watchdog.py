"""Frozen ranks: who is named, by whom, and that all others leave."""

import dataclasses
import os
import queue
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import TCPStore

from pipeline.engine.engine import EngineConfig
from pipeline.errors import UserError
from pipeline.supervision import hang_report
from pipeline.supervision.collective_progress import newest_begun
from pipeline.supervision.hang_detection import Beat, Heard, WatchdogConfig, judge
from pipeline.supervision.phase_clock import Clock
from pipeline.supervision.stop_signals import StopSignal
from pipeline.supervision.watchdog import EXIT_HANG, Watchdog
from tests.pipeline import watched

CONFIG = WatchdogConfig(limit_s=100, start_limit_s=1000, save_limit_s=500)


def beat(rank: int, **changes: Any) -> Beat:
    one = Beat(
        rank=rank,
        number=1,
        host="h",
        pid=rank,
        machine="m",
        dump="",
        state="run",
        phase="compute",
        step=7,
        idle_s=0.0,
        collectives=50,
        is_writing=False,
        main_thread=1,
        stack=(),
    )
    return dataclasses.replace(one, **changes)


def named(*beats: Beat, ages: tuple[float, ...] | None = None) -> list[int]:
    ages = ages or (0.0,) * len(beats)
    return [s.rank for s in judge({b.rank: Heard(b, a) for b, a in zip(beats, ages, strict=True)}, CONFIG)]


def test_of_ranks_that_stand_still_the_one_that_entered_fewest_collectives_is_named() -> None:
    waiting = {"idle_s": 90.0, "collectives": 51}
    assert named(beat(0, **waiting), beat(1, **waiting), beat(2, idle_s=88.0, phase="wait")) == [2]
    assert named(beat(0, idle_s=99.0, collectives=50), beat(1, **waiting)) == [0]


def test_nobody_is_named_while_the_rank_that_all_wait_for_still_moves() -> None:
    waiting = {"idle_s": 90.0, "collectives": 51}
    assert named(beat(0, **waiting), beat(1, **waiting), beat(2, idle_s=3.0)) == []


def test_a_silent_rank_is_named_whatever_the_others_wait_in() -> None:
    waiting = {"idle_s": 90.0, "collectives": 51}
    assert named(beat(0, **waiting), beat(1), beat(2, **waiting), ages=(0, 80, 0)) == [1]
    assert named(beat(0), beat(1), ages=(0, 70)) == []


def test_a_rank_that_left_early_is_named_and_one_that_left_at_the_end_is_not() -> None:
    assert named(beat(0, idle_s=90.0, collectives=51), beat(1, state="left"), ages=(0, 500)) == [1]
    assert named(beat(0, idle_s=90.0), beat(1, state="left"), ages=(0, 500)) == [0]
    assert named(beat(0), beat(1, state="left"), ages=(0, 500)) == []


def test_a_start_and_a_save_may_take_longer_than_a_step() -> None:
    for changes in ({"state": "start"}, {"phase": "save"}):
        assert named(beat(0, idle_s=300.0, **changes), beat(1, idle_s=300.0, **changes)) == []
        assert named(beat(0, idle_s=900.0, **changes), beat(1, idle_s=900.0, **changes)) == [0, 1]


def test_of_ranks_that_wait_for_a_save_the_one_that_writes_is_named_and_the_main_one_last() -> None:
    still = {"idle_s": 400.0, "phase": "save"}
    assert named(beat(0, **still, is_writing=True), beat(1, **still, is_writing=True), beat(2, **still)) == [1]
    assert named(beat(0, **still, is_writing=True), beat(1, **still)) == [0]


def test_a_rank_that_never_spoke_is_named_when_the_start_or_after_it_a_step_has_taken_too_long() -> None:
    def silent_for(age_s: float, state: str) -> list[int]:
        return [s.rank for s in judge({0: Heard(beat(0, state=state), 0.0), 1: Heard(None, age_s)}, CONFIG)]

    assert silent_for(700, "start") == [] and silent_for(800, "start") == [1]
    # A step takes all ranks: one that froze after it, before it was heard of, does not keep the others for a whole start.
    assert silent_for(70, "run") == [] and silent_for(80, "run") == [1]


def test_steps_done_before_the_first_beat_count_so_a_freeze_after_them_is_judged_as_one_in_a_step() -> None:
    clock, stop = Clock(), StopSignal()
    watchdog = Watchdog(CONFIG, clock=clock, stop=stop, out="nowhere")
    clock.first_step, clock.steps_done = 5, lambda: 5
    assert watchdog._beat().state == "start"
    stop.started()
    assert watchdog._beat().state == "start"  # the first step may take long
    clock.steps_done = lambda: 7
    assert Watchdog(CONFIG, clock=clock, stop=stop, out="nowhere")._beat().state == "run"


def test_a_rank_that_reports_alone_leaves_though_its_report_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> str:
        raise OSError("No space left on device")

    monkeypatch.setattr(hang_report, "write", full)
    left = queue.SimpleQueue[int]()
    watchdog = Watchdog(WatchdogConfig(limit_s=1.0), clock=Clock(), stop=StopSignal(), out="nowhere", leave=left.put)
    with pytest.raises(OSError, match="No space"):
        watchdog._accuse_alone(time.monotonic())
    assert left.get(timeout=60) == EXIT_HANG


def test_of_ranks_that_entered_as_many_the_one_is_named_whose_device_has_not_begun() -> None:
    waiting = {"idle_s": 90.0, "collectives": 51}
    assert named(beat(0, **waiting, begun=51), beat(1, **waiting, begun=50), beat(2, **waiting, begun=51)) == [1]
    assert named(beat(0, **waiting, begun=51), beat(1, **waiting)) == [0, 1]  # one that cannot tell proves nothing


def test_a_flight_record_tells_how_many_collectives_a_device_has_begun() -> None:
    def entry(number: int, state: str, group: str = "default") -> dict[str, Any]:
        return {"collective_seq_id": number, "state": state, "process_group": [group, ""], "is_p2p": False}

    record = {
        "entries": [entry(1, "completed"), entry(2, "started"), entry(3, "scheduled"), entry(5, "completed", "b")]
    }
    assert newest_begun(record) == 7
    assert newest_begun({"entries": [entry(1, "scheduled")]}) is None


def test_a_run_is_watched_within_a_minute_by_default() -> None:
    assert 0 < WatchdogConfig().limit_s <= 60


@pytest.mark.slow
def test_ranks_whose_agents_count_restarts_differently_hear_each_other(tmp_path: Path) -> None:
    """As after a host that came back; no training, only the clock moves."""
    program = (
        "import sys, time\n"
        "from pipeline.supervision.hang_detection import WatchdogConfig\n"
        "from pipeline.supervision.phase_clock import Clock\n"
        "from pipeline.supervision.stop_signals import StopSignal\n"
        "from pipeline.supervision.watchdog import Watchdog\n"
        "clock, steps = Clock(), [0]; clock.steps_done = lambda: steps[0]\n"
        "config = WatchdogConfig(limit_s=20, start_limit_s=40)\n"
        "with StopSignal() as stop, Watchdog(config, clock=clock, stop=stop, out=sys.argv[1]):\n"
        "    stop.is_starting = False\n"
        "    end_s = time.monotonic() + 60\n"
        "    while time.monotonic() < end_s:\n"
        "        with clock('compute'): time.sleep(0.1)\n"
        "        steps[0] += 1\n"
    )
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    shared |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "PYTHONPATH": str(watched.ROOT)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path)],
            env={**os.environ, **shared, "RANK": str(rank), "TORCHELASTIC_RESTART_COUNT": str(1 - rank)},
        )
        for rank in (0, 1)
    ]
    assert [rank.wait() for rank in ranks] == [0, 0]
    assert list(tmp_path.iterdir()) == []


def test_a_limit_below_nothing_is_refused() -> None:
    with pytest.raises(UserError, match=r"watchdog\.limit_s is -1"):
        WatchdogConfig(limit_s=-1)


# --- whole runs -------------------------------------------------------------------------------------------------------

AT = {  # the place, in which call, and what its stack must show, after which step
    "forward": (2 * watched.MICRO_BATCHES + 1, "forward_backward", 2),
    "loader": (4 * watched.MICRO_BATCHES, "_fetch", None),  # the loader is ahead of the step
    "file piece": (1, "_write_file", None),
}


def check(found: dict[str, Any], rank: int, at: str, do: str) -> None:
    codes = found["codes"]
    assert all(code == EXIT_HANG for r, code in enumerate(codes) if r != rank), (codes, found["stderr"])
    (report,) = found["reports"]
    (frozen,) = report["frozen"]
    assert (frozen["rank"], frozen["host"]) == (rank, socket.gethostname())
    threads = [frozen["stack"], *frozen["other_threads"].values()]
    assert any(AT[at][1] in line for thread in threads for line in thread)
    assert any("in train" in line for line in frozen["stack"])
    last_step = max((r["step"] for r in found["records"][rank] if r["kind"] == "Step"), default=0)
    assert frozen["last_step"] in (last_step, last_step + 1)  # its record is read after it
    if at == "forward":
        assert frozen["phase"] == "compute" and frozen["last_step"] == AT[at][2]
    if do == "freeze":
        assert frozen["process"] == "T (stopped)" and frozen["stack_taken"] == "where it was frozen"
        assert codes[rank] < 0  # it did nothing more
    said = [line for text in found["stderr"] for line in text.splitlines() if "all ranks leave" in line]
    assert len(said) == 1 and f"rank {rank} on {frozen['host']}" in said[0] and "hang-" in said[0]


def case(rank: int, at: str, do: str, **more: Any) -> dict[str, Any]:
    event = {"rank": rank, "at": at, "call": AT[at][0], "do": do}
    return {"folder": f"{rank}-{at}-{do}-{more}", "events": [event], **more}


def test_a_rank_that_freezes_or_stands_still_is_left_and_named(digits: str, tmp_path: Path) -> None:
    wanted = [(1, "forward", "freeze"), (0, "loader", "stall")]
    found = watched.runs(watched.make_run(digits), tmp_path, [case(*w) for w in wanted])
    for result, what in zip(found, wanted, strict=True):
        check(result, *what)


@pytest.mark.slow
@pytest.mark.parametrize("at", AT)
def test_each_rank_may_freeze_anywhere(at: str, digits: str, tmp_path: Path) -> None:
    wanted = [(rank, do) for rank in (0, 1, 2) for do in ("freeze", "stall") if (at, do) != ("file piece", "stall")]
    # Sharded, or ranks other than 0 have no file to write.
    run = watched.make_run(digits, global_batch=24, engine=EngineConfig(parity_check=False, zero_stage=1))
    found = watched.runs(run, tmp_path, [case(rank, at, do, ranks=3) for rank, do in wanted])
    for result, (rank, do) in zip(found, wanted, strict=True):
        check(result, rank, at, do)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_without_a_launcher_the_store_freezes_with_rank_0_and_the_others_still_leave(
    rank: int, digits: str, tmp_path: Path
) -> None:
    (found,) = watched.runs(watched.make_run(digits), tmp_path, [case(rank, "forward", "freeze", has_launcher=False)])
    check(found, rank, "forward", "freeze")


@pytest.mark.slow
def test_a_rank_that_freezes_before_it_was_heard_of_is_named_within_the_limit_of_a_step(
    digits: str, tmp_path: Path
) -> None:
    mute = case(1, "forward", "freeze", mute=1, enough_s=120)  # nobody knows its process, so nobody ends it
    (found,) = watched.runs(watched.make_run(digits), tmp_path, [mute])
    assert found["codes"][0] == EXIT_HANG and "rank 1 has not been heard of for" in found["stderr"][0]


@pytest.mark.slow
def test_a_rank_that_fails_alone_does_not_leave_the_others_waiting(digits: str, tmp_path: Path) -> None:
    event = {"rank": 1, "at": "forward", "call": 5, "do": "fail"}
    (found,) = watched.runs(watched.make_run(digits), tmp_path, [{"folder": "a", "events": [event]}])
    assert found["codes"][1] == 1 and found["codes"][0] in (1, EXIT_HANG) and "fails alone" in found["stderr"][1]
