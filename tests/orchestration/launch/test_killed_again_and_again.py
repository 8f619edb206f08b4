"""Start, SIGKILL of everything, start: no process, port, lock, shared memory or temporary folder is left, and the run ends."""

import contextlib
import os
import signal
import socket
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.duration import Duration
from tests.orchestration.launch.agents import job, until
from tests.pipeline.watched import make_run

ROUNDS = int(os.environ.get("NORMFREE_KILL_ROUNDS", "5"))
STEPS = 6 * ROUNDS + 10


def kill_everything(agent: Any) -> set[int]:
    """The ports on which they listened."""
    processes = [psutil.Process(agent.pid), *psutil.Process(agent.pid).children(recursive=True)]
    own = {process.pid for process in processes}
    listening = [c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.pid in own]
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):  # one of its own ended in between
            process.send_signal(signal.SIGKILL)
    psutil.wait_procs(processes, timeout=60)
    agent.wait()
    return {connection.laddr.port for connection in listening}


def locked_below(folder: Path) -> list[Path]:
    """Files that somebody holds a lock on."""
    held = {int(line.split()[-3].rpartition(":")[2]) for line in Path("/proc/locks").read_text().splitlines()}
    return [path for path in folder.rglob("*") if path.lstat().st_ino in held]


def living(temporary: Path) -> list[list[str]]:
    """Processes that were given this temporary folder, this one aside."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get("TMPDIR") == str(temporary):
                found.append(process.cmdline())
        except psutil.Error:
            continue
    return found


@pytest.mark.slow
def test_nothing_is_left_of_runs_that_are_killed(digits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(digits, duration=Duration(STEPS, "steps"), eval_every=None, save_every=Duration(2, "steps"))
    temporary, shared = tmp_path / "t", Path("/dev/shm")
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    before = {path.name for path in shared.iterdir()}
    checkpoints = tmp_path / "run" / "checkpoints"
    with job(tmp_path) as running:
        num, ports = 0, set[int]()
        for _ in range(ROUNDS):
            agent = running.agent("a", run, tmp_path / "run", max_hosts=1, processes=2)
            until(lambda before=num, agent=agent: _newest(checkpoints) > before or agent.poll() is not None)
            assert agent.poll() is None, running.output[-3000:]
            num = _newest(checkpoints)
            ports |= kill_everything(agent)
            until(lambda: living(temporary) == [])  # one that was just being started ends with its parent
            assert locked_below(tmp_path) == []
        assert ports
        for port in ports:
            socket.create_server(("127.0.0.1", port)).close()
        assert running.agent("a", run, tmp_path / "run", max_hosts=1, processes=2).wait() == 0, running.output[-3000:]
    assert _newest(checkpoints) == STEPS
    # torch's compiler keeps one folder a user, however many runs there are.
    assert [path.name for path in temporary.iterdir() if not path.name.startswith("torchinductor_")] == []
    # What other programs of the machine leave for a moment (semaphores of a pool that ends) is not this run's.
    until(lambda: not {n for n in {path.name for path in shared.iterdir()} - before if not _is_used(n)})
    assert not (tmp_path / "run" / "owner.json").exists()


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
