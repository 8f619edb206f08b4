"""Segmentation by a linear head on frozen maps: each position of the last feature map gets scores of classes, which are brought
to the size of the mask by bilinear interpolation.

As DINOv2's linear segmentation (`BNHead` of dinov2/eval/segmentation: a batch norm, a linear layer a position), on features that
are extracted once: channels are divided by their mean and standard deviation over the fitted images, which stands for the
batch norm, and there is no augmentation. AdamW, cross-entropy of the pixels that say something.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from pipeline.data.format.masks import VOID
from pipeline.errors import UserError
from transfer.protocol.method_settings import SegmentSettings

STD_FLOOR = 1e-5


@dataclass(frozen=True)
class SegmentHead:
    mean: np.ndarray
    """(D,) float32, and `std`: of the fitted images' positions."""
    std: np.ndarray
    weight: np.ndarray
    """(D, C) float32."""
    bias: np.ndarray

    def scores(self, maps: np.ndarray) -> np.ndarray:
        """(N, h, w, D) -> (N, h, w, C) float32, at the size of the maps."""
        return (maps.astype(np.float32) - self.mean) / self.std @ self.weight + self.bias


def fit_segment(
    maps: np.ndarray,
    masks: np.ndarray,
    num_classes: int,
    *,
    settings: SegmentSettings,
    rates: Sequence[float],
    seed: int,
    device: str = "cpu",
) -> list[SegmentHead]:
    """A head for each rate, in order.

    Args:
        maps: (N, h, w, D), any float type.
        masks: (N,) of (H, W) uint8.
        seed: decides the first weights and the order of images; equal for all rates.
    Raises:
        UserError: features are not finite.
    """
    if not np.isfinite(maps).all():
        raise UserError("the features are not finite; the checkpoint has diverged, take an earlier one")
    flat = maps.reshape(-1, maps.shape[-1]).astype(np.float64)
    mean, std = flat.mean(0).astype(np.float32), flat.std(0).astype(np.float32) + STD_FLOOR
    side = settings.train_mask_px
    aims = torch.stack([_resized(mask, side) for mask in masks]).to(device)
    x = torch.from_numpy((maps.astype(np.float32) - mean) / std).permute(0, 3, 1, 2).to(device)
    return [_fit(x, aims, num_classes, settings, rate, seed, mean, std) for rate in rates]


def _resized(mask: np.ndarray, side: int) -> torch.Tensor:
    """(side, side) int64, the nearest pixel of each place."""
    rows, columns = (((np.arange(side) + 0.5) * num / side).astype(int) for num in mask.shape)
    return torch.from_numpy(mask[rows[:, None], columns].astype(np.int64))


def _fit(
    x: torch.Tensor,
    aims: torch.Tensor,
    num_classes: int,
    settings: SegmentSettings,
    rate: float,
    seed: int,
    mean: np.ndarray,
    std: np.ndarray,
) -> SegmentHead:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(num_classes, x.shape[1], 1, 1, generator=generator).mul_(0.01).to(x.device).requires_grad_()
    bias = torch.zeros(num_classes, device=x.device, requires_grad=True)
    optimiser = torch.optim.AdamW([weight, bias], lr=rate, weight_decay=settings.weight_decay)
    falling = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / settings.num_steps)
    for chosen in drawn(len(x), settings.batch, settings.num_steps, generator):
        scores = F.interpolate(F.conv2d(x[chosen], weight, bias), size=aims.shape[1:], mode="bilinear")
        said = aims[chosen]
        total = F.cross_entropy(scores, said, ignore_index=VOID, reduction="sum")
        optimiser.zero_grad()
        (total / (said != VOID).sum().clamp(min=1)).backward()  # a batch of void alone has no slope
        optimiser.step()
        falling.step()
    found = weight.detach()[:, :, 0, 0].T.cpu().numpy().copy()
    return SegmentHead(mean, std, found, bias.detach().cpu().numpy().copy())


def drawn(num: int, batch: int, num_steps: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Images of every step, at most all: permutations, joined end to end."""
    batch = min(batch, num)
    order: list[int] = []
    for _ in range(num_steps):
        if len(order) < batch:
            order += torch.randperm(num, generator=generator).tolist()
        chosen, order = order[:batch], order[batch:]
        yield chosen


def confusion(scores: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """(N, C, C) int64: of each image, pixels by class (rows) and by the class with the largest score.

    Args:
        scores: (N, h, w, C), brought to the size of each mask.
        masks: (N,) of (H, W) uint8.
    """
    num = scores.shape[-1]
    found = np.zeros((len(masks), num, num), np.int64)
    for i, mask in enumerate(masks):
        at_maps = torch.from_numpy(np.ascontiguousarray(scores[i : i + 1])).permute(0, 3, 1, 2)
        predicted = F.interpolate(at_maps, size=mask.shape, mode="bilinear").argmax(1)[0].numpy()
        said = mask != VOID
        found[i] = np.bincount(mask[said].astype(np.int64) * num + predicted[said], minlength=num * num).reshape(
            num, num
        )
    return found


def pixel_counts(masks: np.ndarray, num_classes: int) -> np.ndarray:
    """(N, C) int64: pixels of each class in each mask."""
    return np.array([np.bincount(mask.ravel(), minlength=VOID + 1)[:num_classes] for mask in masks], np.int64)
