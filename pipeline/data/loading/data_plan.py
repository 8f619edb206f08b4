"""What reading a dataset in lanes will cost and how well it mixes, before anything is read: arithmetic alone."""

from dataclasses import dataclass

import numpy as np

from pipeline.data.loading.make_order import WINDOW_ROOM
from pipeline.data.sampling.lanes import LaneLayout
from pipeline.errors import UserError


@dataclass(frozen=True, kw_only=True)
class DataPlan:
    """Of one epoch; bytes of the shards, rates a host."""

    lanes_per_host: int
    """Of the host that has most."""
    amplification: float
    """Bytes that all hosts fetch together, over the bytes of the dataset."""
    excess_variance: float
    """Variance of class counts in a batch over that of a random draw, at most."""
    neighbours: float
    """How much more often than by chance two neighbours of a shard meet in a batch."""
    requests: int
    """Of all hosts together."""
    request_bytes: float
    window_bytes: float
    """Room that a host's window takes."""
    requests_per_s: float
    bytes_per_s: float


def data_plan(
    layout: LaneLayout,
    *,
    batch: int,
    num_hosts: int,
    ranks_per_host: int,
    sample_bytes: float,
    samples_per_s: float,
    between_blocks: float = 0.0,
) -> DataPlan:
    """
    Args:
        batch: different samples in a global batch; the lanes divide it.
        samples_per_s: of all hosts together.
        between_blocks: share of the variance of classes that lies between blocks, from 0 (shards shuffled when written) to 1
            (sorted by class); see `class_variance_between_blocks`.
    Raises:
        UserError: the batch does not divide among the ranks.
    """
    if batch % (num_hosts * ranks_per_host):
        raise UserError(
            f"{num_hosts} hosts of {ranks_per_host} ranks do not divide a global batch of {batch}: choose numbers whose "
            f"product does"
        )
    per_lane, per_host = batch // layout.lanes, batch // num_hosts
    begins = np.arange(num_hosts) * per_host
    touched = (begins + per_host - 1) // per_lane - begins // per_lane + 1
    amplification = float(touched.sum()) / layout.lanes * (1 + layout.reread_share)
    open_blocks = layout.lanes * layout.window
    lanes = int(touched.max())
    block_bytes = layout.block_samples * sample_bytes
    requests = round(layout.num_blocks * amplification) + layout.num_samples - layout.num_in_blocks
    blocks_per_s = samples_per_s * amplification / layout.block_samples / num_hosts
    return DataPlan(
        lanes_per_host=lanes,
        amplification=amplification,
        excess_variance=1 + between_blocks * batch / open_blocks,
        neighbours=_meet(layout, per_lane) * (layout.num_samples - 1) / (batch - 1),
        requests=requests,
        request_bytes=layout.num_samples * sample_bytes * amplification / requests,
        window_bytes=WINDOW_ROOM * lanes * layout.window * block_bytes,
        requests_per_s=blocks_per_s,
        bytes_per_s=blocks_per_s * block_bytes,
    )


def _meet(layout: LaneLayout, per_lane: int) -> float:
    """Probability that two samples of a block come in one batch, which takes `per_lane` positions of a lane in a row."""
    size = layout.block_samples
    if size < 2:
        return 0.0
    parts = np.diff(np.arange(layout.window + 1) * size // layout.window).astype(float)
    places = np.arange(size)
    found = 0.0
    for ticks in range(min(layout.window, per_lane // size + 2)):
        pairs = (
            (parts * (parts - 1)).sum() if ticks == 0 else 2 * (parts[ticks:] * parts[: layout.window - ticks]).sum()
        )
        apart = np.abs(places[None, :] + ticks * size - places[:, None])
        together = np.maximum(0.0, 1 - apart / per_lane)  # the batches' borders lie anywhere
        if ticks == 0:  # two samples of a tick have different places
            together = together[apart > 0]
        found += pairs / (size * (size - 1)) * float(together.mean())
    return found


def class_variance_between_blocks(labels: np.ndarray, block_samples: int) -> float:
    """Share of the variance of classes that lies between blocks of neighbours, 0 to 1: the intra-class correlation of the labels.

    Args:
        labels: (num_samples,) in the order of the shards.
    """
    num = len(labels) // block_samples * block_samples
    if block_samples < 2 or not num:
        return 0.0
    share = np.bincount(labels[:num]) / num
    expected = block_samples * float((share * (1 - share)).sum())
    if expected == 0:
        return 0.0
    # Sum over blocks of squared counts, without a table of blocks x classes.
    block = np.repeat(np.arange(num // block_samples), block_samples)
    _, counts = np.unique(block * len(share) + labels[:num], return_counts=True)
    squares = float((counts.astype(np.float64) ** 2).sum())
    found = squares * block_samples / num - block_samples**2 * float((share**2).sum())
    return float(np.clip((found / expected - 1) / (block_samples - 1), 0.0, 1.0))


def describe_plan(layout: LaneLayout, plan: DataPlan, *, between_blocks: float | None) -> list[str]:
    """Lines for people; `between_blocks` None where no dataset was looked at."""
    known = ", if shards were shuffled when written"
    if between_blocks is not None:
        known = f"; {between_blocks:.0%} of the variance of classes lies between blocks"
    return [
        f"lanes      {layout.lanes} of {layout.blocks_per_lane:,} blocks of {layout.block_samples} images; a host has "
        f"{plan.lanes_per_host} at most",
        f"window     {layout.window} blocks of a lane; {plan.window_bytes / 1e9:.2g} GB on a host",
        f"mixing     class counts of a batch vary at most {plan.excess_variance:.2f} times as in a random draw{known}",
        f"neighbours of a shard meet in a batch {plan.neighbours:,.1f} times as often as by chance",
        f"bytes      {plan.amplification:.3f} times the dataset are fetched in an epoch, by all hosts together",
        f"requests   {plan.requests:,} in an epoch, of {plan.request_bytes / 1e6:.1f} MB; a host: "
        f"{plan.requests_per_s:.1f} /s, {plan.bytes_per_s / 1e6:,.0f} MB/s",
    ]
