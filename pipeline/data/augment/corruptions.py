"""Corruptions of test images as ImageNet-C defines them (Hendrycks and Dietterich 2019), made while images are read.

Constants and order of steps are those of hendrycks/robustness, ImageNet-C/create_c/make_imagenet_c.py at e0377d4, written here
with NumPy, SciPy and Pillow. They act on the square that evaluation sees, where the published set has 224 px, with the same
constants in pixels. What differs from the published files: these were saved as JPEG of quality 85 afterwards, by other random
numbers; resizing is the backbone's own. Not offered: motion_blur and snow (ImageMagick's motion blur), frost (photographs of
frost), spatter (OpenCV's edges and distances).

Each function: (H, W, 3) float64 from 0 to 1, a random generator and its constant -> the same, before clipping.
"""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from pipeline.errors import UserError

Draws = np.random.Generator
SEVERITIES = (1, 2, 3, 4, 5)


@dataclass(frozen=True)
class Corruption:
    change: Callable[[np.ndarray, Draws, Any], np.ndarray]
    constants: tuple[Any, ...]
    """Of severities 1 to 5."""
    alexnet: float
    """AlexNet's error on the published images, mean over severities: what the mean corruption error divides by (as in
    google-research/augmix, imagenet.py, which has them from the authors)."""


def corrupt(name: str, severity: int, image: np.ndarray, seed: int) -> np.ndarray:
    """(H, W, 3) uint8 -> (H, W, 3) uint8, a pure function of its arguments; `seed`: of the image, as its number. With name and
    severity bound a `pipeline.data.loading.batches.Change`."""
    found = CORRUPTIONS[name]
    rng = np.random.default_rng([seed, severity, list(CORRUPTIONS).index(name)])
    changed = found.change(image / 255.0, rng, found.constants[severity - 1])
    return (np.clip(changed, 0, 1) * 255).astype(np.uint8)


def names_of(asked: Sequence[str], where: str) -> tuple[str, ...]:
    """Names in their order; ("all",) = each that is offered. UserError for others. Args: where: who asks, for the message."""
    for name in asked:
        if name not in CORRUPTIONS and tuple(asked) != ("all",):
            why = ", which needs what is not here" if name in NOT_OFFERED else ""
            raise UserError(f"{where} has {name!r}{why}; choose all, or of {', '.join(CORRUPTIONS)}")
    return tuple(name for name in CORRUPTIONS if "all" in asked or name in asked)


def _gaussian_noise(x: np.ndarray, rng: Draws, scale: float) -> np.ndarray:
    return x + rng.normal(scale=scale, size=x.shape)


def _shot_noise(x: np.ndarray, rng: Draws, photons: float) -> np.ndarray:
    return rng.poisson(x * photons) / photons


def _impulse_noise(x: np.ndarray, rng: Draws, share: float) -> np.ndarray:
    return np.where(rng.random(x.shape) < share, rng.random(x.shape) < 0.5, x)


def _blurred(x: np.ndarray, sigma: float) -> np.ndarray:
    return ndimage.gaussian_filter(x, (sigma, sigma, 0), mode="nearest")


def _defocus_blur(x: np.ndarray, rng: Draws, radius_and_sigma: tuple[int, float]) -> np.ndarray:  # noqa: ARG001
    radius, sigma = radius_and_sigma
    reach, taps = (8, 1) if radius <= 8 else (radius, 2)
    y, x_ = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disk = (x_**2 + y**2 <= radius**2).astype(float)
    soft = np.exp(-(np.arange(-taps, taps + 1) ** 2) / (2 * sigma**2))
    soft /= soft.sum()
    kernel = ndimage.convolve(disk / disk.sum(), np.outer(soft, soft), mode="mirror")
    return np.stack([ndimage.correlate(x[..., c], kernel, mode="mirror") for c in range(3)], -1)


def _glass_blur(x: np.ndarray, rng: Draws, constant: tuple[float, int, int]) -> np.ndarray:
    """The published loop means to swap pixels, and as NumPy's rows are views it copies the other one instead."""
    sigma, reach, rounds = constant
    x = (_blurred(x, sigma) * 255).astype(np.uint8) / 255.0
    height, width = x.shape[:2]
    place = list(range(height * width))
    for _ in range(rounds):
        moves = rng.integers(-reach, reach, (height, width, 2)).tolist()
        for h in range(height - reach, reach, -1):
            for w in range(width - reach, reach, -1):
                dx, dy = moves[h - 1][w - 1]
                place[h * width + w] = place[(h + dy) * width + w + dx]
    return _blurred(x.reshape(-1, 3)[place].reshape(x.shape), sigma)


def _zoomed(x: np.ndarray, factor: float) -> np.ndarray:
    side = x.shape[0]
    kept = math.ceil(side / factor)
    first = (side - kept) // 2
    large = ndimage.zoom(x[first : first + kept, first : first + kept], (factor, factor, 1), order=1)
    trim = (large.shape[0] - side) // 2
    return large[trim : trim + side, trim : trim + side]


def _zoom_blur(x: np.ndarray, rng: Draws, end_and_step: tuple[float, float]) -> np.ndarray:  # noqa: ARG001
    factors = np.arange(1, *end_and_step)
    return (x + sum(_zoomed(x, factor) for factor in factors)) / (len(factors) + 1)


