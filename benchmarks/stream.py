"""Lanes out of an S3 server on loopback against the same shards on disk, without and with 100 ms before each answer, in turn.

600 MB of JPEGs of 127 KB in shards of 81 MB and blocks of 9 MB. Images a second and a core are those of the reading process,
so what else runs on the machine counts little; the cache that holds the window is empty at the start of each turn. Then eight
ranks on four hosts read an epoch, each byte and request counted by a proxy.
"""

import importlib.util
import io
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import s3fs
from PIL import Image

from benchmarks.turns import hardware
from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.data.format.manifest import NAME
from pipeline.data.format.pieces import Shard
from pipeline.data.format.shards import ShardSample, shard_name, write_shard
from pipeline.data.loading.benchmark import measure
from pipeline.data.loading.datasets import DataConfig, TrainData
from pipeline.data.loading.prefetch import Place, ReadAhead
from pipeline.data.prepare.assemble import assemble, make_piece
from pipeline.data.prepare.journal import Record
from pipeline.data.sampling import lanes
from pipeline.storage import objects

PX, BATCH, SECONDS, ROUNDS = 224, 32, 4.0, 3
IMAGES, SHARD_IMAGES, DISTINCT = 4800, 640, 60
HOSTS, RANKS, LANES = 4, 8, 8
DELAY_S = 0.1


def _load(name: str):  # type: ignore[no-untyped-def]
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "tests" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _jpegs() -> list[bytes]:
    """Smooth noise, so that a file of 100 KB has the pixels of a photograph of that size."""
    rng, found = np.random.default_rng(0), []
    for _ in range(DISTINCT):
        small = Image.fromarray(rng.integers(0, 255, (130, 130, 3), np.uint8)).resize(
            (500, 500), Image.Resampling.BICUBIC
        )
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=90)
        found.append(buffer.getvalue())
    return found


def _write(folder: Path) -> None:
    jpegs, records = _jpegs(), []
    for number in range(-(-IMAGES // SHARD_IMAGES)):
        numbers = range(number * SHARD_IMAGES, min((number + 1) * SHARD_IMAGES, IMAGES))
        data = [jpegs[i % DISTINCT] for i in numbers]
        samples = [ShardSample(f"{i:06d}", i % 10, content, "jpg") for i, content in zip(numbers, data, strict=True)]
        made = write_shard(samples, folder / shard_name("train", number))
        records.append(
            Record(
                "",
                "train",
                Shard(made.path.name, made.size_bytes, made.sha256, len(numbers)),
                tuple(sample.key for sample in samples),
                np.array(made.offsets, np.int64),
                np.array([len(content) for content in data], np.int32),
                np.array([sample.label for sample in samples], np.int32),
                np.array(numbers, np.uint64),
                np.array([zlib.crc32(content) for content in data], np.uint32),
                (),
            )
        )
    classes = tuple("0123456789")
    manifest = assemble("stream", str(folder), classes, [make_piece(folder, "train", 0, records, 10)], {}, "", folder)
    (folder / NAME).write_bytes(manifest.to_json())


def _slow_proxy(upstream: str, pipe) -> None:  # type: ignore[no-untyped-def]
    """In a process of its own: its work is not the reader's."""
    faults = _load("fault_proxy")
    with faults.fault_proxy(upstream) as proxy:
        proxy.faults.append(faults.Fault("GET|HEAD", times=1 << 60, delay_s=DELAY_S))
        pipe.send(proxy.url)
        pipe.recv()


def _rates(configs: dict[str, tuple[DataConfig, str]], scratch: str) -> None:
    found: dict[str, list[float]] = {name: [] for name in configs}
    for number in range(ROUNDS):
        for name, (config, endpoint) in configs.items():
            os.environ["AWS_ENDPOINT_URL"] = endpoint
            s3fs.S3FileSystem.clear_instance_cache()
            config = replace(config, cache_dir=f"{scratch}/cache-{number}-{len(name)}")
            rate = measure(config, AugmentConfig(image_px=PX), num_workers=0, batch=BATCH, seconds=SECONDS)
            found[name].append(rate.images_per_core_s)
    for name in list(configs)[1:]:
        ratios = sorted(a / b for a, b in zip(found[name], found["disk"], strict=True))
        print(
            f"{PX} px, one process: {name} {statistics.median(found[name]):.0f} images/s a core, disk "
            f"{statistics.median(found['disk']):.0f}, ratio {statistics.median(ratios):.2f} "
            f"({ratios[0]:.2f}-{ratios[-1]:.2f})  [{hardware()}]"
        )


def _amplification(config: DataConfig, upstream: str, scratch: str) -> None:
    """An epoch, each host with a cache of its own."""
    os.environ["LOCAL_WORLD_SIZE"] = str(RANKS // HOSTS)
    lanes.MIN_TURNS = 5  # with one block open a lane nothing is read twice, however short it is
    with _load("fault_proxy").fault_proxy(upstream) as proxy:
        os.environ["AWS_ENDPOINT_URL"] = proxy.url
        s3fs.S3FileSystem.clear_instance_cache()
        batch, seen = RANKS * 4, 0
        for rank in range(RANKS):
            mine = replace(config, lanes=LANES, cache_dir=f"{scratch}/host-{rank // (RANKS // HOSTS)}")
            data = TrainData(mine, AugmentConfig(), seed=0, global_batch=batch)
            steps = (
                data.draw_share(s, batch, rank=rank, num_ranks=RANKS, micro_batch=4) for s in range(IMAGES // batch)
            )
            draws = ([Place(*p) for p in zip(*(a.ravel().tolist() for a in step), strict=True)] for step in steps)
            ahead = ReadAhead(data.sources.readers, draws, budget_bytes=32 << 20, num_threads=8)
            seen += sum(isinstance(content, bytes) for reading in ahead for content in reading.contents)
        ranges = (re.fullmatch(r"bytes=(\d+)-(\d+)", text) for line, text in proxy.log if ".tar" in line)
        sizes = [int(found[2]) - int(found[1]) + 1 for found in ranges if found]
        total = data.index.num_bytes
        print(
            f"{RANKS} ranks on {HOSTS} hosts, {seen} of {IMAGES} images: {sum(sizes) / total:.3f} times the shards' bytes, "
            f"{len(sizes)} requests of {np.mean(sizes) / 1e6:.2f} MB, {len(proxy.log) - len(sizes)} others"
        )


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="normfree-stream-") as scratch:
        local, remote = Path(scratch) / "data-set", "s3://bucket/data-set"
        local.mkdir()
        _write(local)
        with _load("s3_server").s3_server(Path(scratch)) as environment:
            os.environ.update(environment, NORMFREE_CACHE=f"{scratch}/user")
            for path in local.iterdir():
                objects.put_file(path, objects.join(remote, path.name))
            config = DataConfig(url=remote, order="lanes", lanes=1, lane_blocks=1, block_mb=9.0, cache_gb=0.0)
            endpoint = environment["AWS_ENDPOINT_URL"]
            ours, theirs = multiprocessing.Pipe()
            slow = multiprocessing.get_context("spawn").Process(
                target=_slow_proxy, args=(endpoint, theirs), daemon=True
            )
            slow.start()
            delayed = ours.recv()
            _rates(
                {
                    "disk": (replace(config, url=str(local)), endpoint),
                    "S3": (config, endpoint),
                    f"S3 after {DELAY_S * 1e3:.0f} ms": (config, delayed),
                },
                scratch,
            )
            ours.send("end")
            slow.join(5)
            _amplification(config, endpoint, scratch)
