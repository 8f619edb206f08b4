"""From a picture to the network's input.

On the host: the crop (chosen from the header, before decoding), resizing, flip, mixing and the augmentation policy, to uint8.
On the device: `normalise`. Every random choice is drawn from (seed, view, sample), so a sample looks the same
whatever the rank or worker that prepares it.
"""

import math
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from PIL import Image

from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.data.augment.counter_rng import Draws
from pipeline.data.images.decode import Box, Picture, WholePicture

_RESIZE = {
    "bicubic": torch.ops.aten._upsample_bicubic2d_aa.out,
    "bilinear": torch.ops.aten._upsample_bilinear2d_aa.out,
}
"""What F.interpolate calls, which cannot write to a place that is there already: fresh memory costs as much as the work."""

Stream = Literal["crop", "mix", "policy"]
_STREAMS: dict[Stream, int] = {"crop": 0, "mix": 1, "policy": 2}


def sample_rng(seed: int, view: int, sample: int, stream: Stream = "crop") -> Draws:
    """A sample's own random numbers in one of its views: the epoch, or epoch * repeats + copy with repeated augmentation.

    Streams are apart so that one more draw in one moves nothing in another.
    """
    return Draws(seed, view, sample, _STREAMS[stream])


def _area_box(size: tuple[int, int], config: AugmentConfig, rng: Draws) -> Box:
    width, height = size
    log_aspect = math.log(config.aspect_max)
    for _ in range(10):
        area = width * height * rng.uniform(config.area_min, config.area_max)
        aspect = math.exp(rng.uniform(-log_aspect, log_aspect))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.below(width - w + 1), rng.below(height - h + 1)
            return left, top, left + w, top + h
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def resize_into(out: torch.Tensor, pixels: np.ndarray, *, interpolation: str = "bicubic") -> None:
    """With antialiasing (bicubic: a = -0.5), as Pillow's: (h, w, 3) uint8 into `out`, (H, W, 3) uint8.

    torch's own kernel for uint8 with channels last takes a fifth of Pillow's time. It rounds between its two passes like
    Pillow, with weights of other precision: the mean difference is below 0.1 of 255.
    """
    source, target = _planes(torch.from_numpy(pixels)), _planes(out)
    if source.shape == target.shape:
        target.copy_(source)
    else:
        _RESIZE[interpolation](source, out.shape[:2], False, None, out=target)


def _planes(image: torch.Tensor) -> torch.Tensor:
    """(H, W, 3) seen as (1, 3, H, W) with channels last, for which torch has quick ways."""
    return image.unsqueeze(0).permute(0, 3, 1, 2)


def mirror(image: torch.Tensor) -> None:
    """Left and right of (H, W, 3) exchanged in place; torch does it 15 times as fast as NumPy."""
    planes = _planes(image)
    planes.copy_(planes.flip(3))


def train_image(
    picture: Picture | np.ndarray, config: AugmentConfig, rng: Draws, out: torch.Tensor | None = None
) -> np.ndarray:
    """A picture, or its (H, W, 3) uint8 pixels, randomly cropped and flipped: (image_px, image_px, 3) uint8, in `out` if
    given."""
    if isinstance(picture, np.ndarray):
        picture = WholePicture(picture)
    px = config.image_px
    out = torch.empty((px, px, 3), dtype=torch.uint8) if out is None else out
    whole = (0, 0, *picture.size)
    if config.crop == "resized":
        side = config.resized_px
        larger = torch.empty((side, side, 3), dtype=torch.uint8)
        resize_into(larger, picture.crop(whole, (side, side)), interpolation=config.interpolation)
        top, left = rng.below(side - px + 1), rng.below(side - px + 1)
        out.copy_(larger[top : top + px, left : left + px])
    else:
        box = _area_box(picture.size, config, rng) if config.crop == "area" else whole
        resize_into(out, picture.crop(box, (px, px)), interpolation=config.interpolation)
    array = out.numpy()
    if config.crop == "pad" and config.pad_px:
        pad = config.pad_px
        top, left = rng.below(2 * pad + 1), rng.below(2 * pad + 1)
        padded = np.pad(array, ((pad, pad), (pad, pad), (0, 0)), mode="reflect" if pad < px else "edge")
        array[...] = padded[top : top + px, left : left + px]
    if config.flip and rng.coin():
        mirror(out)
    return array


def eval_image(picture: Picture | np.ndarray, config: AugmentConfig) -> np.ndarray:
    """(eval_px, eval_px, 3) uint8, the same every time: Pillow's resize of all pixels, as published numbers have it."""
    if isinstance(picture, np.ndarray):
        picture = WholePicture(picture)
    px = config.evaluation_px
    image = Image.fromarray(picture.crop((0, 0, *picture.size)))
    resample = Image.Resampling.BILINEAR if config.interpolation == "bilinear" else Image.Resampling.BICUBIC
    if config.eval_resize == "plain":
        return np.array(image.resize((px, px), resample))
    if config.eval_resize == "published":
        width = height = px + 32
    elif config.eval_resize == "square":
        width = height = math.floor(px / config.eval_crop)
    else:  # whole pixels as torchvision and timm count them, so that their numbers can be met
        shorter = math.floor(px / config.eval_crop)
        width, height = (shorter * side // min(image.size) for side in image.size)
    image = image.resize((width, height), resample)
    left, top = round((width - px) / 2), round((height - px) / 2)
    return np.array(image.crop((left, top, left + px, top + px)))


def normalise(images: torch.Tensor, config: AugmentConfig, device: torch.device) -> torch.Tensor:
    """(N, H, W, 3) uint8 -> (N, 3, H, W) float32 on the device, in channels-last memory, (x / 255 - mean) / std."""
    mean, std = _scale(config.mean, device), _scale(config.std, device)
    # The permuted view of NHWC memory is exactly what torch calls channels_last: no copy. Weights stay contiguous, since
    # DeepSpeed cannot hold channels-last ones.
    return images.to(device, non_blocking=True).float().sub_(mean).div_(std).permute(0, 3, 1, 2)


@lru_cache
def _scale(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Of a byte, on the device, once: each copy from the host would be a wait."""
    with torch.inference_mode(False):  # it may be asked for in an evaluation first, and serves training too
        return torch.tensor(values, device=device) * 255
