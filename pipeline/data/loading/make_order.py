"""The samples of a run's splits, and their order as it configures it."""

import numpy as np

from pipeline.data.format.index import SplitIndex
from pipeline.data.format.manifest import Manifest
from pipeline.data.loading.batches import Sources
from pipeline.data.loading.data_config import DataConfig
from pipeline.data.sampling.lanes import LaneLayout, LaneOrder, choose_layout
from pipeline.data.sampling.order import Order, cut_blocks
from pipeline.data.sampling.subset import Subset, select
from pipeline.errors import UserError
from pipeline.storage import objects
from pipeline.storage.block_cache import BlockCache
from pipeline.supervision.rank_environment import num_hosts

WINDOW_ROOM = 1.5
"""Room for the open blocks of a host, times what its lanes have open: what was used up goes only when room is short."""
Pool = np.ndarray | range
"""Samples of a split that a run uses, rising; a range where it uses all of them."""


def choose_order(config: DataConfig, index: SplitIndex, *, distinct: int) -> LaneLayout | None:
    """Lanes for a split; None where it is small and shuffled whole.

    Args:
        distinct: different samples in a global batch.
    Raises:
        UserError: data.lanes does not fit.
    """
    if distinct < 1:
        raise ValueError("lanes are chosen for a global batch: TrainData needs it")
    if config.subset is not None:
        if config.lanes:
            raise UserError(
                "data.lanes is set and data.subset too: a subset is small and is shuffled whole; leave out data.lanes"
            )
        return None
    sample_bytes = index.num_bytes / max(index.num_samples, 1)
    return choose_layout(
        index.num_samples,
        block_samples=max(1, round(config.block_bytes / max(sample_bytes, 1))),
        lanes=config.lanes,
        window=config.lane_blocks,
        batch=distinct,
    )


def make_order(
    config: DataConfig, index: SplitIndex, pool: Pool, layout: LaneLayout | None, seed: int
) -> Order | LaneOrder:
    """The order of the samples of a pool, numbered in it."""
    if config.order == "correlated":
        check_classes(config.url, index.num_classes)
    if layout is not None:
        return LaneOrder(layout, seed)
    shard, offset = index.shard, index.offset
    if isinstance(pool, np.ndarray):
        shard, offset = shard[pool], offset[pool]
    return Order(
        cut_blocks(shard, offset, config.block_bytes), seed, 0 if config.order == "lanes" else config.mix_blocks
    )


def check_classes(url: str, num_classes: int) -> None:
    """UserError where there is nothing to sort by."""
    if num_classes < 2:
        raise UserError(
            f"{url} has {num_classes} class{'' if num_classes == 1 else 'es'}, and correlated batches are sorted by class: "
            "take another order, or data with classes"
        )


def by_class(sources: Sources, source: np.ndarray, epoch: np.ndarray, sample: np.ndarray) -> tuple[np.ndarray, ...]:
    """The different samples of a global batch sorted by class; those of a class as they came."""
    label = np.empty(len(sample), np.int64)
    for number, (reader, mapped) in enumerate(zip(sources.readers, sources.label_maps, strict=True)):
        mine = source == number
        label[mine] = mapped[reader.index.label[sample[mine]]]
    order = np.argsort(label, kind="stable")
    return source[order], epoch[order], sample[order]


def make_cache(config: DataConfig, index: SplitIndex, layout: LaneLayout | None) -> BlockCache | None:
    """Where blocks of a store are kept, None where none are. UserError: the disk is too small for the open blocks of lanes."""
    cache, bound_bytes, needed_bytes = None, int(config.cache_gb * 1e9), 0
    if layout is not None:  # the window of open blocks, whatever else is kept
        needed_bytes = int(WINDOW_ROOM * window_bytes(index, layout) / num_hosts())
    if not objects.is_local(index.url) and max(bound_bytes, needed_bytes) > 0:
        cache = BlockCache(config.shard_cache(), max(bound_bytes, needed_bytes))
        # Streamed past the window, each block would be fetched once for each of its parts.
        if needed_bytes and (missing_bytes := cache.missing_bytes(needed_bytes)):
            raise UserError(
                f"the open blocks of the order in lanes take {needed_bytes / 1e9:.3g} GB of this host in {config.shard_cache()}, "
                f"which lacks {missing_bytes / 1e9:.3g} GB: set data.cache_dir to a larger disk, or lower data.lanes, "
                "data.lane_blocks or data.block_mb"
            )
    return cache


def describe(config: DataConfig, index: SplitIndex, layout: LaneLayout | None) -> str:
    """One sentence for the plan of a run; empty for the windowed order."""
    if config.order != "lanes":
        return ""
    if layout is None:
        return "too small for lanes, shuffled whole"
    open_bytes = window_bytes(index, layout)
    where = "" if objects.is_local(config.url) else f", in {config.shard_cache()}"
    block_mb = open_bytes / layout.lanes / layout.window / 1e6
    shared = ", and with several datasets what lies at the borders of hosts" if config.mixture else ""
    return (
        f"{layout.lanes} lanes of {layout.blocks_per_lane:,} blocks of {block_mb:.1f} MB, {layout.window} of each lane open: "
        f"{open_bytes / 1e9:.2g} GB over all hosts{where}; {layout.reread_share:.2%} are read twice an epoch{shared}"
    )


def window_bytes(index: SplitIndex, layout: LaneLayout) -> float:
    """Of all blocks that are open at a time."""
    sample_bytes = index.num_bytes / layout.num_samples
    return layout.lanes * layout.window * layout.block_samples * sample_bytes


def united(config: DataConfig) -> list[tuple[float, Manifest, SplitIndex]]:
    """Sources of training with their weights, one for each split of each dataset; a dataset's weight is shared by the sizes of
    its splits, so that each of its images comes as often as any other."""
    opened = [(weight, Manifest.open(url)) for url, weight in config.sources()]
    found = []
    for weight, manifest in opened:
        indices = [manifest.split(name) for name in config.train_split.split("+")]
        num = sum(index.num_samples for index in indices)
        found += [(weight * (index.num_samples / num), manifest, index) for index in indices]
    return found


def pool_of(manifest: Manifest, index: SplitIndex, subset: Subset | None) -> Pool:
    return range(index.num_samples) if subset is None else select(manifest.strata(index.label), subset)
