"""The launcher of several ranks on one machine: what it passes on, whom it ends, which code it returns."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from orchestration.launch import local
from orchestration.launch.rank_processes import Ranks


def supervise(program: str, num_processes: int, folder: Path, *, grace_s: float, max_restarts: int = 0) -> int:
    (folder / "rank_program.py").write_text(program)
    environment = {"PYTHONPATH": str(folder)}
    ranks = Ranks(module="rank_program", environment=environment, processes=num_processes, grace_s=grace_s)
    return local.supervise(ranks, max_restarts=max_restarts)


def test_every_rank_gets_its_place_and_finds_the_others(tmp_path: Path) -> None:
    program = (
        "import os; from pipeline import distributed\n"
        "me = distributed.join()\n"
        "box = distributed.gather(me, (int(os.environ['RANK']), os.environ['LOCAL_RANK'], os.environ['WORLD_SIZE']))\n"
        "assert box == [(0, '0', '3'), (1, '1', '3'), (2, '2', '3')], box\n"
        "distributed.leave()"
    )
    assert supervise(program, 3, tmp_path, grace_s=30) == 0


def test_a_signal_goes_to_all_ranks_and_their_code_comes_back(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    program = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        f"open(f'{tmp_path}/' + os.environ['RANK'], 'w').close()\n"
        "time.sleep(600)"
    )

    def stop() -> None:
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=stop, daemon=True).start()
    assert supervise(program, 2, tmp_path_factory.mktemp("program"), grace_s=30) == 75
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_rank_that_froze_is_killed_when_the_others_have_left_it(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys, time\n"
        f"with open(f'{tmp_path}/' + os.environ['RANK'], 'w') as file: file.write(str(os.getpid()))\n"
        "os.kill(os.getpid(), signal.SIGSTOP) if os.environ['RANK'] == '1' else None\n"
        f"while not os.path.exists('{tmp_path}/1'): time.sleep(0.01)\n"
        "time.sleep(0.2)\n"
        "sys.exit(76)"
    )
    assert supervise(program, 2, tmp_path, grace_s=600) == 76
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "1").read_text()), 0)


def test_the_ranks_that_a_failed_one_leaves_behind_are_ended(tmp_path: Path) -> None:
    program = "import os, sys, time\nsys.exit(3) if os.environ['RANK'] == '1' else time.sleep(600)"
    assert supervise(program, 2, tmp_path, grace_s=600) == 3


def test_the_ranks_of_a_killed_launcher_hear_of_it(tmp_path: Path) -> None:
    (tmp_path / "rank_program.py").write_text(
        "import os, signal, sys, time\n"
        f"told = f'{tmp_path}/told' + os.environ['RANK']\n"
        "signal.signal(signal.SIGTERM, lambda *_: (open(told, 'w').close(), sys.exit(75)))\n"
        f"open(f'{tmp_path}/up' + os.environ['RANK'], 'w').close()\n"
        "time.sleep(600)"
    )
    launch = (
        "from orchestration.launch.local import supervise\n"
        "from orchestration.launch.rank_processes import Ranks\n"
        f"environment = {{'PYTHONPATH': {str(tmp_path)!r}}}\n"
        "supervise(Ranks(module='rank_program', environment=environment, processes=2, grace_s=30))"
    )
    launcher = subprocess.Popen([sys.executable, "-c", launch], cwd=Path(__file__).parents[3])
    while len(list(tmp_path.glob("up*"))) < 2:
        time.sleep(0.05)
    launcher.kill()
    launcher.wait()
    deadline_s = time.monotonic() + 30
    while len(list(tmp_path.glob("told*"))) < 2:
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_ranks_that_fail_start_again_until_the_limit_or_until_they_do_not_fail(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    program = (
        "import pathlib, sys\n"
        f"mark = pathlib.Path({str(tmp_path / 'failed')!r})\n"
        "if mark.exists(): sys.exit(0)\n"
        "mark.touch(); sys.exit(3)"
    )
    assert supervise(program, 1, tmp_path, grace_s=30, max_restarts=1) == 0
    assert "restart 1 of 1" in capfd.readouterr().err
    assert supervise("import sys; sys.exit(3)", 1, tmp_path, grace_s=30, max_restarts=1) == 3


def test_a_rank_that_has_stopped_well_leaves_the_others_the_time_for_theirs(tmp_path: Path) -> None:
    """torch's agent by itself sends SIGTERM again to the ranks that still save."""
    program = (
        "import os, pathlib, signal, sys, time\n"
        "from orchestration.run import rank_end\n"
        "told = []\n"
        "signal.signal(signal.SIGTERM, lambda *_: told.append(1))\n"
        f"up = pathlib.Path({str(tmp_path / 'up')!r})\n"
        "if os.environ['RANK'] == '1': up.touch()\n"
        "while not up.exists(): time.sleep(0.05)\n"
        "if os.environ['RANK'] == '0': os.kill(os.getppid(), signal.SIGTERM)\n"
        "while not told: time.sleep(0.05)\n"
        "if os.environ['RANK'] == '0': time.sleep(4)\n"
        "assert len(told) == 1, told\n"
        "sys.exit(rank_end.leave(75, is_signalled=True))"
    )
    assert supervise(program, 2, tmp_path, grace_s=30, max_restarts=3) == 75
