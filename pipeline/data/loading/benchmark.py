"""How fast a dataset gives batches, where the time goes, and what reading alone would give."""

import dataclasses
import time
from dataclasses import dataclass

from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.data.loading.data_config import DataConfig
from pipeline.data.loading.datasets import TrainData
from pipeline.data.loading.prefetch import ReadAhead, places_of
from pipeline.distributed import ALONE

WARM_UP_S = 1.0
"""Measured from here on: the first second belongs to starting processes and connections."""
_STEPS = 1 << 30
BARE_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Rate:
    """What was measured with one number of loader processes; images and encoded bytes."""

    num_workers: int
    images_per_s: float
    mb_per_s: float
    images_per_core_s: float = 0.0
    """Images for each second of the reading process's own processor time, all its threads; without loader processes only."""
    first_batch_s: float = 0.0
    wait_share: float = 0.0
    """Of the time, waiting for a batch (all of it, where nothing else is done)."""
    read_share: float = 0.0
    """Of the loader processes' time, waiting for bytes."""
    decode_share: float = 0.0
    """Of the loader processes' time, making pixels."""


def measure(config: DataConfig, augment: AugmentConfig, *, num_workers: int, batch: int, seconds: float) -> Rate:
    """Training batches as a run gets them, for `seconds` after the first second."""
    data = TrainData(dataclasses.replace(config, num_workers=num_workers), augment, seed=0, global_batch=batch)
    begin = time.perf_counter()
    stream = data.batches(steps=range(_STEPS), global_batch=batch, micro_batch=batch, world=ALONE)
    images = num_bytes = 0
    first_batch_s = wait_s = read_s = decode_s = begin_core_s = 0.0
    mark = None
    while mark is None or time.perf_counter() - mark < seconds:
        asked = time.perf_counter()
        found = next(stream)
        now = time.perf_counter()
        first_batch_s = first_batch_s or now - begin
        if mark is None:
            mark = now if now - begin >= WARM_UP_S else None
            begin_core_s = time.process_time()
            continue
        images, num_bytes, wait_s = images + len(found.labels), num_bytes + found.num_bytes, wait_s + now - asked
        read_s, decode_s = read_s + found.read_s, decode_s + found.decode_s
    spent_s = time.perf_counter() - mark
    return Rate(
        num_workers=num_workers,
        images_per_s=images / spent_s,
        mb_per_s=num_bytes / spent_s / 1e6,
        images_per_core_s=images / max(time.process_time() - begin_core_s, 1e-9),
        first_batch_s=first_batch_s,
        wait_share=wait_s / spent_s,
        read_share=read_s / spent_s / max(num_workers, 1),
        decode_share=decode_s / spent_s / max(num_workers, 1),
    )


def bare_read(config: DataConfig, *, seconds: float) -> Rate:
    """The same samples in the same order, read and proven and thrown away."""
    data = TrainData(config, AugmentConfig(), seed=0, global_batch=BARE_BATCH)
    places = (places_of(*data.draw(step, BARE_BATCH)) for step in range(_STEPS))
    budget_bytes = int(config.read_ahead_mb * 1e6)
    ahead = ReadAhead(data.sources.readers, places, budget_bytes=budget_bytes, num_threads=config.read_threads)
    begin = time.perf_counter()
    images = num_bytes = 0
    mark = None
    for reading in ahead:
        now = time.perf_counter()
        if mark is None:
            mark = now if now - begin >= WARM_UP_S else None
            continue
        images += len(reading.contents)
        num_bytes += sum(len(c) for c in reading.contents if isinstance(c, bytes))
        if now - mark >= seconds:
            break
    spent_s = time.perf_counter() - (mark or begin)
    return Rate(num_workers=0, images_per_s=images / spent_s, mb_per_s=num_bytes / spent_s / 1e6)
