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
