"""Nearest neighbours on frozen features, as DINOv2 evaluates them (facts 4.3; dinov2/eval/knn.py).

Features are divided by their length; the k training images nearest by cosine vote for their class with the weight
softmax(similarity / temperature). Nothing is fitted, so the k of the published grid is the only choice there is.

Of several labels an image they vote for each label by itself, as scikit-learn's neighbours of many outputs do: the share of the
votes that show it, among the neighbours that say something of it. That is ours; the published code has one class an image.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.errors import UserError

CHUNK_ELEMENTS = 1 << 25
"""Similarities held at once: 128 MiB."""


@dataclass(frozen=True)
class Knn:
    """The training images: unit features and labels, on one device."""

    features: torch.Tensor
    """(N, D) float32, each of length 1."""
    labels: torch.Tensor
    """(N,) int64; of several labels an image (N, C), as `transfer.protocol.truth` has them."""
    num_classes: int

    def scores_of(self, features: np.ndarray, ks: Sequence[int], *, temperature: float) -> dict[int, np.ndarray]:
        """For each k (M, D) -> (M, C) float64: each class's share of the votes; a row sums to 1. Of several labels each label's
        share, 0.5 where no neighbour says anything of it. The neighbours are looked up once.

        The published code divides by the weights of the largest k for all of them. That is a factor of the whole row
        and changes no answer; here each row sums to 1. Among training images of equal similarity at the k-th place
        torch.topk chooses.

        Raises:
            UserError: k is not between 1 and the number of training images, or features are not finite.
        """
        for k in ks:
            if not 1 <= k <= len(self.labels):
                raise UserError(
                    f"{k} nearest neighbours were asked for among {len(self.labels)} training images; "
                    f"choose k from 1 to {len(self.labels)}"
                )
        parts: dict[int, list[np.ndarray]] = {k: [] for k in ks}
        for similarities, labels in self._nearest(features, max(ks)):
            for k in ks:
                weights = torch.softmax(similarities[:, :k].double() / temperature, 1)
                parts[k].append(self._votes(weights, labels[:, :k]).cpu().numpy())
        return {k: np.concatenate(found) for k, found in parts.items()}

    def _votes(self, weights: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Weights (m, k) of neighbours with labels (m, k) or (m, k, C) -> (m, C)."""
        if labels.ndim == 2:
            votes = torch.zeros(len(weights), self.num_classes, dtype=torch.float64, device=weights.device)
            return votes.scatter_add_(1, labels, weights)
        shown, said = (torch.einsum("mk,mkc->mc", weights, of.double()) for of in (labels == 1, labels >= 0))
        return torch.where(said > 0, shown / said, 0.5)

    def _nearest(self, features: np.ndarray, k: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Chunk by chunk the similarities, falling, and the labels of the k nearest: (m, k), of several labels (m, k, C)."""
        num = max(1, CHUNK_ELEMENTS // max(len(self.labels), k * self.labels[0].numel()))
        queries = _unit(features, self.features.device)
        for first in range(0, max(len(queries), 1), num):
            similarities, places = (queries[first : first + num] @ self.features.T).topk(k, dim=1)
            yield similarities, self.labels[places]


def fit_knn(features: np.ndarray, labels: np.ndarray, num_classes: int, *, device: str = "cpu") -> Knn:
    """Keep the training images.

    Args:
        features: (N, D), any float type.
        labels: (N,) integers below `num_classes`, or (N, num_classes) of 1 (shown), 0 (not) and -1 (not said).
    Raises:
        UserError: features are not finite (the backbone is broken).
    """
    truth = torch.as_tensor(labels)
    return Knn(
        _unit(features, torch.device(device)), (truth.long() if truth.ndim == 1 else truth).to(device), num_classes
    )


def _unit(features: np.ndarray, device: torch.device) -> torch.Tensor:
    x = torch.as_tensor(np.asarray(features, np.float32)).to(device)
    if not torch.isfinite(x).all():
        raise UserError("the features are not finite; the checkpoint has diverged, take an earlier one")
    return torch.nn.functional.normalize(x, dim=1)  # a zero vector stays one: equally far from all
