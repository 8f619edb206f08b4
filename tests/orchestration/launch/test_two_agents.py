"""Two hosts of a job, each with its agent: what is lost is started again, and the weights are those of an undisturbed run."""

import base64
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestration.launch import job_store
from pipeline.checkpoint import load
from pipeline.duration import Duration
from pipeline.supervision.hang_detection import WatchdogConfig
from tests.orchestration.launch.agents import ENOUGH_S, Job, job, ranks_of, until
from tests.pipeline.watched import make_run

RANK = """
import os, pathlib, signal, sys, time
from orchestration.run import rank_end
folder = pathlib.Path({folder!r})
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
(folder / ("start-" + str(os.getpid()))).write_text(os.environ["WORLD_SIZE"])
while not asked and not (folder / "finish").exists():
    time.sleep(0.05)
sys.exit(rank_end.leave(75 if asked else 0, is_signalled=bool(asked)))
"""


def starts(folder: Path) -> list[str]:
    """World sizes that ranks have seen, in the order of their starts."""
    return [path.read_text() for path in sorted(folder.glob("start-*"), key=lambda path: path.stat().st_mtime)]


def test_a_rank_that_is_killed_is_started_again_on_both_hosts(tmp_path: Path) -> None:
    (tmp_path / "rank_program.py").write_text(RANK.format(folder=str(tmp_path)))
    with job(tmp_path) as running:
        first, second = running.toy("a"), running.toy("b")
        until(lambda: starts(tmp_path) == ["2", "2"])
        os.kill(ranks_of(second)[0], signal.SIGKILL)
        until(lambda: len(starts(tmp_path)) == 4)
        (tmp_path / "finish").touch()
        assert [first.wait(), second.wait()] == [0, 0]
        assert starts(tmp_path)[2:] == ["2", "2"]
        assert "a rank on b was ended by a signal; starting again" in running.output


def test_a_program_in_the_jobs_store_runs_in_no_agent_and_ends_it_in_one_sentence(tmp_path: Path) -> None:
    program = b"cposix\nmkdir\n(V" + str(tmp_path / "ran").encode() + b"\ntR."
    with job(tmp_path) as running:
        store = job_store.connect("127.0.0.1", running.port, wait_s=ENOUGH_S)
        store.set("torch.rendezvous.job", base64.b64encode(program).decode())
        assert running.toy("a").wait() == 2
        (line,) = [line for line in running.output.splitlines() if line.startswith("normfree:")]
        assert "'posix.mkdir'" in line and not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_a_stop_of_one_host_is_the_jobs(tmp_path: Path) -> None:
    (tmp_path / "rank_program.py").write_text(RANK.format(folder=str(tmp_path)))
    with job(tmp_path) as running:
        first, second = running.toy("a"), running.toy("b")
        until(lambda: len(starts(tmp_path)) == 2)
        second.terminate()
        assert [first.wait(), second.wait()] == [75, 75]


@pytest.mark.slow
def test_the_ranks_of_a_killed_agent_end_the_others_go_on_and_the_host_may_return(tmp_path: Path) -> None:
    (tmp_path / "rank_program.py").write_text(RANK.format(folder=str(tmp_path)))
    with job(tmp_path) as running:
        first, second = running.toy("a"), running.toy("b")
        until(lambda: len(starts(tmp_path)) == 2)
        (orphan,) = ranks_of(second)
        second.kill()
        second.wait()
        until(lambda: not Path(f"/proc/{orphan}").exists())
        os.kill(ranks_of(first)[0], signal.SIGKILL)  # as its collective fails
        until(lambda: starts(tmp_path)[2:] == ["1"])
        again = running.toy("b")
        until(lambda: starts(tmp_path)[3:] == ["2", "2"])
        (tmp_path / "finish").touch()
        assert [first.wait(), again.wait()] == [0, 0]


# --- training ---------------------------------------------------------------------------------------------------------

STEPS = 60


def weights(folder: Path) -> dict[str, torch.Tensor]:
    commit = load.resolve(str(folder), str(folder / "cache"))
    assert commit.step == STEPS
    whole = load.load_state(commit, str(folder / "cache"))
    return {f"{k}/{n}": t for k, tensors in whole.items() for n, t in tensors.items()}


def has_step(folder: Path, step: int) -> bool:
    return (folder / "checkpoints" / f"step_{step:08d}" / "commit.json").exists()


def disturb(how: str, running: Job, start: Any, second: Any) -> Any:
    """What happens to the second host; the agent that it then has."""
    match how:
        case "worker killed":
            os.kill(ranks_of(second)[0], signal.SIGKILL)
        case "worker frozen":
            os.kill(ranks_of(second)[0], signal.SIGSTOP)
        case "agent killed":
            second.kill()
            second.wait()
            return None
        case "agent returns":
            second.kill()
            second.wait()
            return start("b")
    return second


@pytest.mark.slow
@pytest.mark.parametrize("how", ["nothing", "worker killed", "worker frozen", "agent killed", "agent returns"])
def test_a_disturbed_run_ends_with_the_weights_of_an_undisturbed_one(how: str, digits: str, tmp_path: Path) -> None:
    watchdog = WatchdogConfig(limit_s=60, grace_s=60)
    run = make_run(
        digits, duration=Duration(STEPS, "steps"), eval_every=None, save_every=Duration(10, "steps"), watchdog=watchdog
    )
    (tmp_path / "alone").mkdir()
    with job(tmp_path / "alone") as alone:
        assert alone.agent("a", run, tmp_path / "whole", max_hosts=1, processes=2).wait() == 0
    with job(tmp_path) as running:

        def start(host: str) -> Any:
            return running.agent(host, run, tmp_path / "run")

        first, second = start("a"), start("b")
        until(lambda: has_step(tmp_path / "run", 20))
        second = disturb(how, running, start, second)
        assert first.wait() == 0, running.output[-3000:]
        assert second is None or second.wait() == 0
    whole, found = weights(tmp_path / "whole"), weights(tmp_path / "run")
    assert whole.keys() == found.keys()
    if how in ("nothing", "worker killed", "worker frozen"):  # two ranks at every step
        assert all(torch.equal(whole[name], found[name]) for name in whole)
    else:
        assert all(torch.allclose(whole[name], found[name], rtol=0, atol=1e-6) for name in whole)
