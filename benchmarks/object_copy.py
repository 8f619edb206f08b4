"""A checkpoint's file to an S3 server on loopback and back, against plain multipart copying of the same bytes, in turn.

python -m benchmarks object_copy       NORMFREE_BENCH_MB=1024: size of the file; NORMFREE_BENCH_ROUNDS=5

Ours up is what a save does (parts from memory, SHA-256 next to them, size checked); ours down is a whole `pull` (space taken,
ranges, SHA-256 of what has arrived, commit file). The peers copy only: boto3's transfer manager and s3fs, defaults.
"""

import contextlib
import json
import os
import secrets
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.stream import _server
from benchmarks.turns import race
from pipeline.checkpoint.commit import COMMIT
from pipeline.checkpoint.part_writer import write_part
from pipeline.checkpoint.pull import pull
from pipeline.checkpoint.snapshot import Image
from pipeline.storage import objects

TARGET = 0.8
NAME = "fragments-00000-of-00001.safetensors"


def _file(path: Path, size_mb: int) -> torch.Tensor:
    """Bytes that no store can shorten, as a safetensors file of one tensor; in memory and on disk."""
    header = json.dumps({"x": {"dtype": "U8", "shape": [size_mb << 20], "data_offsets": [0, size_mb << 20]}}).encode()
    head = len(header).to_bytes(8, "little") + header
    pattern = secrets.token_bytes(1 << 20)
    with path.open("wb") as file:
        file.write(head)
        for number in range(size_mb):
            file.write(number.to_bytes(8, "little") + pattern[8:])
    return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)


def _commit(part: dict[str, Any]) -> bytes:
    facts: dict[str, Any] = {"step": 1, "samples": 1, "num_updates": 1, "shapes": {}, "config": {}, "config_digest": ""}
    facts |= {"dataset": {}, "classes": [], "evaluation": {}}
    return json.dumps({"format": 1, "files": part["files"], "kinds": part["kinds"], **facts}).encode()


def main() -> None:
    size_mb = int(os.environ.get("NORMFREE_BENCH_MB", "1024"))
    rounds = int(os.environ.get("NORMFREE_BENCH_ROUNDS", "5"))
    with tempfile.TemporaryDirectory(prefix="normfree-copy-") as scratch, _server(Path(scratch)) as environment:
        os.environ.update(environment)
        _race(Path(scratch), size_mb, rounds)


def _race(scratch: Path, size_mb: int, rounds: int) -> None:
    import boto3
    import s3fs

    path, back, pulled = scratch / NAME, scratch / "back", scratch / "pulled"
    memory = _file(path, size_mb)
    image = Image(NAME, ("weights",), memory, memory.numel())
    url = "s3://bucket/ours/step_00000001"
    s3, fs = boto3.client("s3"), s3fs.S3FileSystem(use_listings_cache=False)

    def ours_up() -> None:
        part = write_part(url, [image], rank=0, size=1, staging="", give_up=threading.Event())
        objects.write_bytes(objects.join(url, COMMIT), _commit(part))

    def ours_down() -> None:
        shutil.rmtree(pulled, ignore_errors=True)
        pull(url, pulled)

    def fresh(work: Any) -> None:
        back.unlink(missing_ok=True)
        work()

    up = {
        "ours: parts from memory, hashed": ours_up,
        "boto3 upload_file": lambda: s3.upload_file(str(path), "bucket", "boto3"),
        "s3fs put_file": lambda: fs.put_file(str(path), "bucket/s3fs"),
    }
    down = {
        "ours: pull, verified": ours_down,
        "boto3 download_file": lambda: fresh(lambda: s3.download_file("bucket", "boto3", str(back))),
        "s3fs get_file": lambda: fresh(lambda: fs.get_file("bucket/s3fs", str(back))),
    }
    for title, runs in (("up", up), ("down", down)):
        race(f"{size_mb} MiB {title}", runs, ours=next(iter(runs)), target=TARGET, rounds=rounds)
    _limits(path, memory)


def _limits(path: Path, memory: torch.Tensor) -> None:
    """What bounds every copy on this machine: hashing, and writing a file with fsync."""
    begin = time.perf_counter()
    objects.sha256_file(path)
    hashed = time.perf_counter()
    with path.with_name("written").open("wb") as file:
        file.write(memory.numpy().data)
        os.fsync(file.fileno())
    written = time.perf_counter()
    mb = memory.numel() / 1e6
    print(f"  limits: SHA-256 {mb / (hashed - begin):.0f} MB/s, file and fsync {mb / (written - hashed):.0f} MB/s")
    with contextlib.suppress(OSError):
        path.with_name("written").unlink()


if __name__ == "__main__":
    main()
