"""BiT-HyperRule: how to fine-tune, from the number of images and their size alone (Kolesnikov et al. 2020, 3.3; facts 3.2).

Nothing is searched, so a task's result is its first. The paper and its code (google-research/big_transfer) differ:

    small tasks (< 20,000 images)   the rate falls at 30, 60, 90 % of the steps (paper), at 40, 60, 80 % (code)
    images of 96 x 96 and more      448 -> 384 px (paper; 512 -> 480 for its largest network only), 512 -> 480 (code)

The paper does not speak of a warm-up; both variants have the code's.
"""

from dataclasses import dataclass
from typing import Literal

Variant = Literal["paper", "code"]
SMALL, LARGE = 20_000, 500_000
"""Training images: a task below the first is small, one from the second on is large."""


@dataclass(frozen=True, kw_only=True)
class HyperRule:
    """A complete recipe: SGD without weight decay and dropout, a new head of zeros, pixels from -1 to 1.

    Its rates are those of `nfnet.optim.schedule.step_rate`.

    Training images are squeezed to `resize_px` squared and cropped at random to `crop_px`; without `random_crop` they
    are squeezed to `crop_px`, as test images always are. One MixUp ratio a batch.
    """

    steps: int
    warmup_steps: int
    decay_steps: tuple[int, ...]
    mixup_alpha: float
    """0: no MixUp."""
    resize_px: int
    crop_px: int
    flip: bool = True
    random_crop: bool = True
    learning_rate: float = 0.003
    momentum: float = 0.9
    weight_decay: float = 0.0


def hyperrule(
    num_examples: int, image_area_px: int, *, variant: Variant, flip: bool = True, random_crop: bool = True
) -> HyperRule:
    """The recipe for a task.

    Args:
        num_examples: training images; for VTAB-1k the 1,000 that are trained on.
        image_area_px: height x width of its raw images, the median where they differ.
        flip: False where mirroring changes the label. For VTAB's tasks `transfer.protocol.vtab.TASKS` knows it.
        random_crop: False where a crop changes the label (counts, positions, distances); see there.
    Raises:
        ValueError: numbers below 1, or another variant.
    """
    if num_examples < 1 or image_area_px < 1 or variant not in ("paper", "code"):
        raise ValueError(f"no recipe for {num_examples} images of {image_area_px} pixels by the {variant}")
    if num_examples < SMALL:
        steps, warmup, tenths = 500, 100, (3, 6, 9) if variant == "paper" else (4, 6, 8)
    elif num_examples < LARGE:
        steps, warmup, tenths = 10_000, 500, (3, 6, 9)
    else:
        steps, warmup, tenths = 20_000, 500, (3, 6, 9)
    resize_px, crop_px = (448, 384) if variant == "paper" else (512, 480)
    if image_area_px < 96 * 96:
        resize_px, crop_px = 160, 128
    return HyperRule(
        steps=steps,
        warmup_steps=warmup,
        decay_steps=tuple(steps * t // 10 for t in tenths),
        mixup_alpha=0.0 if num_examples < SMALL else 0.1,
        resize_px=resize_px,
        crop_px=crop_px,
        flip=flip,
        random_crop=random_crop,
    )
