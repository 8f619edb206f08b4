"""Accuracy and loss of a network on a split: every sample once, on any number of ranks."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from nfnet.optim.losses import multi_label_losses
from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.data.augment.transforms import normalise
from pipeline.data.loading.batches import Batch
from pipeline.data.loading.datasets import EvalData
from pipeline.distributed import World
from pipeline.records import Evaluation
from pipeline.supervision.stop_signals import StopSignal
from pipeline.training.batch_fetcher import BatchFetcher, placeholder_batch


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
    stop: StopSignal | None = None,
    tick: Callable[[], None] = lambda: None,
    on_scores: OnScores | None = None,
) -> Evaluation | None:
    """Mean cross-entropy (no smoothing), top-1 and top-5 over the split, equal on every rank. Of several labels an image the
    cross-entropy is binary, a mean over labels, and a hit is any of them.

    `top5` of a task with fewer than five classes counts all of them. `tick` is called before each pass. `on_scores`
    is given what the numbers are computed from, once, in host memory: for metrics of other kinds, and to look at mistakes.

    Where ranks gather weights from each other all must make as many passes, so those with fewer samples make some that count
    for nothing, and a stop ends the evaluation on all ranks before the same pass: then the result is None, on every rank.
    """
    begin = time.perf_counter()
    sums = torch.zeros(5, dtype=torch.float64, device=world.device)  # loss, top-1, top-5, samples, placeholders
    mine: Iterator[Batch] = data.batches(
        batch_size, rank=world.rank, num_ranks=world.size, pin=world.device.type == "cuda"
    )
    placeholder = placeholder_batch(1, augment.evaluation_px)
    if stop is not None:
        mine = BatchFetcher(mine, stop=stop, placeholder=placeholder, device=world.device)
    agreement = _Agreement(stop, world)
    kept: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    table = None if data.label_table is None else data.label_table.to(world.device)
    largest_share = -(-data.num_samples // world.size)  # samples of the rank that has most of them
    for _ in range(-(-largest_share // batch_size)):
        batch = next(mine, None)
        tick()
        if agreement.is_stop():
            agreement.end()
            return None
        counts = batch is not None and batch is not placeholder
        sums[4] += batch is placeholder
        if batch is None:
            batch = next(iter(data.batches(1, rank=0, num_ranks=data.num_samples)))
        labels = batch.targets(world.device, table)
        assert isinstance(labels, torch.Tensor)  # nothing is mixed in an evaluation
        with torch.autocast(world.device.type, torch.bfloat16, enabled=bf16):
            logits = network(normalise(batch.images, augment, world.device))
        if counts and on_scores is not None:
            kept.append((batch.samples.numpy(), batch.labels.cpu().numpy(), logits.float().cpu().numpy()))
        if counts:
            sums[:4] += _numbers(logits.float(), labels)
    agreement.end()
    found = _mean(sums, data, world, step=step, weights=weights)
    if found is not None and on_scores is not None:
        if not kept:  # more ranks than images
            kept = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty((0, logits.shape[1]), np.float32))]
        on_scores(Scores(step, data.split, *(np.concatenate(column) for column in zip(*kept, strict=True))))
    return None if found is None else replace(found, seconds_s=time.perf_counter() - begin)


def _mean(sums: torch.Tensor, data: EvalData, world: World, *, step: int, weights: str) -> Evaluation | None:
    """Of the ranks' sums, equal on every rank; None where a placeholder batch is among them."""
    if world.size > 1:
        dist.all_reduce(sums)
    loss_sum, top1, top5, count, num_placeholders = sums.tolist()
    if num_placeholders:
        return None
    if count != data.num_samples:
        raise RuntimeError(f"evaluated {count:.0f} samples of {data.num_samples}; the split was not covered once")
    return Evaluation(
        step=step,
        split=data.split,
        weights=weights,
        loss=loss_sum / count,
        top1=top1 / count,
        top5=top5 / count,
        num_samples=int(count),
        seconds_s=0.0,
    )


def _numbers(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(4,): sums of the loss and of hits, and the number of images."""
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    if labels.dim() == 2:
        hits = torch.zeros_like(best, dtype=torch.bool)
        hits[:, 0] = labels.gather(1, best[:, :1])[:, 0] == 1
        hits[:, -1] |= (labels.gather(1, best) == 1).any(1) & ~hits[:, 0]  # the sum over a row is what top-5 counts
        loss = (multi_label_losses(logits, labels).sum(1) / (labels >= 0).sum(1).clamp(min=1)).sum()
    else:
        hits = best == labels[:, None]
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
    return torch.stack([loss, hits[:, 0].sum(), hits.sum(), torch.full_like(loss, len(labels))]).double()


class _Agreement:
    """Whether any rank was asked to stop, said by all before each pass and heard one pass later, so that nobody waits for it."""

    def __init__(self, stop: StopSignal | None, world: World) -> None:
        self._stop, self._world = stop, world
        self._said: tuple[torch.Tensor, dist.Work] | None = None

    def is_stop(self) -> bool:
        if self._stop is None:
            return False
        if self._world.size == 1:
            return self._stop.requested
        before = self._said
        flag = torch.tensor([float(self._stop.requested)], device=self._world.device)
        self._said = flag, dist.all_reduce(flag, async_op=True)
        return before is not None and self._heard(before)

    def end(self) -> None:
        """No pass follows; what was said last is not needed, but every rank must have heard it."""
        if self._said is not None:
            self._heard(self._said)

    def _heard(self, pending: tuple[torch.Tensor, dist.Work]) -> bool:
        flag, work = pending
        work.wait()
        return bool(flag.item())
