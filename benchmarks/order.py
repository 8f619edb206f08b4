"""Order and index at the sizes of the papers: from nothing to a batch's positions, and to where a rank's images lie.

What a run does at its start, after a restart and at each step, in a process of its own for each size: the manifest is opened,
the positions of a batch of 4,096 are computed in all lanes, and one rank of 64 looks up in the index what its share needs.
All pieces of an index are copies of one, since a process reads a few of them. Seconds of the processor, so that what else
runs on the machine does not count; the files are in the page cache. No peer, limits printed.
"""

import multiprocessing
import tempfile
import time
from dataclasses import replace
from pathlib import Path

BATCH, RANKS, SHARD_SAMPLES = 4096, 64, 640
SIZES = (("10M", 10_000_000, 0, 0.5, 50), ("300M", 300_000_000, 0, 0.5, 100), ("4B", 4_000_000_000, 1024, 1.0, 200))
"""Name, samples, lanes (0: as a run chooses), and what is to be reached: seconds, MB above numpy."""


def main() -> None:
    print(
        f"order and index in lanes: a batch of {BATCH}, blocks of 60 samples, 16 of a lane open, shards of {SHARD_SAMPLES}"
    )
    for name, num, lanes, limit_s, limit_mb in SIZES:
        with tempfile.TemporaryDirectory(prefix="normfree-order-") as folder:
            manifest_mb = _write(folder, num)
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                first_s, anywhere_s, next_s, lookup_s, grown_mb, found = pool.apply(_measure, (folder, lanes))
        verdict = "reached" if max(first_s, anywhere_s) <= limit_s and grown_mb <= limit_mb else "missed"
        print(
            f"  {name:>4} in {found:>5} lanes, manifest {manifest_mb:.1f} MB: first {first_s:.3f} s, anywhere "
            f"{anywhere_s:.3f} s, the next {next_s:.4f} s, a rank's index {lookup_s:.3f} s, {grown_mb:.0f} MB more; "
            f"target {limit_s:g} s, {limit_mb} MB {verdict}"
        )


def _write(folder: str, num: int) -> float:
    """A dataset of about `num` samples without its shards; size of its manifest in MB."""
    import numpy as np

    from pipeline.data.format.manifest import NAME, Manifest, Split, dataset_digest
    from pipeline.data.format.pieces import PIECE_SHARDS, ROW, Shard, write_piece

    piece_samples = PIECE_SHARDS * SHARD_SAMPLES
    rows = np.zeros(piece_samples, ROW)
    rows["offset"], rows["size"] = np.arange(piece_samples) % SHARD_SAMPLES * 100_000, 90_000
    shards = [
        Shard(f"train-{i:06d}.tar", SHARD_SAMPLES * 100_000, "0" * 64, SHARD_SAMPLES) for i in range(PIECE_SHARDS)
    ]
    keys, hashes = [f"{i:09d}" for i in range(piece_samples)], np.arange(piece_samples, dtype=np.uint64)
    piece, _ = write_piece(Path(folder), "train", 0, shards, rows, keys, hashes)
    pieces = tuple(replace(piece) for _ in range(num // piece_samples))
    splits = {"train": Split(piece_samples * len(pieces), pieces)}
    made = Manifest(folder, "synthetic", ("a",), dataset_digest(("a",), splits), splits, None, {}, "", {})
    return Path(folder, NAME).write_bytes(made.to_json()) / 1e6


def _peak_mb() -> float:
    """Of this process, of its own: what the kernel counts for resource.getrusage begins with the parent's."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1e3


def _measure(folder: str, lanes: int) -> tuple[float, float, float, float, float, int]:
    import numpy as np

    np.arange(10)
    before_mb = _peak_mb()
    from pipeline.data.format.manifest import Manifest
    from pipeline.data.sampling.lanes import LaneOrder, choose_layout

    begin = time.process_time()
    index = Manifest.open(folder).split("train")
    layout = choose_layout(index.num_samples, block_samples=60, lanes=lanes, window=16, batch=BATCH)
    assert layout is not None
    LaneOrder(layout, 0).positions(0, BATCH)
    first_s = time.process_time() - begin
    begin = time.process_time()
    index = Manifest.open(folder).split("train")
    order, middle = LaneOrder(layout, 0), index.num_samples // 2
    _, samples = order.positions(middle, BATCH)
    anywhere_s = time.process_time() - begin
    begin = time.process_time()
    index.rows(samples[np.argsort(order.lane_share(np.arange(middle, middle + BATCH)))][: BATCH // RANKS])
    lookup_s = time.process_time() - begin
    begin = time.process_time()
    order.positions(middle + BATCH, BATCH)
    next_s = time.process_time() - begin
    grown_mb = _peak_mb() - before_mb
    return first_s, anywhere_s, next_s, lookup_s, grown_mb, layout.lanes
