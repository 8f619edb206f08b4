"""The order in lanes out of a real object store: each byte reaches one host, in whole blocks."""

import re
from pathlib import Path

import pytest
import torch

from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.data.loading.datasets import DataConfig, TrainData
from pipeline.distributed import World
from pipeline.errors import UserError
from pipeline.storage import block_cache
from tests.pipeline.storage.test_stream import Store, store  # noqa: F401

AUGMENT = AugmentConfig(image_px=8)
BATCH, STEPS = 32, 21
"""672 of the 697 images."""


def config(url: str, cache_dir: Path) -> DataConfig:
    return DataConfig(
        url=url, cache_dir=str(cache_dir), order="lanes", lanes=8, lane_blocks=1, block_mb=0.0025, max_lost_share=0.5
    )


def rank_of(rank: int, num_ranks: int) -> World:
    return World(rank=rank, size=num_ranks, local_rank=0, device=torch.device("cpu"))


def steps_of(data: TrainData, rank: int, num_ranks: int) -> list[list[int]]:
    """Samples of this rank at each step."""
    micro = 4
    batches = data.batches(steps=range(STEPS), global_batch=BATCH, micro_batch=micro, world=rank_of(rank, num_ranks))
    seen = [int(s) for batch in batches for s in batch.samples]
    return [seen[i : i + BATCH // num_ranks] for i in range(0, len(seen), BATCH // num_ranks)]


@pytest.fixture(autouse=True)
def _room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_cache, "KEEP_FREE_BYTES", 0)
    monkeypatch.setattr("pipeline.data.sampling.lanes.MIN_TURNS", 10)


def test_eight_ranks_on_four_hosts_fetch_each_byte_once_in_whole_blocks(
    store: Store,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    url = store.copy()
    whole = steps_of(TrainData(config(store.local, tmp_path), AUGMENT, seed=3, global_batch=BATCH), 0, 1)
    store.proxy.log.clear()
    shares = []
    for rank in range(8):
        data = TrainData(config(url, tmp_path / f"host{rank // 2}"), AUGMENT, seed=3, global_batch=BATCH)
        shares.append(steps_of(data, rank, 8))
    assert [[s for share in shares for s in share[step]] for step in range(STEPS)] == whole
    assert len({s for step in whole for s in step}) == STEPS * BATCH

    ranges = [re.fullmatch(r"bytes=(\d+)-(\d+)", text) for line, text in store.proxy.log if ".tar" in line and text]
    sizes = [int(found[2]) - int(found[1]) + 1 for found in ranges if found]
    layout = data.layouts[0]
    assert layout is not None
    singles = data.index.num_samples - layout.num_in_blocks
    blocks = layout.num_blocks + len(data.index.shards)  # one that crosses a border is two requests
    assert len(sizes) <= blocks + singles
    total = sum(shard.size_bytes for shard in data.index.shards)
    assert sum(sizes) < 1.05 * total


def test_a_disk_without_room_for_the_open_blocks_is_refused_before_anything_is_read(
    store: Store,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(block_cache, "KEEP_FREE_BYTES", 1 << 62)
    url = store.copy()
    store.proxy.log.clear()
    with pytest.raises(UserError, match=r"open blocks .* lacks .* GB: set data\.cache_dir"):
        TrainData(config(url, tmp_path), AUGMENT, seed=3, global_batch=BATCH)
    assert not any(".tar" in line for line, _ in store.proxy.log)


def test_a_kept_block_with_other_bytes_is_fetched_again_and_nothing_is_lost(
    store: Store,  # noqa: F811
    tmp_path: Path,
) -> None:
    data = TrainData(config(store.copy(), tmp_path), AUGMENT, seed=3, global_batch=BATCH)
    samples = data.draw(0, BATCH)[1].tolist()
    reader = data.sources.readers[0]

    def contents() -> list[bytes]:
        return [reader.read(request)[s] for s in samples for request in reader.requests([s])]  # type: ignore[misc]

    expected = contents()
    kept = [path for path in tmp_path.rglob("*-*") if path.is_file()]
    assert kept and all(isinstance(content, bytes) for content in expected)
    for path in kept:
        path.write_bytes(bytes(path.stat().st_size))
    assert contents() == expected
