"""Start a program in one process, or in several as torch's launcher does."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PROGRAMS = Path(__file__).parent / "programs"


def run(program: str, *arguments: Any, num_processes: int = 1, timeout_s: float = 300) -> str:
    words = [str(PROGRAMS / program), *(a if isinstance(a, str) else json.dumps(a) for a in map(_plain, arguments))]
    if num_processes > 1:
        words = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words], env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def _plain(argument: Any) -> Any:
    return str(argument) if isinstance(argument, Path) else argument
