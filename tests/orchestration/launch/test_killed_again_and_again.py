"""Start, SIGKILL of everything, start: nothing of it is left in temporary folders, shared memory or locks, and the run ends."""

import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.duration import Duration
from tests.orchestration.launch.agents import job, until
from tests.pipeline.watched import make_run

ROUNDS = int(os.environ.get("NORMFREE_KILL_ROUNDS", "5"))
STEPS = 100


def kill_everything(agent: Any) -> None:
    processes = [psutil.Process(agent.pid), *psutil.Process(agent.pid).children(recursive=True)]
    for process in processes:
        process.send_signal(signal.SIGKILL)
    psutil.wait_procs(processes, timeout=60)
    agent.wait()


@pytest.mark.slow
def test_nothing_is_left_of_runs_that_are_killed(digits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(digits, duration=Duration(STEPS, "steps"), eval_every=None, save_every=Duration(2, "steps"))
    temporary, shared = tmp_path / "t", Path("/dev/shm")
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    before = {path.name for path in shared.iterdir()}
    checkpoints = tmp_path / "run" / "checkpoints"
    with job(tmp_path) as running:
        num = 0
        for _ in range(ROUNDS):
            agent = running.agent("a", run, tmp_path / "run", max_hosts=1, processes=2)
            num = _await_checkpoint(checkpoints, num, agent)
            kill_everything(agent)
        assert running.agent("a", run, tmp_path / "run", max_hosts=1, processes=2).wait() == 0, running.output[-3000:]
    assert _newest(checkpoints) == STEPS
    assert list(temporary.iterdir()) == []
    assert not {name for name in {path.name for path in shared.iterdir()} - before if not _is_used(name)}
    assert not (tmp_path / "run" / "owner.json").exists()


def _await_checkpoint(checkpoints: Path, before: int, agent: Any) -> int:
    """The step of one that was not there before."""
    until(lambda: _newest(checkpoints) > before or agent.poll() is not None)
    return _newest(checkpoints)


def _is_used(name: str) -> bool:
    """By a living process, which is another test's."""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            if f"/dev/shm/{name}" in maps.read_text():
                return True
        except OSError:
            continue
    return False


def _newest(checkpoints: Path) -> int:
    return max((int(path.parent.name.rpartition("_")[2]) for path in checkpoints.glob("step_*/commit.json")), default=0)
