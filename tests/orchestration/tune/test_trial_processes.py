"""A fine-tuning trial as several processes: the numbers of one, and nothing left behind however it ends."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestration.tune.trial_group import run_ranks
from tests.orchestration.sweep_runner import SUITE, Runner, sweep_in
from transfer.measurement import predictions
from transfer.protocol.sealed_splits import openings
from transfer.search.successive_halving import read_rung
from transfer.sweep.cells import Cell, Sweep, plan
from transfer.sweep.entry import Trial
from transfer.sweep.failures import TrialFailed
from transfer.sweep.ledger import Ledger
from transfer.sweep.trials import Report, processes_of, run_finetune, run_job

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_checkpoint(tmp_path_factory.mktemp("upstream"), px=16)


def cell_of(sweep: Sweep, shots: int = 5, init: str = "pretrained") -> Cell:
    return next(c for c in plan(sweep)[0] if c.init == init and c.shots == shots)


def on_two(sweep: Sweep, trial: Trial, report: Report = lambda row: None, until: int = 0) -> None:
    run_ranks(sweep, trial, report, until=until, num_processes=2, has_gpus=False)


def ranks_of(parent: int | str = "self") -> dict[str, int]:
    """Process of each rank that this process, or another, has started."""
    found = {}
    for task in Path(f"/proc/{parent}/task").iterdir():
        for pid in (task / "children").read_text().split():
            words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if b"orchestration.tune.trial_rank" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found[next(w.decode() for w in words if w.startswith(b"RANK=")).removeprefix("RANK=")] = int(pid)
    return found


def test_two_processes_give_the_numbers_of_one(digits: str, checkpoint: str, tmp_path: Path) -> None:
    results = {}
    for number in (1, 2):
        sweep = sweep_in(tmp_path / str(number), digits, checkpoint)
        cell = cell_of(sweep)
        cell.select(sweep.out, dict(cell.points[1]), [], "stated")
        (trial,) = cell.finals(dict(cell.points[1]), 1)
        if number == 1:
            run_finetune(sweep, trial, lambda row: None)
        else:
            on_two(sweep, trial)
        found = Ledger(sweep.out).find(trial.digest)
        assert found is not None and found.is_ok and found.num_processes == number and found.max_memory_bytes > 0
        assert len(openings(sweep.out)) == 1 and not list((tmp_path / str(number) / "work").glob("**/commit.json"))
        results[number] = found, predictions.read(sweep.out, trial.digest)
    (one, said_by_one), (two, said_by_two) = results[1], results[2]
    for name in ("sample", "label", "predicted"):
        assert np.count_nonzero(said_by_two[name] != said_by_one[name]) <= (2 if name == "predicted" else 0), name
    np.testing.assert_allclose(said_by_two["confidence"], said_by_one["confidence"], atol=1e-5)
    assert np.ptp(said_by_one["confidence"]) > 0.01  # something was learnt that could differ
    assert two.value == pytest.approx(one.value, abs=2 / two.num_test) and two.config == one.config
    assert [r["loss"] for r in two.history] == pytest.approx([r["loss"] for r in one.history], rel=1e-5)


def test_a_batch_that_cannot_be_shared_equally_runs_on_fewer(digits: str, checkpoint: str, tmp_path: Path) -> None:
    sweep = sweep_in(tmp_path, digits, checkpoint)
    assert [processes_of(sweep, cell_of(sweep, 5).search[0], n) for n in (1, 2, 3, 4, 16, 99)] == [1, 2, 2, 4, 16, 16]
    assert [processes_of(sweep, cell_of(sweep, 1).search[0], n) for n in (2, 4, 8)] == [2, 2, 5]  # 10 images


def test_a_rank_that_is_killed_is_one_failed_entry_with_its_cause(digits: str, checkpoint: str, tmp_path: Path) -> None:
    sweep = sweep_in(tmp_path, digits, checkpoint, scheduler="asha")
    trial = cell_of(sweep, init="scratch").search[0]
    killed: list[int] = []

    def report(row: dict[str, Any]) -> None:
        if "accuracy" in row and not killed:
            killed.append(ranks_of()["1"])
            os.kill(killed[0], signal.SIGKILL)

    def ranks(sweep: Sweep, trial: Trial, report: Report, until: int, number: int) -> None:
        run_ranks(sweep, trial, report, until=until, num_processes=number, has_gpus=False)

    with pytest.raises(TrialFailed):  # the sweep runs it again
        run_job(sweep, {"cell": 0, "trial": vars(trial)}, report, max_processes=2, run_ranks=ranks)
    found = Ledger(sweep.out).find(trial.digest)
    assert killed and found is not None and found.cause == "lost" and found.num_processes == 2
    assert "rank 1 of 2 processes was killed by signal 9" in str(found.error)
    assert not ranks_of()


class Ended(Exception):
    pass


@pytest.mark.slow
def test_a_trial_that_the_scheduler_ends_and_one_at_its_rung_leave_no_process(
    digits: str, checkpoint: str, tmp_path: Path
) -> None:
    live = sweep_in(tmp_path / "asha", digits, checkpoint, scheduler="asha")

    def ends(row: dict[str, Any]) -> None:
        assert row["step"] < 6 and len(ranks_of()) == 2
        raise Ended

    with pytest.raises(Ended):
        on_two(live, cell_of(live).search[0], ends)
    assert not ranks_of() and not list(Ledger(live.out).entries())

    one, two = (sweep_in(tmp_path / name, digits, checkpoint) for name in ("one", "two"))
    trial = cell_of(two).search[1]
    on_two(two, trial, until=2)
    run_finetune(one, trial, lambda row: None, until=2)
    mine, theirs = read_rung(one.out, trial.digest, 2), read_rung(two.out, trial.digest, 2)
    assert mine is not None and theirs is not None and not ranks_of()
    assert theirs.loss == pytest.approx(mine.loss, rel=1e-5) and [r["step"] for r in theirs.rows] == [2]
    # What two processes have left at a rung, one goes on with; and the other way round.
    assert run_finetune(two, trial, lambda row: None) is not None
    on_two(one, trial)
    first, second = Ledger(one.out).find(trial.digest), Ledger(two.out).find(trial.digest)
    assert first is not None and second is not None
    assert [r["step"] for r in first.history] == [r["step"] for r in second.history] == [2, 6]
    assert second.history[-1]["loss"] == pytest.approx(first.history[-1]["loss"], rel=1e-4)


@pytest.mark.slow
def test_a_sweep_of_trials_of_two_processes_has_the_table_of_one(checkpoint: str, digits: str, tmp_path: Path) -> None:
    suite = SUITE.split("  ridge")[0] + "  ridge: {shots: [1]}\n"
    suite += "  finetune: {shots: [1], learning_rates: [0.1, 0.3], num_steps: [4]}\n"
    found = []
    for number in (1, 2):
        resources = {"processes_per_trial": number}
        runner = Runner(checkpoint, digits, tmp_path / str(number), suite=suite, resources=resources)
        assert runner.finish(num_seeds=1, concurrent=1)[-1]["num_failed"] == 0
        found.append({e.digest: e for e in Ledger(str(runner.out)).entries()})
    one, two = found
    assert set(one) == set(two) and len(one) == 2 * 1 + 2 * (2 + 1)
    for digest, entry in two.items():
        assert entry.num_processes == (2 if entry.method == "finetune" else 1)
        assert entry.value == pytest.approx(one[digest].value, abs=2 / entry.num_test), entry
        assert entry.config_digest == one[digest].config_digest


@pytest.mark.slow
def test_ranks_end_with_their_worker_even_if_one_is_stopped(digits: str, checkpoint: str, tmp_path: Path) -> None:
    sweep = sweep_in(tmp_path, digits, checkpoint, scheduler="asha")
    code = (
        "import sys, time\nfrom orchestration.tune.trial_group import run_ranks\n"
        "from transfer.sweep.cells import plan, sweep_of\n"
        "sweep = sweep_of(sys.argv[1])\ntrial = plan(sweep)[0][0].search[0]\n"
        "def report(row):\n    print('row', flush=True)\n    time.sleep(600)\n"
        "run_ranks(sweep, trial, report, until=0, num_processes=2, has_gpus=False)\n"
    )
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    worker = subprocess.Popen([sys.executable, "-c", code, sweep.out], env=variables, stdout=subprocess.PIPE)
    assert worker.stdout is not None
    assert b"row" in worker.stdout.readline()
    ranks = ranks_of(worker.pid)
    os.kill(ranks["1"], signal.SIGSTOP)
    worker.kill()
    worker.communicate()
    for _ in range(100):
        left = [pid for pid in ranks.values() if Path(f"/proc/{pid}/cmdline").exists() and _is_alive(pid)]
        if not left:
            break
        time.sleep(0.2)
    assert len(ranks) == 2 and not left


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False
