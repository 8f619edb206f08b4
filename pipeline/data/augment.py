"""From a decoded image to the network's input.

On the host: crop, resize and flip, to uint8. On the device: `normalise`. Every random choice is drawn from (seed, epoch,
sample), so a sample looks the same whatever the rank or worker that prepares it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    image_px: int = 32
    """Side of the square training input."""
    eval_px: int = 0
    """Side of the square evaluation input; 0 = image_px."""
    crop: Literal["area", "pad", "none"] = "area"
    """area: a random part by area and aspect (inception crop); pad: shift by up to pad_px; none: the whole image."""
    area_min: float = 0.08
    area_max: float = 1.0
    aspect_max: float = 4 / 3
    """Aspect ratios are drawn log-uniformly from 1/aspect_max to aspect_max."""
    pad_px: int = 4
    flip: bool = True
    """Mirror half of the images; off where left and right mean something (digits, characters)."""
    eval_resize: Literal["plain", "published", "aspect"] = "plain"
    """plain: to the square (BiT); published: to the square of eval_px + 32, then its centre (NFNet, A.1); aspect: shorter
    side to eval_px / 0.875, then the centre."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    @property
    def evaluation_px(self) -> int:
        return self.eval_px or self.image_px


def sample_rng(seed: int, epoch: int, sample: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([seed, epoch, sample]))


def _area_box(size: tuple[int, int], config: AugmentConfig, rng: np.random.Generator) -> tuple[int, int, int, int]:
    width, height = size
    log_aspect = np.log(config.aspect_max)
    for _ in range(10):
        area = width * height * rng.uniform(config.area_min, config.area_max)
        aspect = np.exp(rng.uniform(-log_aspect, log_aspect))
        w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
            return left, top, left + w, top + h
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def train_image(pixels: np.ndarray, config: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    """(H, W, 3) uint8 -> (image_px, image_px, 3) uint8, randomly cropped and flipped."""
    px = config.image_px
    image = Image.fromarray(pixels)
    if config.crop == "area":
        image = image.resize((px, px), Image.Resampling.BICUBIC, box=_area_box(image.size, config, rng))
        out = np.asarray(image)
    else:
        out = np.asarray(image if image.size == (px, px) else image.resize((px, px), Image.Resampling.BICUBIC))
        if config.crop == "pad" and config.pad_px:
            pad = config.pad_px
            top, left = rng.integers(0, 2 * pad + 1, size=2)
            padded = np.pad(out, ((pad, pad), (pad, pad), (0, 0)), mode="reflect" if pad < px else "edge")
            out = padded[top : top + px, left : left + px]
    if config.flip and rng.random() < 0.5:
        out = out[:, ::-1]
    return np.ascontiguousarray(out)


def eval_image(pixels: np.ndarray, config: AugmentConfig) -> np.ndarray:
    """(H, W, 3) uint8 -> (eval_px, eval_px, 3) uint8, the same every time."""
    px = config.evaluation_px
    image = Image.fromarray(pixels)
    if config.eval_resize == "plain":
        return np.ascontiguousarray(np.asarray(image.resize((px, px), Image.Resampling.BICUBIC)))
    if config.eval_resize == "published":
        width = height = px + 32
    else:
        scale = px / 0.875 / min(image.size)
        width, height = (max(px, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - px) // 2, (height - px) // 2
    return np.ascontiguousarray(np.asarray(image.crop((left, top, left + px, top + px))))


def normalise(images: torch.Tensor, config: AugmentConfig, device: torch.device) -> torch.Tensor:
    """(N, H, W, 3) uint8 -> (N, 3, H, W) float32 on the device, in channels-last memory, (x / 255 - mean) / std."""
    mean = torch.tensor(config.mean, device=device) * 255
    std = torch.tensor(config.std, device=device) * 255
    # The permuted view of NHWC memory is exactly what torch calls channels_last: no copy.
    return images.to(device, non_blocking=True).float().sub_(mean).div_(std).permute(0, 3, 1, 2)
