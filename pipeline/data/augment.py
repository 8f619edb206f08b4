"""From a picture to the network's input.

On the host: the crop (chosen from the header, before decoding), resizing, flip, mixing and the augmentation policy, to uint8.
On the device: `normalise`. Every random choice is drawn from (seed, view, sample), so a sample looks the same
whatever the rank or worker that prepares it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from pipeline.data.decode import Box, Picture, WholePicture
from pipeline.data.draws import Draws
from pipeline.data.policies import TRANSLATE_PX
from pipeline.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_RESIZE = {
    "bicubic": torch.ops.aten._upsample_bicubic2d_aa.out,
    "bilinear": torch.ops.aten._upsample_bilinear2d_aa.out,
}
"""What F.interpolate calls, which cannot write to a place that is there already: fresh memory costs as much as the work."""

Stream = Literal["crop", "mix", "policy"]
_STREAMS: dict[Stream, int] = {"crop": 0, "mix": 1, "policy": 2}


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    image_px: int = 32
    """Side of the square training input."""
    eval_px: int = 0
    """Side of the square evaluation input; 0 = image_px."""
    crop: Literal["area", "pad", "resized", "none"] = "area"
    """area: a random part by area and aspect (inception crop); pad: shift by up to pad_px; resized: a random square of
    image_px out of the whole image at the square of resized_px (BiT); none: the whole image."""
    resized_px: int = 0
    area_min: float = 0.08
    area_max: float = 1.0
    aspect_max: float = 4 / 3
    """Aspect ratios are drawn log-uniformly from 1/aspect_max to aspect_max."""
    pad_px: int = 4
    flip: bool = True
    """Mirror half of the images; off where left and right mean something (digits, characters)."""
    policy: Literal["none", "nfnet", "classic", "three"] = "none"
    """nfnet: RandAugment with the 16 operations and strengths of the published NFNet code; classic: RandAugment as torchvision
    has it; three: 3-Augment (DeiT III)."""
    policy_layers: int = 4
    """Operations an image, for nfnet and classic."""
    policy_magnitude: float = 10.0
    """nfnet: 10 is the unit (5 for F0, 10 for F1 and F2, 15 from F3 on); classic: 0 to 30."""
    mixup_alpha: float = 0.0
    """MixUp's Beta(alpha, alpha), 0 to 1; 0 = no MixUp. With CutMix on, each does one half of a batch."""
    cutmix_alpha: float = 0.0
    """CutMix's, 0 to 1; 1 is uniform."""
    mix_order: Literal["before_policy", "after_policy"] = "before_policy"
    """before_policy: the policy works on mixed images, as in the NFNet paper; after_policy: the common order."""
    eval_resize: Literal["plain", "published", "aspect", "square"] = "plain"
    """plain: to the square (BiT); published: to the square of eval_px + 32, then its centre (NFNet, A.1); aspect: shorter
    side to eval_px / eval_crop, then the centre; square: to the square of eval_px / eval_crop, then the centre."""
    eval_crop: float = 0.875
    """Share of a side that the centre keeps, for aspect and square."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """Of every resize; the papers of these networks say bicubic."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        for name, low, high in (
            ("image_px", 1, math.inf),
            ("area_min", 0, self.area_max),
            ("area_max", self.area_min, 1),
            ("aspect_max", 1, math.inf),
            ("eval_crop", 0.1, 1),
            ("policy_layers", 0, 100),
            ("policy_magnitude", 0, 30),
            ("mixup_alpha", 0, 1),
            ("cutmix_alpha", 0, 1),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                bound = f"{low} or more" if high == math.inf else f"a number from {low} to {high}"
                raise UserError(f"augment.{name} is {value}; set {bound}")
        if (self.crop == "resized") != (self.resized_px > 0) or 0 < self.resized_px < self.image_px:
            raise UserError(
                f"augment.resized_px is {self.resized_px} with augment.crop {self.crop} and image_px {self.image_px}; set it to "
                "image_px or more for the crop resized, and to 0 for others"
            )
        moved = round(TRANSLATE_PX * self.policy_magnitude / 10)
        if self.policy == "nfnet" and moved >= self.image_px:
            raise UserError(
                f"augment.policy nfnet of magnitude {self.policy_magnitude:g} moves images by {moved} px, and augment.image_px "
                f"is {self.image_px}: nothing would be left to see; lower augment.policy_magnitude below "
                f"{self.image_px / TRANSLATE_PX * 10:g}, or take the policy classic, whose strengths are shares of the image"
            )

    @property
    def evaluation_px(self) -> int:
        return self.eval_px or self.image_px

    @property
    def mixes(self) -> bool:
        return self.mixup_alpha > 0 or self.cutmix_alpha > 0

    @property
    def micro_batch_multiple(self) -> int:
        """Micro-batches hold whole pairs of images that are mixed, of each kind (`pipeline.data.mix`)."""
        return 2 * ((self.mixup_alpha > 0) + (self.cutmix_alpha > 0)) or 1

    def check_micro_batch(self, micro_batch: int) -> None:
        if micro_batch % self.micro_batch_multiple:
            raise UserError(
                f"micro_batch is {micro_batch}, and augment.mixup_alpha and augment.cutmix_alpha mix neighbours in groups of "
                f"{self.micro_batch_multiple}; set micro_batch to a multiple of {self.micro_batch_multiple} "
                f"(it is each process's share of global_batch where it is not set)"
            )

    def crop_and_flip(self, **changes: Any) -> AugmentConfig:
        """The same input without policy and mixing: what transfer and large-scale pretraining use."""
        return replace(self, **{"policy": "none", "mixup_alpha": 0.0, "cutmix_alpha": 0.0, "resized_px": 0, **changes})


