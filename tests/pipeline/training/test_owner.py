"""Every process of a run finds the same folder, and one group of them owns it."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import distributed
from pipeline.distributed import World
from pipeline.errors import UserError
from pipeline.storage import ownership
from pipeline.training.owner import owned

ROOT = Path(__file__).parents[3]
ELSEWHERE = ("hostB", "/disk/of/b/run", "it is not there")


def test_a_rank_that_does_not_find_what_rank_0_wrote_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    me = World(rank=0, size=2, local_rank=0, device=torch.device("cpu"))
    monkeypatch.setattr(distributed, "broadcast", lambda world, value: value)
    rows: list[Any] = []

    def gather(world: World, value: Any) -> list[Any]:
        rows.append(value)
        return [value, value if len(rows) == 1 else ELSEWHERE]  # the processes, then what each found

    monkeypatch.setattr(distributed, "gather", gather)
    reason = f"rank 1 on hostB does not find in /disk/of/b/run .* {socket.gethostname()}"
    with pytest.raises(UserError, match=reason), owned(str(tmp_path / "run"), me):
        raise AssertionError("step 0")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_machines_with_a_disk_of_each_are_refused_before_step_0(digits: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    ranks = []
    for rank in "01":
        folder = tmp_path / f"host{rank}"
        folder.mkdir()
        variables = {
            "RANK": rank,
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        words = ["pretrain", "nfnet_tiny_glyphs", "--data.url", digits, "--out", "runs/local", "--global_batch", "16"]
        words += ["--augment.image_px", "16", "--optim.warmup", "1 steps", "--duration", "20 steps"]
        ranks.append(
            subprocess.Popen(
                [sys.executable, "-m", "orchestration.cli", *words],
                cwd=folder,
                env={**os.environ, **variables, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    said = [rank.communicate()[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], said
    assert all(f"does not find in {tmp_path}/host1/runs/local" in log for log in said)
    assert not (tmp_path / "host0/runs/local").exists() and ownership.NAME not in str(list(tmp_path.rglob("*")))
