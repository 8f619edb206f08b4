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
from orchestration.launch.local import outcome


def supervise(program: str, num_processes: int, folder: Path, *, grace_s: float) -> int:
    (folder / "rank_program.py").write_text(program)
    environment = {"PYTHONPATH": str(folder)}
    return local.supervise("rank_program", [], num_processes, grace_s=grace_s, environment=environment)


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ([0, 0], 0),
        ([75, 75], 75),
        ([0, 75], 75),
        ([-signal.SIGTERM, 75], 75),  # told before it could listen
        ([75, 2], 2),
        ([-signal.SIGKILL, 1], 1),
        ([-signal.SIGSEGV], 1),
        ([-41, 76], 76),  # the frozen one, drawn out by a neighbour, ends first
        ([1, 76], 76),
    ],
)
def test_the_code_of_a_run_is_that_of_the_rank_that_explains_it(codes: list[int], code: int) -> None:
    assert outcome(codes) == code


def test_every_rank_gets_what_torch_reads_and_finds_the_store(tmp_path: Path) -> None:
    program = (
        "import os, torch.distributed as dist\n"
        "dist.init_process_group('gloo'); box = [None] * 3\n"
        "dist.all_gather_object(box, (int(os.environ['RANK']), os.environ['LOCAL_RANK'], os.environ['WORLD_SIZE']))\n"
        "assert box == [(0, '0', '3'), (1, '1', '3'), (2, '2', '3')], box\n"
        "dist.destroy_process_group()"
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
        "import os, signal, sys\n"
        f"open(f'{tmp_path}/' + os.environ['RANK'], 'w').write(str(os.getpid()))\n"
        "os.kill(os.getpid(), signal.SIGSTOP) if os.environ['RANK'] == '1' else sys.exit(76)"
    )
    assert supervise(program, 2, tmp_path, grace_s=600) == 76
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "1").read_text()), 0)


def test_the_ranks_that_a_failed_one_leaves_behind_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "LINGER_S", 0.5)
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
        f"supervise('rank_program', [], 2, grace_s=30, environment={{'PYTHONPATH': {str(tmp_path)!r}}})"
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
