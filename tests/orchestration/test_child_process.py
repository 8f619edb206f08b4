"""A child imports nothing from the folder of its parent, shows no secret, and ends with its parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orchestration import child_process
from pipeline.errors import UserError

EVIL = "import os, pathlib; pathlib.Path(os.environ['MARK']).write_text(__file__)\n"


def test_nothing_of_the_parents_folder_runs_in_a_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("psutil", "platform", "timeit", "sitecustomize", "socket", "selectors"):
        (tmp_path / f"{name}.py").write_text(EVIL)
    (tmp_path / "orchestration").mkdir()
    (tmp_path / "orchestration" / "__init__.py").write_text(EVIL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))
    monkeypatch.setenv("PYTHONPATH", f":.{os.pathsep}")
    # As uvicorn does, and with a child of its own, as multiprocessing starts it.
    code = "import sys, subprocess; sys.path.insert(0, ''); import psutil; "
    code += "subprocess.run([sys.executable, '-c', 'import psutil, socket, selectors'], check=True)"
    assert child_process.start("timeit", ["-n1", "-r1", code]).wait() == 0
    assert not (tmp_path / "mark").exists()


def test_multiprocessing_imports_nothing_from_the_folder(tmp_path: Path) -> None:
    """Python starts its fork server by `python -c`, which looks in the working folder first."""
    for name in ("selectors", "socket", "struct"):
        (tmp_path / f"{name}.py").write_text(EVIL)
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "command.py"
    command.write_text(
        f"import sys\nsys.path.append({str(child_process.ROOT)!r})\n"
        "from orchestration.child_process import use_safe_path\nuse_safe_path()\n"
        "import multiprocessing\n"
        "if __name__ == '__main__':\n"
        "    process = multiprocessing.get_context('forkserver').Process(target=print)\n"
        "    process.start()\n    process.join()\n"
    )
    environment = os.environ | {"MARK": str(tmp_path / "mark")}
    subprocess.run([sys.executable, str(command)], cwd=tmp_path, check=True, env=environment)
    assert not (tmp_path / "mark").exists()


def test_files_named_by_variables_are_those_of_the_parents_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "key.json")
    assert child_process.child_environment()["GOOGLE_APPLICATION_CREDENTIALS"] == str(tmp_path / "key.json")


def test_a_secret_on_a_command_line_is_refused() -> None:
    with pytest.raises(UserError, match="credentials"):
        child_process.start("timeit", ["postgresql://me:secret@db/x"])


@pytest.mark.parametrize("is_stopped", [False, True])
def test_a_child_ends_with_its_parent(is_stopped: bool) -> None:
    code = (
        "import sys; from orchestration.child_process import start; "
        "child = start('timeit', ['-n1', '-r1', 'import os, time; print(os.getpid(), flush=True); time.sleep(60)']); child.wait()"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=child_process.ROOT, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        if is_stopped:
            os.kill(child, signal.SIGSTOP)
        parent.kill()
    deadline_s = time.monotonic() + 20
    while Path(f"/proc/{child}/stat").exists() and Path(f"/proc/{child}/stat").read_text().split()[2] not in "ZX":
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def test_ranks_of_one_machine_meet_without_a_port() -> None:
    def listening() -> set[str]:
        files = [Path(f"/proc/self/net/{name}").read_text() for name in ("tcp", "tcp6")]
        rows = [line.split() for text in files for line in text.splitlines()]
        own = {os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()}
        return {row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in own}

    before = listening()
    with child_process.rank_variables(2) as variables:
        assert listening() == before
        folder = Path(variables["NORMFREE_RANKS_STORE"])
        assert folder.stat().st_mode & 0o777 == 0o700
    assert not folder.exists() and variables["GLOO_SOCKET_IFNAME"] == "lo"
