"""`data prepare` and `data index` as 4 parts and on a Ray of two nodes, killed ten times: the digest of one process.

NORMFREE_PREPARED_IMAGES=1000000 is the size that this stands for; the figures are in docs/LOG.md.
"""

import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.format.manifest import Manifest
from tests.orchestration.tune.test_cluster import second_ray
from tests.orchestration.tune.test_ray_each import newest_task, second_node

pytestmark = pytest.mark.slow
IMAGES = int(os.environ.get("NORMFREE_PREPARED_IMAGES", "4000"))
DISTINCT, CLASSES, KILLS = 2000, 97, 10


def make_source(path: Path) -> None:
    rng, jpegs = np.random.default_rng(0), []
    for _ in range(DISTINCT):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (24, 24, 3), np.uint8)).save(buffer, "JPEG", quality=60)
        jpegs.append(buffer.getvalue())
    with tarfile.open(path, "w") as tar:
        for number in range(IMAGES):
            data = jpegs[number % DISTINCT] + number.to_bytes(4, "big")  # bytes behind the end: no two files are equal
            member = tarfile.TarInfo(f"{'train' if number % 50 else 'val'}/c{number % CLASSES:02d}/{number:07d}.jpg")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def start(folder: Path, *words: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", "-m", "orchestration.cli", "data", *map(str, words)]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, start_new_session=True)


def run(folder: Path, *words: object) -> None:
    begin = time.monotonic()
    assert start(folder, *words).wait() == 0, words
    print(f"{time.monotonic() - begin:.0f} s: data {' '.join(map(str, words))}")


def killed(folder: Path, port: str, *words: object) -> int:
    """Types the command until it has ended; the driver and a worker are killed in turn, at most `KILLS` times in all."""
    num, begin, drivers = 0, time.monotonic(), 0
    driver, next_kill = start(folder, *words), time.monotonic() + 12.0  # it has reached the cluster by then
    while (code := driver.poll()) is None or code < 0:
        if code is not None:
            driver, next_kill, drivers = start(folder, *words), time.monotonic() + 12.0, drivers + 1
        if time.monotonic() > next_kill and num < KILLS:
            task = None if num % 2 == 0 else newest_task(port)
            if task is not None or num % 2 == 0:
                os.kill(task or driver.pid, signal.SIGKILL)
                num, next_kill = num + 1, time.monotonic() + 6.0
        time.sleep(0.05)
    assert code == 0, words
    print(f"{time.monotonic() - begin:.0f} s, {num} kills, {drivers} of the driver: data {' '.join(map(str, words))}")
    return num


def test_one_process_four_parts_and_a_cluster_make_one_dataset(tmp_path: Path) -> None:
    make_source(tmp_path / "source.tar")
    shards = max(20, IMAGES // 500)
    prepare = ("prepare", "images", "--source", "source.tar", "--shard-samples", max(20, IMAGES // shards))
    run(tmp_path, *prepare, "--out", "whole")
    for part in range(1, 5):
        run(tmp_path, *prepare, "--out", "parts", "--part", f"{part}/4")
    run(tmp_path, *prepare, "--out", "parts", "--merge")
    for name in ("index_whole", "index_ray"):
        (tmp_path / name).mkdir()
        for shard in (tmp_path / "whole").glob("*.tar"):
            os.link(shard, tmp_path / name / shard.name)
    run(tmp_path, "index", "index_whole")
    with second_ray(tmp_path / "home", {}) as address, second_node(address, {}):
        port = address.rpartition(":")[2]
        num = killed(tmp_path, port, *prepare, "--out", "ray", "--ray-address", address)
        num += killed(tmp_path, port, "index", "index_ray", "--ray-address", address)
    digests = {name: Manifest.open(str(tmp_path / name)).digest for name in ("whole", "parts", "ray")}
    assert set(digests.values()) == {digests["whole"]} and num
    assert Manifest.open(str(tmp_path / "index_ray")).digest == Manifest.open(str(tmp_path / "index_whole")).digest
    made = Manifest.open(str(tmp_path / "ray"))
    assert sum(made.split(name).num_samples for name in ("train", "val")) == IMAGES
    shutil.rmtree(tmp_path)  # a gigabyte and more at full size
