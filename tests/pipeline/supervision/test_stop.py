"""SIGTERM on one rank, in each phase: all ranks save the same step, leave with the requeue code, and nothing is lost."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.data.loading.batches import Batch
from pipeline.supervision import stop_signals as stop_module
from pipeline.supervision.stop_signals import EXIT_REQUEUE, StopSignal
from pipeline.training.batch_fetcher import BatchFetcher, placeholder_batch
from tests.pipeline import watched

MICRO = watched.MICRO_BATCHES
PHASES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    # where it is that one rank is told to stop, and the steps that may be saved then
    "step": ({"events": [{"rank": 1, "at": "forward", "call": 2 * MICRO + 1, "do": "term"}]}, (3,)),
    "evaluation": ({"events": [{"rank": 1, "at": "evaluation", "call": 1, "do": "term"}]}, (4,)),
    "save": ({"events": [{"rank": 1, "at": "copied", "call": 1, "do": "term"}]}, (4,)),
    # Rank 1's loader stands still, and rank 0 waits for it in the step's collective.
    "stalled data, the waiting rank is told": (
        {"events": [{"rank": 1, "at": "loader", "call": 5 * MICRO + 1, "do": "stall"}], "signal": 0},
        (5,),
    ),
    "stalled data, the stalled rank is told": (
        {"events": [{"rank": 1, "at": "loader", "call": 5 * MICRO, "do": "stall"}], "signal": 1},
        (4,),
    ),
    "stalled evaluation": (
        {"events": [{"rank": 0, "at": "evaluation data", "call": 1, "do": "stall"}], "signal": 1},
        (4,),
    ),
}
QUICK = ("evaluation", "stalled data, the waiting rank is told")


@pytest.fixture(scope="module")
def undisturbed(
    digits: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, torch.Tensor], dict[int, float]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    (found,) = watched.runs(make_run(digits), folder, [{"folder": "a"}])
    assert found["codes"] == [0, 0], found["stderr"]
    return watched.state(folder / "a")[0], losses(found)


def make_run(digits: str) -> Any:
    # Data stall for as long as it takes to tell a rank to stop, which is no hang yet.
    return watched.make_run(digits, watchdog=watched.WatchdogConfig(limit_s=60, grace_s=90))


def losses(found: dict[str, Any]) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in found["records"][0] if r["kind"] == "Step"}


def check(found: list[dict[str, Any]], folder: Path, undisturbed: Any, steps: tuple[int, ...]) -> None:
    stopped, resumed = found
    assert stopped["codes"] == [EXIT_REQUEUE] * 2, stopped["stderr"]
    ends = [records[-1] for records in stopped["records"]]
    assert {r["kind"] for r in ends} == {"Stopped"} and len({r["step"] for r in ends}) == 1
    assert ends[0]["step"] in steps and ends[0]["checkpoint"].endswith(f"step_{ends[0]['step']:08d}")
    assert resumed["codes"] == [0, 0], resumed["stderr"]
    begins = [r for r in resumed["records"][0] if r["kind"] == "Started"]
    assert begins[-1]["step"] == ends[0]["step"]
    ours, theirs = watched.state(folder)[0], undisturbed[0]
    assert set(ours) == set(theirs) and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert losses(resumed) == undisturbed[1]


@pytest.mark.parametrize("phase", [pytest.param(p, marks=() if p in QUICK else pytest.mark.slow) for p in PHASES])
def test_a_stop_on_one_rank_saves_the_same_step_on_all_and_the_resumed_run_is_the_undisturbed_one(
    phase: str, digits: str, undisturbed: Any, tmp_path: Path
) -> None:
    what, steps = PHASES[phase]
    found = watched.runs(make_run(digits), tmp_path, [{"folder": "a", **what}, {"folder": "a"}])
    check(found, tmp_path / "a", undisturbed, steps)


def test_a_stop_during_the_start_leaves_nothing_and_asks_to_be_queued_again(digits: str, tmp_path: Path) -> None:
    event = {"rank": 1, "at": "start", "call": 1, "do": "term"}
    (found,) = watched.runs(make_run(digits), tmp_path, [{"folder": "a", "events": [event]}])
    assert found["codes"] == [EXIT_REQUEUE] * 2, found["stderr"]
    assert not any(r["kind"] == "Step" for records in found["records"] for r in records)
    assert not list((tmp_path / "a" / "run").glob("checkpoints/*"))


# --- the parts --------------------------------------------------------------------------------------------------------


def wait_for(condition: Any) -> None:
    deadline_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_a_second_signal_leaves_at_once_and_its_echo_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    with StopSignal(leave=codes.append) as stop:
        stop.started()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)  # a launcher passes on what the rank got itself
        wait_for(lambda: stop.requested and stop._asked_s is not None)
        time.sleep(0.3)
        assert not codes
        monkeypatch.setattr(stop_module, "SAME_REQUEST_S", 0.0)
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(lambda: codes)
    assert codes == [EXIT_REQUEUE]


def test_a_stop_that_is_not_reached_ends_with_the_grace_period() -> None:
    codes: list[int] = []
    with StopSignal(grace_s=0.2, leave=codes.append) as stop:
        stop.started()
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(lambda: codes)
    assert codes == [EXIT_REQUEUE]


def test_handlers_of_the_caller_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before and signal.set_wakeup_fd(-1) == -1


def batch(number: int) -> Batch:
    return Batch(torch.zeros(1), torch.zeros(1), torch.tensor([number]))


def test_a_supply_gives_all_batches_in_order_and_then_what_went_wrong() -> None:
    def source() -> Iterator[Batch]:
        yield from map(batch, range(5))
        raise ValueError("broken")

    got = []
    with pytest.raises(ValueError, match="broken"):
        for b in supply(source(), StopSignal()):
            got.append(int(b.samples))
    assert got == list(range(5))
    assert [int(b.samples) for b in supply(map(batch, range(3)), StopSignal())] == [0, 1, 2]


def test_a_stop_ends_the_wait_for_a_batch_that_does_not_come() -> None:
    stall = threading.Event()

    def source() -> Iterator[Batch]:
        yield batch(0)
        stall.wait()

    stop = StopSignal()
    batches = supply(source(), stop)
    assert int(next(batches).samples) == 0
    stop.ask()
    assert next(batches).is_placeholder and next(batches).is_placeholder
    stall.set()


def supply(source: Iterator[Batch], stop: StopSignal) -> BatchFetcher:
    return BatchFetcher(source, stop=stop, placeholder=placeholder_batch(2, 4), device=torch.device("cpu"))
