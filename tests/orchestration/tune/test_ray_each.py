"""Preparation and index as tasks of a Ray cluster of two nodes: the bytes of one process, whatever is killed meanwhile."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from orchestration.tune.ray_each import ray_each
from pipeline.data.format.manifest import Manifest
from pipeline.data.prepare.adopt import adopt
from pipeline.data.prepare.prepare import Preparation
from pipeline.data.sources.cards import load_card
from pipeline.errors import UserError
from tests.orchestration.tune.test_cluster import second_ray

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def second_node(address: str, variables: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    program = shutil.which("ray", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}") or "ray"
    command = [program, "start", f"--address={address}", "--num-cpus=2", "--block", "--disable-usage-stats"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.startswith("RAY_")} | variables
    node = subprocess.Popen(command, cwd="/", env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        yield node
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(node.pid, signal.SIGTERM)
        node.wait(timeout=60)


def newest_task(port: str) -> int | None:
    """Process of a task of the cluster at `port`."""
    for entry in sorted(Path("/proc").glob("[0-9]*"), key=lambda p: -int(p.name)):
        with contextlib.suppress(OSError, IndexError):
            parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
            is_task = (entry / "cmdline").read_bytes().startswith(b"ray::_run")
            if is_task and port.encode() in Path(f"/proc/{parent}/cmdline").read_bytes():
                return int(entry.name)
    return None


def kill_workers(port: str, ended: threading.Event, killed: list[int]) -> None:
    """Of this cluster, the newest process with a task, every second."""
    while not ended.wait(1.0) and len(killed) < 10:
        if (task := newest_task(port)) is not None:
            os.kill(task, signal.SIGKILL)
            killed.append(task)


def test_a_cluster_of_two_nodes_writes_what_one_process_writes_while_its_workers_are_killed(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(400):
        path = tmp_path / f"source/{('train', 'val')[number % 2]}/c{number % 3}/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(path)
    whole = Preparation(
        card=load_card("images"), out=str(tmp_path / "whole"), source=str(tmp_path / "source"), shard_samples=8
    )
    expected = whole.run()
    tars = tmp_path / "tars"
    tars.mkdir()
    for path in (tmp_path / "whole").glob("*.tar"):
        shutil.copy(path, tars)
    ended, killed = threading.Event(), list[int]()
    with second_ray(tmp_path / "home", {}) as address, second_node(address, {}), ray_each(address) as run_each:
        killer = threading.Thread(target=kill_workers, args=(address.rpartition(":")[2], ended, killed))
        killer.start()
        try:
            made = replace(whole, out=str(tmp_path / "out"), run_each=run_each).run()
            indexed = adopt(str(tars), classes=["c0", "c1", "c2"], run_each=run_each)
        finally:
            ended.set()
            killer.join()
        broken = tars / "train-000003.tar"
        broken.write_bytes(broken.read_bytes()[:50_000])
        (tars / "manifest.json").unlink()
        with pytest.raises(UserError, match="1 of 50 tars are damaged"):
            adopt(str(tars), run_each=run_each)
    assert made.digest == expected.digest and indexed is not None and indexed.digest == expected.digest
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()
    }
    assert Manifest.open(str(tmp_path / "out")).split("train").num_samples == 200
    assert killed