def _plasma(side: int, decay: float, rng: Draws) -> np.ndarray:
    """(side, side) from 0 to 1: midpoint displacement on a torus (diamonds and squares), amplitude over `decay` a level."""
    size = 1 << max(8, (side - 1).bit_length())
    field, step, amplitude = np.zeros((size, size)), size, 100.0

    def displaced(total: np.ndarray) -> np.ndarray:
        return total / 4 + amplitude * rng.uniform(-amplitude, amplitude, total.shape)

    while step >= 2:
        half = step // 2
        corners = field[::step, ::step]
        below = corners + np.roll(corners, -1, 0)
        field[half::step, half::step] = displaced(below + np.roll(below, -1, 1))
        centres = field[half::step, half::step]
        pair = centres + np.roll(centres, 1, 0)
        field[::step, half::step] = displaced(pair + corners + np.roll(corners, -1, 1))
        pair = centres + np.roll(centres, 1, 1)
        field[half::step, ::step] = displaced(pair + corners + np.roll(corners, -1, 0))
        step, amplitude = half, amplitude / decay
    field -= field.min()
    return (field / field.max())[:side, :side]


def _fog(x: np.ndarray, rng: Draws, strength_and_decay: tuple[float, float]) -> np.ndarray:
    strength, decay = strength_and_decay
    brightest = x.max()
    cloud = _plasma(max(x.shape[:2]), decay, rng)[: x.shape[0], : x.shape[1], None]
    return (x + strength * cloud) * brightest / (brightest + strength)


def _brightness(x: np.ndarray, rng: Draws, more: float) -> np.ndarray:  # noqa: ARG001
    """HSV's value plus a constant: at equal hue and saturation red, green and blue grow in proportion."""
    value = x.max(-1, keepdims=True)
    larger = np.clip(value + more, 0, 1)
    return np.where(value > 0, x * larger / np.where(value > 0, value, 1), larger)


def _contrast(x: np.ndarray, rng: Draws, share: float) -> np.ndarray:  # noqa: ARG001
    mean = x.mean((0, 1), keepdims=True)
    return (x - mean) * share + mean


def _elastic(x: np.ndarray, rng: Draws, constant: tuple[float, float, float]) -> np.ndarray:
    """A random affine map of three points, then a smooth random displacement; `constant` in px: its size, its smoothness, and
    how far the points move."""
    size, sigma, reach = constant
    height, width = x.shape[:2]
    centre, third = np.array([height // 2, width // 2], float), min(height, width) // 3
    points = np.array([centre + third, [centre[0] + third, centre[1] - third], centre - third])
    moved = points + rng.uniform(-reach, reach, points.shape)
    back = np.linalg.solve(np.c_[moved, np.ones(3)], points).T  # (x, y, 1) of the result -> (x, y) of the image
    ys, xs = np.mgrid[:height, :width].astype(float)
    from_x, from_y = (row[0] * xs + row[1] * ys + row[2] for row in back)
    x = _sampled(x, from_y, from_x, "mirror")
    dx, dy = (
        ndimage.gaussian_filter(rng.uniform(-1, 1, (height, width)), sigma, mode="reflect", truncate=3) * size
        for _ in range(2)
    )
    return _sampled(x, ys + dy, xs + dx, "reflect")


def _sampled(x: np.ndarray, ys: np.ndarray, xs: np.ndarray, mode: str) -> np.ndarray:
    return np.stack([ndimage.map_coordinates(x[..., c], (ys, xs), order=1, mode=mode) for c in range(3)], -1)


def _picture(x: np.ndarray) -> Image.Image:
    return Image.fromarray(np.round(x * 255).astype(np.uint8))


def _pixelate(x: np.ndarray, rng: Draws, share: float) -> np.ndarray:  # noqa: ARG001
    height, width = x.shape[:2]
    small = _picture(x).resize((int(width * share), int(height * share)), Image.Resampling.BOX)
    return np.asarray(small.resize((width, height), Image.Resampling.BOX)) / 255.0


def _jpeg(x: np.ndarray, rng: Draws, quality: int) -> np.ndarray:  # noqa: ARG001
    stream = io.BytesIO()
    _picture(x).save(stream, "JPEG", quality=quality)
    return np.asarray(Image.open(stream)) / 255.0


def _elastic_px(*shares: tuple[float, float, float]) -> tuple[tuple[float, float, float], ...]:
    return tuple((244 * a, 244 * b, 244 * c) for a, b, c in shares)  # 244, as published


CORRUPTIONS = {
    "gaussian_noise": Corruption(_gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38), 0.886428),
    "shot_noise": Corruption(_shot_noise, (60, 25, 12, 5, 3), 0.894468),
    "impulse_noise": Corruption(_impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27), 0.922640),
    "defocus_blur": Corruption(_defocus_blur, ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)), 0.819880),
    "glass_blur": Corruption(_glass_blur, ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)), 0.826268),
    "zoom_blur": Corruption(
        _zoom_blur, ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)), 0.798360
    ),
    "fog": Corruption(_fog, ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)), 0.819324),
    "brightness": Corruption(_brightness, (0.1, 0.2, 0.3, 0.4, 0.5), 0.564592),
    "contrast": Corruption(_contrast, (0.4, 0.3, 0.2, 0.1, 0.05), 0.853204),
    "elastic_transform": Corruption(
        _elastic,
        _elastic_px((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02)),
        0.646056,
    ),
    "pixelate": Corruption(_pixelate, (0.6, 0.5, 0.4, 0.3, 0.25), 0.717840),
    "jpeg_compression": Corruption(_jpeg, (25, 18, 15, 10, 7), 0.606500),
}
NOT_OFFERED = ("motion_blur", "snow", "frost")
"""Of the published 15."""
