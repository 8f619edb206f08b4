"""Saving F4+ (527M parameters: weights, momentum and average are 6.3 GB): how long training stands still, how fast it is written.

TMPDIR=FOLDER python -m benchmarks checkpoint      FOLDER: on the disk to measure, with room for twice the state

Against two limits measured in turn with it: one plain copy of the same bytes to host memory that is there already, and the
disk's own rate (the same bytes, several files at a time, past the page cache, nothing hashed).
"""

import os
import resource
import shutil
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

import nfnet
from pipeline.checkpoint import commit, load
from pipeline.checkpoint.direct_io import ALIGN_BYTES, PIECE_BYTES
from pipeline.checkpoint.part_writer import NUM_WRITERS
from pipeline.checkpoint.retention import Policy
from pipeline.checkpoint.saver import Saver
from pipeline.checkpoint.saving_config import SavingConfig
from pipeline.checkpoint.snapshot import FILE_BYTES
from pipeline.distributed import World
from pipeline.records import Saved

ROUNDS, MAX_STALL, MIN_SHARE = 3, 1.2, 0.7


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fragments, shapes = _state(device)
    num_bytes = sum(4 * v.numel() for v in fragments.values())
    print(f"F4+: {sum(map(_numel, shapes.values())):,} parameters, {num_bytes / 1e9:.2f} GB of state on {device}")
    folder = Path(tempfile.mkdtemp(prefix="normfree-benchmark-"))
    try:
        stalls, copies, writes, disks = _measure(fragments, shapes, folder, device)
    finally:
        shutil.rmtree(folder)
    stall, copy = statistics.median(stalls), statistics.median(copies)
    print(
        f"step stalled   {_seconds(stalls)}   plain copy {_seconds(copies)}   ratio {stall / copy:.2f} (at most {MAX_STALL})"
    )
    rate, disk = num_bytes / statistics.median(writes) / 1e9, num_bytes / statistics.median(disks) / 1e9
    print(
        f"copy to commit {_seconds(writes)} = {rate:.2f} GB/s   disk {_seconds(disks)} = {disk:.2f} GB/s   "
        f"share {rate / disk:.2f} (at least {MIN_SHARE})"
    )
    print(f"peak memory    {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB")


def _measure(
    fragments: dict[str, torch.Tensor], shapes: dict[str, list[int]], folder: Path, device: torch.device
) -> tuple[list[float], list[float], list[float], list[float]]:
    world = World(rank=0, size=1, local_rank=0, device=device)
    saver = Saver(str(folder), config=SavingConfig(), policy=Policy(last=1), world=world, taken=set())
    saver.reserve(sum(4 * v.numel() for v in fragments.values()))
    memory = saver._memory._buffer
    facts: dict[str, Any] = {"samples": 0, "num_updates": 0, "shapes": shapes, "config": {}, "config_digest": ""}
    facts |= {"dataset": {}, "classes": [], "evaluation": {}}
    stalls, copies, writes, disks = [], [], [], []
    for step in range(1, ROUNDS + 1):
        copies.append(_copy(fragments, memory))
        disks.append(_disk(memory, folder))
        begin = time.perf_counter()
        saver.save(step=step, fragments=fragments, facts=facts)
        stalls.append(time.perf_counter() - begin)
        (saved,) = saver.settle()
        assert isinstance(saved, Saved), saved
        writes.append(saved.seconds_s - saved.stalled_s)
    begin = time.perf_counter()
    load.verify(commit.read_commit(saved.url), str(folder / "cache"))
    print(f"verified       {time.perf_counter() - begin:.2f} s")
    return stalls, copies, writes, disks


def _state(device: torch.device) -> tuple[dict[str, torch.Tensor], dict[str, list[int]]]:
    """What `Engine.local_fragments` gives on one rank; the numbers do not matter to a copy, zeros would to some disks."""
    with torch.device("meta"):
        model = nfnet.create_model("nfnet_f4_plus")
    shapes = {n: list(p.shape) for n, p in model.named_parameters()}
    block = torch.randn(max(map(_numel, shapes.values())), device=device)
    kinds = ("weights", "momentum", "ema")
    return {f"{k}/{n}@0": block[: _numel(s)].clone() for k in kinds for n, s in shapes.items()}, shapes


def _numel(shape: list[int]) -> int:
    return torch.Size(shape).numel()


def _copy(fragments: dict[str, torch.Tensor], memory: torch.Tensor) -> float:
    begin, offset = time.perf_counter(), 0
    for tensor in fragments.values():
        memory[offset : offset + 4 * tensor.numel()].view(torch.float32).copy_(tensor, non_blocking=True)
        offset += 4 * tensor.numel()
    if tensor.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def _disk(memory: torch.Tensor, folder: Path) -> float:
    """The same bytes in files of the same size, as many at a time, straight from memory."""
    data = memory.numpy().data
    starts = list(range(0, len(data), FILE_BYTES))[::-1]

    def write() -> None:
        while starts:
            start = starts.pop()
            descriptor = os.open(folder / f"disk-{start}", os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
            end = min(start + FILE_BYTES, len(data)) // ALIGN_BYTES * ALIGN_BYTES
            while start < end:
                start += os.write(descriptor, data[start : min(start + PIECE_BYTES, end)])
            os.fsync(descriptor)
            os.close(descriptor)

    begin = time.perf_counter()
    threads = [threading.Thread(target=write) for _ in range(NUM_WRITERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds_s = time.perf_counter() - begin
    for path in folder.glob("disk-*"):
        path.unlink()
    return seconds_s


def _seconds(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} s ({min(values):.2f}-{max(values):.2f})"


if __name__ == "__main__":
    main()
