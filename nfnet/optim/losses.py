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
        labels: (N,) int64 classes, or two classes a sample with their weight.
        smoothing: targets are 1 - smoothing + smoothing / C and smoothing / C.
    """
    classes = logits.shape[1]
    pairs = (
        [(labels, None)] if isinstance(labels, torch.Tensor) else [(labels[0], labels[2]), (labels[1], 1 - labels[2])]
    )
    targets = torch.full_like(logits, smoothing / classes, dtype=torch.float32)
    for index, weight in pairs:
        amount = torch.ones_like(index, dtype=torch.float32) if weight is None else weight.float()
        targets.scatter_add_(1, index[:, None], (1 - smoothing) * amount[:, None])
    return F.binary_cross_entropy_with_logits(logits.float(), targets)
