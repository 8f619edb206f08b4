"""A process that is killed leaves nothing in the temporary folder that the next one does not remove."""

import os
import subprocess
import sys
from pathlib import Path

from pipeline import places
from pipeline.supervision import stack_dumps
from tests.pipeline.processes import ROOT

ALONE = """
import os, signal
from pipeline.data.process_pool import safe_context
from pipeline.distributed import join
from pipeline.supervision.stack_dumps import Dump
join()
Dump().__enter__()
safe_context()
if {kill}: os.kill(os.getpid(), signal.SIGKILL)
from pipeline.distributed import leave
from pipeline.supervision.process_exit import end
leave()
end(0)
"""
FROZEN = """
import os, signal
from pipeline.supervision.phase_clock import PHASES, WHERE
from pipeline.supervision.stack_dumps import Dump
def frozen_here():
    os.kill(os.getpid(), signal.SIGSTOP)
dump = Dump().__enter__()
WHERE.pack_into(dump.board, 0, PHASES.index("save"), 17)
print(dump.path, flush=True)
frozen_here()
"""


def run(program: str, tmp_path: Path) -> int:
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", program], env=environment, check=False).returncode


def test_a_rank_leaves_nothing_however_it_ends(tmp_path: Path) -> None:
    folder = tmp_path / "t"
    folder.mkdir()
    assert run(ALONE.format(kill=True), folder) == -9
    assert all(p.name.startswith(places.TEMPORARY) for p in folder.iterdir())
    assert run(ALONE.format(kill=False), folder) == 0
    assert list(folder.iterdir()) == []


def test_a_frozen_process_shows_where_it_froze_without_a_file(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", FROZEN], env=environment, stdout=subprocess.PIPE, text=True) as frozen:
        assert frozen.stdout is not None
        path = frozen.stdout.readline().strip()
        os.waitpid(frozen.pid, os.WUNTRACED)
        found = stack_dumps.examine(frozen.pid, path)
    assert (found["phase"], found["last_step"]) == ("save", 17) and found["process"].startswith("T")
    assert any("frozen_here" in line for line in found["stacks"])
    assert list(tmp_path.iterdir()) == []
