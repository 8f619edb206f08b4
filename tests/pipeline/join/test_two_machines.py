"""Two ranks of one run, started by hand as on two machines: what they do not agree in ends both with 2, and leaves nothing."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.storage import ownership

ROOT = Path(__file__).parents[3]
RUN = ["--augment.image_px", "16", "--optim.warmup", "1 steps", "--duration", "20 steps", "--global_batch", "16"]


def start(folder: Path, digits: str, out: str, own: dict[str, list[str]]) -> tuple[list[int], list[str]]:
    """Exit codes and what each rank printed; `own`: words of a rank's command besides."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    where = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = []
    for rank in "01":
        here = folder / f"host{rank}"
        here.mkdir()
        words = ["pretrain", "nfnet_tiny_glyphs", "--data.url", digits, "--out", out, *RUN, *own.get(rank, [])]
        ranks.append(
            subprocess.Popen(
                [sys.executable, "-m", "orchestration.cli", *words],
                cwd=here,
                env={**os.environ, **where, "RANK": rank, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    said = [rank.communicate()[1] for rank in ranks]
    return [rank.returncode for rank in ranks], said


def test_two_commands_that_differ_are_refused_before_step_0(digits: str, tmp_path: Path) -> None:
    codes, said = start(tmp_path, digits, str(tmp_path / "run"), {"1": ["--seed", "3"]})
    assert codes == [2, 2], said
    assert (
        "the hosts of this run differ in field seed: 0 on" in said[0]
        and "start all hosts with the same command" in said[0]
    )
    assert "normfree: differs" in said[0] and "(rank 1)" in said[0].splitlines()[-1]
    assert "normfree: the hosts of this run differ" in said[1] and "normfree: differs" not in said[1]  # one table
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_machines_with_a_disk_of_each_are_refused_before_step_0(digits: str, tmp_path: Path) -> None:
    codes, said = start(tmp_path, digits, "runs/local", {})
    assert codes == [2, 2], said
    assert f"does not find in {tmp_path}/host1/runs/local" in said[0]
    assert not (tmp_path / "host0/runs/local").exists() and ownership.NAME not in str(list(tmp_path.rglob("*")))
