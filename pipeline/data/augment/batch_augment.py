"""What happens to a micro-batch once its crops are made: mixing and the policy, in the configured order."""

from collections.abc import Sequence

import numpy as np

from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.data.augment.image_ops import Canvas
from pipeline.data.augment.mixup_cutmix import mix
from pipeline.data.augment.randaugment import CLASSIC, NFNET, rand_augment, three_augment
from pipeline.data.augment.transforms import sample_rng

Key = tuple[int, int]
"""(view, sample): what seeds a sample's augmentation, see `sample_rng`."""


def finish_batch(
    images: np.ndarray, keys: Sequence[Key], config: AugmentConfig, *, seed: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """Mix and augment the crops of a micro-batch in place.

    Args:
        images: (N, H, W, 3) uint8 crops, in the order of the global batch.
        keys: of each image.

    Returns:
        None without mixing, else `partners` (N,) int64, places in the micro-batch, and `weights` (N,) float32: image i
        counts with weights[i] for its own label and with the rest for that of image partners[i].
    """
    if config.mix_order == "after_policy":
        _apply_policy(images, keys, config, seed)
    mixed = None
    if config.mixes:
        draws = [sample_rng(seed, view, sample, "mix") for view, sample in keys]
        mixed = mix(images, draws, mixup_alpha=config.mixup_alpha, cutmix_alpha=config.cutmix_alpha)
    if config.mix_order == "before_policy":
        _apply_policy(images, keys, config, seed)
    return mixed


def _apply_policy(images: np.ndarray, keys: Sequence[Key], config: AugmentConfig, seed: int) -> None:
    if config.policy == "none":
        return
    layers, magnitude = config.policy_layers, config.policy_magnitude
    operations = NFNET if config.policy == "nfnet" else CLASSIC
    for image, (view, sample) in zip(images, keys, strict=True):
        canvas, draws = Canvas(image), sample_rng(seed, view, sample, "policy")
        if config.policy == "three":
            three_augment(canvas, draws)
        else:
            rand_augment(canvas, operations, layers=layers, magnitude=magnitude, draws=draws)
        image[...] = canvas.pixels()
