"""The linear probe of DINOv2 on cached features: a grid of learning rates, trained as one product (facts 4.3).

All heads see the same batches, so their logits are one matrix product of the batch with all weights side by side, and
their gradients another, which adds the momentum in place. SGD with momentum 0.9, no weight decay, cosine to zero, the
published grid times batch / 256; the best head is the caller's to choose, on held-out images.

Where this differs from dinov2/eval/linear.py: features are those of the evaluation transform (cached), so there is no
augmentation; all heads begin with the same draw of N(0, 0.01^2), so a head does not depend on what else is in the grid.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.errors import UserError

MOMENTUM = 0.9
INIT_STD = 0.01
GROUP_ELEMENTS = 1 << 28
"""Weights trained at once: 1 GiB, and as much momentum."""


@dataclass(frozen=True)
class LinearHead:
    """One head of the grid."""

    weight: np.ndarray
    """(D, C) float32; not finite where the rate was too large."""
    bias: np.ndarray
    """(C,) float32."""


def fit_linear(
    features: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    *,
    grid: Sequence[float],
    num_steps: int,
    batch: int,
    seed: int,
    device: str = "cpu",
) -> list[LinearHead]:
    """A head for each learning rate of `grid`, in its order.

    Args:
        features: (N, D), any float type.
        labels: (N,) integers below `num_classes`; or of several labels an image (N, C) of 1, 0 and -1 (not said): then binary
            cross-entropies, summed over labels.
        grid: learning rates at batch 256; times batch / 256 they are used. Any number of heads, equal ones too.
        batch: images of a step, at most N.
        seed: decides the first weights and the order of images; epochs are permutations, joined end to end.
    Raises:
        UserError: features are not finite, or a number is not positive.
    """
    if not grid or min(grid) <= 0 or num_steps < 1 or batch < 1:
        raise UserError(f"a linear probe needs positive rates, steps and batch; got {grid}, {num_steps}, {batch}")
    x = torch.as_tensor(np.asarray(features, np.float32)).to(device)
    if not torch.isfinite(x).all():
        raise UserError("the features are not finite; the checkpoint has diverged, take an earlier one")
    y = torch.as_tensor(np.asarray(labels, np.int64)).to(device)
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(x.shape[1], num_classes, generator=generator).mul_(INIT_STD).to(device)
    order = _order(len(x), num_steps, min(batch, len(x)), generator).to(device)
    x, first, basis = _in_span(x, first)
    num = max(1, GROUP_ELEMENTS // (x.shape[1] * num_classes))
    heads = []
    for begin in range(0, len(grid), num):
        rates = grid[begin : begin + num]
        trained = _train(x, y, first, rates, order)
        for head in range(len(rates)):
            weight, bias = trained[:-1, head], trained[-1, head]
            if basis is not None:
                weight = basis[0] + basis[1] @ weight
            heads.append(LinearHead(weight.cpu().numpy().copy(), bias.cpu().numpy().copy()))
    return heads


def scores_of(heads: Sequence[LinearHead], features: np.ndarray) -> np.ndarray:
    """Logits of several heads as one product: (N, D) -> (H, N, C) float32."""
    weights = np.concatenate([head.weight for head in heads], axis=1)
    logits = np.asarray(features, np.float32) @ weights + np.concatenate([head.bias for head in heads])
    return logits.reshape(len(features), len(heads), -1).transpose(1, 0, 2)


def _order(num: int, num_steps: int, batch: int, generator: torch.Generator) -> torch.Tensor:
    """Images of every step, (steps, batch): permutations of all, one after the other."""
    epochs = math.ceil(num_steps * batch / num)
    drawn = torch.cat([torch.randperm(num, generator=generator) for _ in range(epochs)])
    return drawn[: num_steps * batch].view(num_steps, batch)


def _in_span(
    x: torch.Tensor, first: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
    """Features, first weights, and how to get back: (rest, basis).

    Gradients are sums of features and there is no weight decay: what the first weights have outside of the features'
    span never changes. With fewer images than dimensions training goes on in coordinates of that span.
    """
    if len(x) >= x.shape[1]:
        return x, first, None
    q, r = torch.linalg.qr(x.T.double())
    inside = q.T @ first.double()
    rest = first - (q @ inside).float()
    return r.T.float().contiguous(), inside.float(), (rest, q.float())


def _train(
    x: torch.Tensor, y: torch.Tensor, first: torch.Tensor, rates: Sequence[float], order: torch.Tensor
) -> torch.Tensor:
    """Weights (D + 1, H, C), the bias in the last row."""
    num_classes, num_steps, batch = first.shape[1], *order.shape
    x = torch.cat([x, x.new_ones(len(x), 1)], 1)
    start = torch.cat([first, first.new_zeros(1, num_classes)])
    weights = start[:, None].repeat(1, len(rates), 1).view(len(start), -1)
    momentum = torch.zeros_like(weights)
    scale = torch.tensor(rates, dtype=torch.float32, device=x.device).mul_(batch / 256).repeat_interleave(num_classes)
    rows, several = torch.arange(batch, device=x.device), y.dim() == 2
    with torch.inference_mode():
        for step in range(num_steps):
            chosen = order[step]
            images = x[chosen]
            logits = (images @ weights).view(batch, len(rates), num_classes)
            if several:
                aims = y[chosen][:, None]
                slope = (torch.sigmoid(logits) - aims) * (aims >= 0)
            else:
                slope = torch.softmax(logits, 2)
                slope[rows, :, y[chosen]] -= 1  # the gradient of cross-entropy by the logits, times the batch
            momentum.addmm_(images.T, slope.view(batch, -1), beta=MOMENTUM, alpha=1 / batch)
            weights.addcmul_(momentum, scale, value=-0.5 * (1 + math.cos(math.pi * step / num_steps)))
    return weights.view(len(start), len(rates), num_classes)
