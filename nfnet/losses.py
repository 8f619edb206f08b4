"""Losses, computed in fp32 whatever the logits' precision."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def label_smoothing_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, smoothing: float = 0.0, reduction: str = "mean"
) -> torch.Tensor:
    """Softmax cross-entropy with targets y * (1 - smoothing) + smoothing / num_classes (Brock et al. 2021, A.1).

    Args:
        logits: (N, C).
        labels: (N,) int64 classes, or (N, C) target probabilities (mixed labels).
        reduction: "mean", "sum" or "none" (one loss a sample, (N,)).
    """
    if labels.is_floating_point():  # probabilities may come in the images' precision
        labels = labels.float()
    return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing, reduction=reduction)
