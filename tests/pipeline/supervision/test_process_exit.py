"""A process ends with its exit code, whatever its threads are at."""

import subprocess
import sys

from tests.pipeline.processes import PROGRAMS, ROOT


def test_a_thread_inside_torch_does_not_abort_a_process_that_ended_well() -> None:
    """With `sys.exit` in its place the same program is aborted (SIGABRT), every time on the tested machine."""
    command = [sys.executable, str(PROGRAMS / "busy_thread.py")]
    done = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (3, "written registered\n", "")


def test_a_process_without_stdout_ends_with_its_code() -> None:
    command = f'"{sys.executable}" -c "from pipeline.supervision.process_exit import end; end(0)" >&-'
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
