"""Fields of augmentation."""

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pipeline.configuration import check_fields
from pipeline.data.augment.randaugment import TRANSLATE_PX
from pipeline.errors import UserError
from pipeline.field_types import Items, Positive, Range, Share

MAX_PX = 8192
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    image_px: Annotated[int, Range(1, MAX_PX)] = 32
    """Side of the square training input."""
    eval_px: Annotated[int, Range(0, MAX_PX)] = 0
    """Side of the square evaluation input; 0 = image_px."""
    crop: Literal["area", "pad", "resized", "none"] = "area"
    """area: a random part by area and aspect (inception crop); pad: shift by up to pad_px; resized: a random square of
    image_px out of the whole image at the square of resized_px (BiT); none: the whole image."""
    resized_px: Annotated[int, Range(0, MAX_PX)] = 0
    """For the crop resized."""
    area_min: Share = 0.08
    """Smallest share of an image that the crop area keeps."""
    area_max: Share = 1.0
    """Largest share of an image that the crop area keeps."""
    aspect_max: Annotated[float, Range(1)] = 4 / 3
    """Aspect ratios are drawn log-uniformly from 1/aspect_max to aspect_max."""
    pad_px: Annotated[int, Range(0, MAX_PX)] = 4
    """For the crop pad."""
    flip: bool = True
    """Mirror half of the images; off where left and right mean something (digits, characters)."""
    policy: Literal["none", "nfnet", "classic", "three"] = "none"
    """nfnet: RandAugment with the 16 operations and strengths of the published NFNet code; classic: RandAugment as torchvision
    has it; three: 3-Augment (DeiT III)."""
    policy_layers: Annotated[int, Range(0, 100)] = 4
    """Operations an image, for nfnet and classic."""
    policy_magnitude: Annotated[float, Range(0, 30)] = 10.0
    """nfnet: 10 is the unit (5 for F0, 10 for F1 and F2, 15 from F3 on); classic: 0 to 30."""
    mixup_alpha: Share = 0.0
    """MixUp's Beta(alpha, alpha), 0 to 1; 0 = no MixUp. With CutMix on, each does one half of a batch."""
    cutmix_alpha: Share = 0.0
    """CutMix's, 0 to 1; 1 is uniform."""
    mix_order: Literal["before_policy", "after_policy"] = "before_policy"
    """before_policy: the policy works on mixed images, as in the NFNet paper; after_policy: the common order."""
    eval_resize: Literal["plain", "published", "aspect", "square"] = "plain"
    """plain: to the square (BiT); published: to the square of eval_px + 32, then its centre (NFNet, A.1); aspect: shorter
    side to eval_px / eval_crop, then the centre; square: to the square of eval_px / eval_crop, then the centre."""
    eval_crop: Annotated[float, Range(0.1, 1)] = 0.875
    """Share of a side that the centre keeps, for aspect and square."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """Of every resize; the papers of these networks say bicubic."""
    mean: Annotated[tuple[float, ...], Items(count=3)] = IMAGENET_MEAN
    """Of red, green and blue from 0 to 1, taken off every pixel."""
    std: Annotated[tuple[Positive, ...], Items(count=3)] = IMAGENET_STD
    """What a pixel is divided by, after the mean is taken off."""

    def __post_init__(self) -> None:
        check_fields(self, "augment")
        if self.area_min > self.area_max:
            raise UserError(
                f"augment.area_min is {self.area_min:g} and augment.area_max {self.area_max:g}; give the smaller share first"
            )
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
    def evaluation_resize_px(self) -> int:
        """Side to which evaluation resizes an image, for aspect its shorter one, before it takes the centre."""
        px = self.evaluation_px
        return {"plain": px, "published": px + 32}.get(self.eval_resize, math.floor(px / self.eval_crop))

    @property
    def mixes(self) -> bool:
        return self.mixup_alpha > 0 or self.cutmix_alpha > 0

    @property
    def micro_batch_multiple(self) -> int:
        """Micro-batches hold whole pairs of images that are mixed, of each kind (`pipeline.data.augment.mixup_cutmix`)."""
        return 2 * ((self.mixup_alpha > 0) + (self.cutmix_alpha > 0)) or 1

    def check_micro_batch(self, micro_batch: int) -> None:
        if micro_batch % self.micro_batch_multiple:
            raise UserError(
                f"micro_batch is {micro_batch}, and augment.mixup_alpha and augment.cutmix_alpha mix neighbours in groups of "
                f"{self.micro_batch_multiple}; set micro_batch to a multiple of {self.micro_batch_multiple} "
                f"(it is each process's share of global_batch where it is not set)"
            )

    def crop_and_flip(self, **changes: Any) -> "AugmentConfig":
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
