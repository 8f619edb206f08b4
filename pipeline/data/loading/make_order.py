"""The order of a split as a run configures it."""

import numpy as np

from pipeline.data.format.manifest import SplitIndex
from pipeline.data.loading.data_config import DataConfig
from pipeline.data.sampling.lanes import LaneLayout, LaneOrder, choose_layout
from pipeline.data.sampling.order import Order, cut_blocks
from pipeline.errors import UserError

Pool = np.ndarray | range
"""Samples of a split that a run uses, rising; a range where it uses all of them."""


def choose_order(config: DataConfig, index: SplitIndex, *, distinct: int) -> LaneLayout | None:
    """Lanes for a split; None where it is small and shuffled whole.

    Args:
        distinct: different samples in a global batch.
    Raises:
        UserError: data.lanes does not fit.
    """
    if config.subset is not None:
        if config.lanes:
            raise UserError(
                "data.lanes is set and data.subset too: a subset is small and is shuffled whole; leave out data.lanes"
            )
        return None
    sample_bytes = sum(shard.size_bytes for shard in index.shards) / max(index.num_samples, 1)
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
    if layout is not None:
        return LaneOrder(layout, seed)
    shard, offset = index.shard, index.offset
    if isinstance(pool, np.ndarray):
        shard, offset = shard[pool], offset[pool]
    return Order(
        cut_blocks(shard, offset, config.block_bytes), seed, 0 if config.order == "lanes" else config.mix_blocks
    )


def describe(config: DataConfig, index: SplitIndex, layout: LaneLayout | None) -> str:
    """One sentence for the plan of a run; empty for the windowed order."""
    if config.order != "lanes":
        return ""
    if layout is None:
        return "too small for lanes, shuffled whole"
    open_bytes = window_bytes(index, layout)
    return (
        f"{layout.lanes} lanes of {layout.blocks_per_lane:,} blocks of {open_bytes / layout.lanes / layout.window / 1e6:.1f} MB, "
        f"{layout.window} of each lane open: {open_bytes / 1e9:.2g} GB over all hosts; {layout.reread_share:.2%} are read "
        f"twice an epoch"
    )


def window_bytes(index: SplitIndex, layout: LaneLayout) -> float:
    """Of all blocks that are open at a time."""
    sample_bytes = sum(shard.size_bytes for shard in index.shards) / layout.num_samples
    return layout.lanes * layout.window * layout.block_samples * sample_bytes
