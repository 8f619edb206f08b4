"""Accuracy and loss of a network on a split: every sample once, on any number of ranks."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from pipeline.data.augment import AugmentConfig, normalise
from pipeline.data.loader import EvalData
from pipeline.records import Evaluation
from pipeline.world import World


@dataclass(frozen=True)
class Scores:
    """What a network said of this rank's share of a split, in the order of the split."""

    step: int
    split: str
    samples: np.ndarray
    """(N,) int64, places in the split's index."""
    labels: np.ndarray
    """(N,) int64."""
    logits: np.ndarray
    """(N, C) float32."""


OnScores = Callable[[Scores], None]


@torch.no_grad()
def evaluate(
    network: nn.Module,
    data: EvalData,
    augment: AugmentConfig,
    *,
    world: World,
    batch_size: int,
    step: int,
    weights: str,
    bf16: bool = False,
    on_scores: OnScores | None = None,
) -> Evaluation:
    """Mean cross-entropy (no smoothing), top-1 and top-5 over the split, equal on every rank.

    `on_scores` is given what these are computed from, once, in host memory: for metrics of other kinds, and to look at
    mistakes.

    `top5` of a task with fewer than five classes counts all of them.
    """
    begin = time.perf_counter()
    sums = torch.zeros(4, dtype=torch.float64, device=world.device)  # loss, top-1, top-5, samples
    num_batches = 0
    kept: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for batch in data.batches(batch_size, rank=world.rank, num_ranks=world.size, pin=world.device.type == "cuda"):
        num_batches += 1
        labels = batch.labels.to(world.device)
        with torch.autocast(world.device.type, torch.bfloat16, enabled=bf16):
            logits = network(normalise(batch.images, augment, world.device))
        logits = logits.float()
        if on_scores is not None:
            kept.append((batch.samples.numpy(), batch.labels.numpy(), logits.cpu().numpy()))
        hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack([loss, hits[:, 0].sum(), hits.sum(), torch.full_like(loss, len(labels))]).double()
    _keep_pace(network, data, augment, world, missing=-(-_largest_share(data, world) // batch_size) - num_batches)
    if world.size > 1:
        dist.all_reduce(sums)
    loss_sum, top1, top5, count = sums.tolist()
    if count != data.num_samples:
        raise RuntimeError(f"evaluated {count:.0f} samples of {data.num_samples}; the split was not covered once")
    if on_scores is not None:
        on_scores(Scores(step, data.split, *(np.concatenate(column) for column in zip(*kept, strict=True))))
    return Evaluation(
        step=step,
        split=data.split,
        weights=weights,
        loss=loss_sum / count,
        top1=top1 / count,
        top5=top5 / count,
        num_samples=int(count),
        seconds_s=time.perf_counter() - begin,
    )


def _largest_share(data: EvalData, world: World) -> int:
    """Samples of the rank that has most of them."""
    return -(-data.num_samples // world.size)


def _keep_pace(network: nn.Module, data: EvalData, augment: AugmentConfig, world: World, *, missing: int) -> None:
    """Passes that count for nothing: where ranks gather weights from each other, all must make as many."""
    if missing:
        batch = next(iter(data.batches(1, rank=0, num_ranks=data.num_samples)))
        images = normalise(batch.images, augment, world.device)
        for _ in range(missing):
            network(images)
