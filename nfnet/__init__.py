"""Floor 0: the mathematics of normaliser-free networks. torch only; no files, no processes, no logging."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from nfnet.agc import ClipCounts, adaptive_clip_grad_
from nfnet.count import count_parameters, multiply_adds
from nfnet.model import NFNet
from nfnet.signal import SignalPropagation, signal_propagation
from nfnet.variants import VARIANTS, get_variant

__all__ = [
    "ClipCounts",
    "NFNet",
    "SignalPropagation",
    "adaptive_clip_grad_",
    "create_model",
    "describe",
    "list_models",
    "signal_propagation",
]


def list_models() -> list[str]:
    return sorted(VARIANTS)


def create_model(name: str, num_classes: int = 1000, *, rounded_bottleneck: bool = False, **options: Any) -> NFNet:
    """A network by name, with fresh weights.

    Args:
        name: one of `list_models()`; `nfnet_f4+` is `nfnet_f4_plus`.
        rounded_bottleneck: inner widths rounded down to the group width, as the released code builds the plus variants;
            the default keeps the 192 channels that the paper's 527M parameters of F4+ need.
        options: `drop_rate`, `stochastic_depth`, `activation`, `in_chans`, `alpha`, `head_init` of `NFNet`.
    Raises:
        ValueError: unknown name (with the nearest ones) or option.
    """
    unknown = sorted(set(options) - set(OPTIONS))
    if unknown:
        raise ValueError(f"no option {unknown[0]!r}; the options are {', '.join(OPTIONS)}")
    variant = replace(get_variant(name), rounded_bottleneck=rounded_bottleneck)
    return NFNet(variant, num_classes, **options)


OPTIONS = ("in_chans", "activation", "drop_rate", "stochastic_depth", "alpha", "head_init", "rounded_bottleneck")


def describe(name: str, *, px: int | None = None) -> list[str]:
    """Lines for a person: stages, parameters, and multiply-adds at training and test size (and at `px`)."""
    variant = get_variant(name)
    with torch.device("meta"):
        model = create_model(name)
    lines = [
        f"{variant.name}: {count_parameters(model):,} parameters (1000 classes), {variant.num_features} features, "
        f"activation {variant.activation}"
    ]
    for i, (depth, width, stride) in enumerate(zip(variant.depths, variant.widths, variant.strides, strict=True), 1):
        inner, groups = variant.inner_width(width)
        lines.append(f"  stage {i}: {depth:2} blocks, width {width}, inner {inner} in {groups} groups, stride {stride}")
    for label, size in (("train", variant.train_px), ("test", variant.test_px), ("asked", px)):
        if size:
            lines.append(f"  {multiply_adds(model, size) / 1e9:9.3f} G multiply-adds at {size} px ({label})")
    return lines
