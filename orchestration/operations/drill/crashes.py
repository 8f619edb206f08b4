"""Scenarios in which ranks die, freeze or are told to stop, or a step goes wrong."""

import contextlib
import json
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import replace

from orchestration.operations.drill.commands import POLL_S, Hold, Start, send
from orchestration.operations.drill.evidence import Lost
from orchestration.operations.drill.own_run import SAVE_STEPS, with_watchdog
from orchestration.operations.drill.play import Play
from orchestration.run.worker import TRACKING_URI
from pipeline.documents import read_json
from pipeline.supervision.fault_points import STEP
from pipeline.supervision.planned_faults import Fault
from pipeline.supervision.stop_signals import EXIT_REQUEUE
from pipeline.supervision.watchdog import EXIT_HANG
from pipeline.training.rollback import MAX_IN_A_ROW
from pipeline.training.run import dump_yaml

AT_STEP = 13
STOOD = AT_STEP - AT_STEP % SAVE_STEPS
"""The newest checkpoint then."""
HANG_LIMIT_S = 20.0
HOSTS = ("first", "second")
LATE_S = 60.0
"""The report of a hang is there so long after the watchdog's limit at the latest: the machine may be busy."""


def held(play: Play) -> tuple[Hold, Start, int]:
    """A start whose last rank stands before step `AT_STEP`, and that rank's process."""
    hold = play.hold(AT_STEP)
    start = play.start(hold.fault)
    return hold, start, hold.pid(start)


def at_fault(play: Play) -> tuple[Hold, Start, int]:
    """As `held`, with the checkpoint before that step written."""
    found = held(play)
    play.wait_for_checkpoint(STOOD)
    return found


def kill_rank(play: Play) -> None:
    _, start, pid = at_fault(play)
    send(pid, signal.SIGKILL)
    # Alone, the rank is the command itself, which nobody is left to speak for.
    play.to_the_end(start, interrupted={1} if play.last_rank else {-signal.SIGKILL})
    play.expect_resumed()
    play.expect_undisturbed()


def kill_all(play: Play) -> None:
    _, start, _ = at_fault(play)
    play.note(f"{play.group.kill()} processes killed")
    play.to_the_end(start, interrupted={-signal.SIGKILL})
    play.expect_resumed()
    play.expect_undisturbed()


def freeze(play: Play) -> None:
    play.run = with_watchdog(play.run, HANG_LIMIT_S)
    _, start, pid = at_fault(play)
    send(pid, signal.SIGSTOP)
    _expect_report(play, play.run.watchdog.limit_s + LATE_S)
    play.to_the_end(start, interrupted={EXIT_HANG})
    play.expect_resumed()
    play.expect_undisturbed()


def _expect_report(play: Play, limit_s: float) -> None:
    begin_s = time.monotonic()
    while not (reports := sorted(play.checkpoints.glob("hang-*.json"))):
        if time.monotonic() - begin_s > limit_s:
            raise Lost(f"nobody had reported the frozen rank after {limit_s:.0f} s")
        time.sleep(POLL_S)
    named = [frozen["rank"] for frozen in read_json(str(reports[0]))["frozen"]]
    if named != [play.last_rank]:
        raise Lost(f"rank {play.last_rank} was frozen, and {reports[0].name} names {named}")
    play.note(f"a report names rank {named[0]} after {time.monotonic() - begin_s:.0f} s")


def lost_host(play: Play) -> None:
    """Two agents, as `normfree launch` starts one on each host; one goes with all its processes."""
    with _store(play) as address:
        hold = play.hold(AT_STEP)
        first, second = (_agent(play, host, address, hold.fault) for host in HOSTS)
        hold.pid(first)
        play.wait_for_checkpoint(STOOD)
        play.note(f"{play.group.kill_host(HOSTS[1])} processes of a host killed")
        hold.go()
        second.wait()
        play.to_the_end(first, interrupted=())
        play.expect_resumed()
        num = play.records.of("Started")[-1]["num_ranks"]
        if num != play.stage.num_ranks // len(HOSTS):
            raise Lost(f"one host was left, and the run went on with {num} processes")
        play.note(f"{num} of {play.stage.num_ranks} processes are left")
        play.expect_undisturbed()


def _agent(play: Play, host: str, store: str, fault: Fault) -> Start:
    document = {
        "run": dump_yaml(play.run),
        "out": play.out,
        "run_id": play.group.mark,
        "store": store,
        "host_name": host,
        "min_hosts": 1,
        "max_hosts": len(HOSTS),
        "processes": play.stage.num_ranks // len(HOSTS),
        "command": "normfree drill",
    }
    file = play.folder / f"{host}.json"
    file.write_text(json.dumps(document))
    environment = {TRACKING_URI: play.tracking_uri}
    return play.group.start(
        [str(file)], module="orchestration.launch.agent", host=host, faults=[fault], environment=environment
    )


@contextlib.contextmanager
def _store(play: Play) -> Iterator[str]:
    """HOST:PORT of the store through which agents meet, outside of all of them."""
    store = play.group.start(["127.0.0.1", "0"], module="orchestration.launch.store")
    while not (found := re.search(r"^127\.0\.0\.1 (\d+)$", store.text, re.MULTILINE)):
        if store.process.poll() is not None:
            raise Lost(f"the agents' store did not start: {store.last_words()}")
        time.sleep(POLL_S)
    yield f"127.0.0.1:{found[1]}"
    store.process.terminate()
    store.wait()


def stop_signal(play: Play) -> None:
    hold, start, _ = held(play)
    start.process.send_signal(signal.SIGTERM)
    hold.go()
    code = play.ended(start, {EXIT_REQUEUE})
    stopped = play.expect_record("Stopped")
    if not stopped["checkpoint"] or stopped["step"] < AT_STEP - 1:
        raise Lost(f"it ended with {code}, and step {stopped['step']} was not saved: {stopped['reason']}")
    play.note(f"saved step {stopped['step']}")
    play.wait_for_checkpoint(stopped["step"])
    play.to_the_end(play.start(), interrupted=())
    play.expect_resumed()
    play.expect_undisturbed()


def skipped_data() -> str:
    """The data that the run of `nan_batches` skips, as data.skip_steps has them."""
    return f"{AT_STEP - 1}:{AT_STEP - 1 + MAX_IN_A_ROW}"


def nan_batches(play: Play) -> None:
    first, last = AT_STEP, AT_STEP + MAX_IN_A_ROW - 1
    fault = Fault(rank=play.last_rank, point=STEP, first=first, last=last, do="nan")
    play.to_the_end(play.start(fault), interrupted=())
    num = len(play.records.of("Skipped"))
    if num != MAX_IN_A_ROW:
        raise Lost(f"{MAX_IN_A_ROW} updates were not finite, and {num} were skipped")
    back = play.expect_record("RolledBack")
    play.note(f"{num} updates skipped on all ranks, then back to step {back['step']}")
    play.expect_undisturbed(skipped_data())


def without_data(play: Play, skipped: str) -> None:
    """The undisturbed run of which data were skipped by name: what a run after a rollback is compared with."""
    play.run = replace(play.run, data=replace(play.run.data, skip_steps=(skipped,) if skipped else ()))
    play.to_the_end(play.start(), interrupted=())
