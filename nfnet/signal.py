"""Signal propagation: how activations' statistics travel through the blocks (Brock et al. 2021a, section 3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nfnet.block import Block
from nfnet.model import NFNet


@dataclass(frozen=True)
class SignalPropagation:
    """Index 0 is after the stem, i after block i; `residual_variance` has one entry a block."""

    squared_mean: list[float]
    """mean_c( mean_nhw(x)^2 )"""
    variance: list[float]
    """mean_c( var_nhw(x) )"""
    residual_variance: list[float]
    """mean_c( var_nhw(f) ) at the end of the branch, before stochastic depth, SkipInit gain and alpha."""


@torch.no_grad()
def signal_propagation(model: NFNet, images: torch.Tensor) -> SignalPropagation:
    """Statistics of one forward pass in evaluation mode.

    Args:
        images: (N, in_chans, H, W), unit-variance noise or real ones. Set the SkipInit gains to 1 to see the branches.
    """
    result = SignalPropagation([], [], [])
    branches: list[torch.Tensor] = []

    def observe(block: Block | None, x: torch.Tensor) -> None:
        result.squared_mean.append(x.mean(dim=(0, 2, 3)).square().mean().item())
        result.variance.append(_channel_variance(x))

    blocks = [b for b in model.modules() if isinstance(b, Block)]
    for block in blocks:
        block.watch = branches.append
    was_training = model.training
    model.eval()
    try:
        model.forward_features(images, observe)
    finally:
        model.train(was_training)
        for block in blocks:
            block.watch = None
    result.residual_variance.extend(_channel_variance(b) for b in branches)
    return result


def _channel_variance(x: torch.Tensor) -> float:
    return x.var(dim=(0, 2, 3), correction=0).mean().item()
