"""Losses, computed in fp32 whatever the logits' precision."""

from typing import NamedTuple

import torch
from torch.nn import functional as F


class MixedLabels(NamedTuple):
    """Of images mixed from two: `first` and `second` (N,) int64 classes, `weight` (N,) the first's share."""

    first: torch.Tensor
    second: torch.Tensor
    weight: torch.Tensor

    @property
    def larger(self) -> torch.Tensor:
        """(N,) the class with the larger share."""
        return torch.where(self.weight >= 0.5, self.first, self.second)


class TaughtLabels(NamedTuple):
    """A teacher's word on images, for the loss, and their classes, by which hits are counted.

    `targets` (N, C) probabilities of classes; `larger` (N,) int64 classes, of a mixed image the one with the larger share.
    """

    targets: torch.Tensor
    larger: torch.Tensor


def label_smoothing_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor | MixedLabels, smoothing: float = 0.0, reduction: str = "mean"
) -> torch.Tensor:
    """Softmax cross-entropy with targets y * (1 - smoothing) + smoothing / num_classes (Brock et al. 2021, A.1).

    Args:
        logits: (N, C).
        labels: (N,) int64 classes, two classes a sample with their weight, or (N, C) target probabilities.
        reduction: "mean", "sum" or "none" (one loss a sample, (N,)).
    """
    if isinstance(labels, tuple):
        # Cross-entropy is linear in the target, so no (N, C) matrix of targets is needed.
        first, second, weight = labels
        losses = [
            F.cross_entropy(logits.float(), k, label_smoothing=smoothing, reduction="none") for k in (first, second)
        ]
        mixed = weight * losses[0] + (1 - weight) * losses[1]
        if reduction == "none":
            return mixed
        return mixed.sum() if reduction == "sum" else mixed.mean()
    if labels.is_floating_point():  # probabilities may come in the images' precision
        labels = labels.float()
    return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing, reduction=reduction)


def binary_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor | MixedLabels, smoothing: float = 0.0
) -> torch.Tensor:
    """Each class by itself, present or absent; the mean over samples and classes (Wightman et al. 2021, "ResNet strikes back").

    Args:
        logits: (N, C).
        labels: (N,) int64 classes, or two classes a sample with their weight; or (N, C) targets of several labels a sample,
            below 0 where nothing is said, which the mean leaves out.
        smoothing: targets are 1 - smoothing + smoothing / C and smoothing / C; given ones t (1 - smoothing) + smoothing / 2.
    """
    classes = logits.shape[1]
    if isinstance(labels, torch.Tensor) and labels.dim() == 2:
        return multi_label_losses(logits, labels, smoothing).sum() / (labels >= 0).sum().clamp(min=1)
    pairs = (
        [(labels, None)] if isinstance(labels, torch.Tensor) else [(labels[0], labels[2]), (labels[1], 1 - labels[2])]
    )
    targets = torch.full_like(logits, smoothing / classes, dtype=torch.float32)
    for index, weight in pairs:
        amount = torch.ones_like(index, dtype=torch.float32) if weight is None else weight.float()
        targets.scatter_add_(1, index[:, None], (1 - smoothing) * amount[:, None])
    return F.binary_cross_entropy_with_logits(logits.float(), targets)


def multi_label_losses(logits: torch.Tensor, targets: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """(N, C) fp32: binary cross-entropy of each label of each sample, 0 where `targets` (N, C) are below 0."""
    aims = targets.float().clamp(min=0) * (1 - smoothing) + smoothing / 2
    losses = F.binary_cross_entropy_with_logits(logits.float(), aims, reduction="none")
    return torch.where(targets < 0, torch.zeros_like(losses), losses)
