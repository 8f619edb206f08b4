"""Parameters and multiply-adds, counted on the meta device: no memory, no arithmetic."""

from __future__ import annotations

import copy

import torch
from torch import nn

from nfnet.layers import WSConv2d


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def multiply_adds(model: nn.Module, px: int, *, in_chans: int = 3) -> int:
    """Multiply-adds of convolutions and linear layers for one image of px * px (the papers' "FLOPs")."""
    total = 0

    def count(module: nn.Module, _: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        nonlocal total
        if isinstance(module, WSConv2d | nn.Conv2d):
            total += out[0].numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear):
            total += module.weight.numel()

    twin = copy.deepcopy(model).to("meta").eval()
    hooks = [m.register_forward_hook(count) for m in twin.modules()]
    try:
        with torch.no_grad():
            twin(torch.empty(1, in_chans, px, px, device="meta"))
    finally:
        for hook in hooks:
            hook.remove()
    return total