def nfnet_augment(magnitude: float, **sizes: Any) -> AugmentConfig:
    """The paper's ImageNet augmentation (Brock et al. 2021, A.3): MixUp (0.2) on one half, CutMix on the other, then
    RandAugment of 4 layers on the mixed images; magnitude 5 for F0, 10 for F1 and F2, 15 for F3 to F6."""
    return AugmentConfig(
        crop="area",
        policy="nfnet",
        policy_layers=4,
        policy_magnitude=float(magnitude),
        mixup_alpha=0.2,
        cutmix_alpha=1.0,
        mix_order="before_policy",
        eval_resize="published",
        **sizes,
    )


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


def resize_into(
    out: torch.Tensor, pixels: np.ndarray, *, mirrored: bool = False, interpolation: str = "bicubic"
) -> None:
    """With antialiasing (bicubic: a = -0.5), as Pillow's: (h, w, 3) uint8 into `out`, (H, W, 3) uint8.

    torch's own kernel for uint8 with channels last takes a fifth of Pillow's time. It rounds between its two passes like
    Pillow, with weights of other precision: the mean difference is below 0.1 of 255.
    """
    source, target = _planes(torch.from_numpy(pixels)), _planes(out)
    if source.shape == target.shape:
        target.copy_(source)
    else:
        _RESIZE[interpolation](source, out.shape[:2], False, None, out=target)
    if mirrored:
        _mirror(out)


def _planes(image: torch.Tensor) -> torch.Tensor:
    """(H, W, 3) seen as (1, 3, H, W) with channels last, for which torch has quick ways."""
    return image.unsqueeze(0).permute(0, 3, 1, 2)


def _mirror(image: torch.Tensor) -> None:
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
    if config.crop == "area":
        box = _area_box(picture.size, config, rng)
        mirrored = config.flip and rng.coin()
        resize_into(out, picture.crop(box, (px, px)), mirrored=mirrored, interpolation=config.interpolation)
        return out.numpy()
    if config.crop == "resized":
        side = config.resized_px
        whole = torch.empty((side, side, 3), dtype=torch.uint8)
        resize_into(whole, picture.crop((0, 0, *picture.size), (side, side)), interpolation=config.interpolation)
        top, left = rng.below(side - px + 1), rng.below(side - px + 1)
        out.copy_(whole[top : top + px, left : left + px])
        if config.flip and rng.coin():
            _mirror(out)
        return out.numpy()
    resize_into(out, picture.crop((0, 0, *picture.size), (px, px)), interpolation=config.interpolation)
    array = out.numpy()
    if config.crop == "pad" and config.pad_px:
        pad = config.pad_px
        top, left = rng.below(2 * pad + 1), rng.below(2 * pad + 1)
        padded = np.pad(array, ((pad, pad), (pad, pad), (0, 0)), mode="reflect" if pad < px else "edge")
        array[...] = padded[top : top + px, left : left + px]
    if config.flip and rng.coin():
        _mirror(out)
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
    mean = torch.tensor(config.mean, device=device) * 255
    std = torch.tensor(config.std, device=device) * 255
    # The permuted view of NHWC memory is exactly what torch calls channels_last: no copy.
    return images.to(device, non_blocking=True).float().sub_(mean).div_(std).permute(0, 3, 1, 2)
