"""MixUp and CutMix within a micro-batch, by a rule that does not see ranks.

The positions of the global batch are paired, 2k with 2k + 1, and each image of a pair is mixed with the other. Pairs take
turns: MixUp, CutMix, MixUp ... where both are on, which makes exactly one half each.

A micro-batch is a run of neighbours of the global batch. As long as its length is a multiple of 4 (2 with one kind only), it
holds whole pairs and begins with MixUp, and a worker needs nothing but its own micro-batch to do what the rule says. Hence,
for a given global batch: the partner, the kind, the weight and every pixel are the same for any number of ranks, workers
and any such micro-batch. What they do depend on is the position in the global batch, therefore its size: another global
batch pairs other samples, as it trains on other samples at each step.

The weight and the rectangle are drawn for each image on its own, from (seed, view, sample), so nothing is shared by a batch
(timm draws one weight a batch unless told otherwise). The published code decodes two images for each mixed one and uses each
once; here, as is common, each image takes part twice.
"""

import math

import numpy as np

from pipeline.data.augment.counter_rng import Draws

_UNITS = 256
"""MixUp's weights are whole numbers of 1/256, so that the label's weight is the pixels' to the last bit."""


def mix(
    images: np.ndarray, draws: list[Draws], *, mixup_alpha: float, cutmix_alpha: float
) -> tuple[np.ndarray, np.ndarray]:
    """Mix a micro-batch in place.

    Args:
        images: (N, H, W, 3) uint8, N even.
        draws: of each image.
        mixup_alpha, cutmix_alpha: of Beta(alpha, alpha), 0 to 1; 0 leaves that kind out.

    Returns:
        partners: (N,) int64 places in the batch. weights: (N,) float32 share of the image itself, the rest is its
        partner's.
    """
    partners = np.arange(len(images)) ^ 1
    weights = np.ones(len(images), np.float32)
    for first in range(0, len(images), 2):
        pair, pair_draws = (images[first], images[first + 1]), (draws[first], draws[first + 1])
        if mixup_alpha > 0 and not (cutmix_alpha > 0 and first % 4):
            weights[first : first + 2] = _mixup(pair, pair_draws, mixup_alpha)
        else:
            weights[first : first + 2] = _cutmix(pair, pair_draws, cutmix_alpha)
    return partners, weights


_Pair = tuple[np.ndarray, np.ndarray]


def _mixup(pair: _Pair, draws: tuple[Draws, Draws], alpha: float) -> tuple[float, float]:
    """Each becomes w * itself + (1 - w) * the other, rounded."""
    units = [round(d.beta(alpha) * _UNITS) for d in draws]
    first, second = (np.ascontiguousarray(p).reshape(len(p), -1) for p in pair)
    both = []
    for mine, other, share in ((first, second, units[0]), (second, first, units[1])):
        if share in (0, _UNITS):  # with alpha 0.2 every third
            both.append(mine.copy() if share else other.copy())
            continue
        out = np.empty_like(mine)
        for top in range(0, len(mine), 96):  # bands that fit the cache
            band = slice(top, top + 96)
            total, rest = mine[band].astype(np.uint16), other[band].astype(np.uint16)
            total *= np.uint16(share)
            rest *= np.uint16(_UNITS - share)
            total += rest
            total += _UNITS // 2
            total >>= 8
            out[band] = total
        both.append(out)
    for target, mixed in zip(pair, both, strict=True):
        target[...] = mixed.reshape(target.shape)
    return units[0] / _UNITS, units[1] / _UNITS


def _cutmix(pair: _Pair, draws: tuple[Draws, Draws], alpha: float) -> tuple[float, float]:
    """In each, a rectangle is replaced by the other's; the weight is the area that is left, counted in pixels."""
    height, width = pair[0].shape[:2]
    boxes = [_rectangle(d, width, height, 1 - d.beta(alpha)) for d in draws]
    patches = [other[box].copy() for other, box in zip(pair[::-1], boxes, strict=True)]
    for target, box, patch in zip(pair, boxes, patches, strict=True):
        target[box] = patch
    first, second = (1 - patch.shape[0] * patch.shape[1] / (width * height) for patch in patches)
    return first, second


def _rectangle(draws: Draws, width: int, height: int, area: float) -> tuple[slice, slice]:
    """Of the image's shape and about this share of its area, its centre anywhere, cut off at the borders."""
    x, y, side = draws.below(width), draws.below(height), math.sqrt(area)
    half_w, half_h = int(side * width) // 2, int(side * height) // 2
    return slice(max(0, y - half_h), min(height, y + half_h)), slice(max(0, x - half_w), min(width, x + half_w))
