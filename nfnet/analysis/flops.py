"""Parameters and multiply-adds, counted on the meta device: no memory, no arithmetic."""

from __future__ import annotations

import copy

import torch
from torch import nn

from nfnet.layers import WSConv2d


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def meta_twin(model: nn.Module) -> nn.Module:
    """A copy on the meta device, wherever the model is; no weights are allocated."""
    # A memo that already holds every tensor's meta twin.
    memo: dict[int, torch.Tensor] = {id(b): b.to("meta") for b in model.buffers()}
    memo |= {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo)


def multiply_adds(model: nn.Module, px: int, *, in_chans: int | None = None) -> int:
    """Multiply-adds of convolutions and linear layers for one image of px * px (the papers' "FLOPs").

    `in_chans` is needed only for a network whose first convolution does not read the image.
    """
    total = 0

    def count(module: nn.Module, _: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        nonlocal total
        if isinstance(module, WSConv2d | nn.Conv2d):
            total += out[0].numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear):
            total += module.weight.numel()

    if in_chans is None:
        convs = (m for m in model.modules() if isinstance(m, WSConv2d | nn.Conv2d))
        in_chans = next((c.weight.shape[1] * c.groups for c in convs), 3)
    twin = meta_twin(model).eval()
    hooks = [m.register_forward_hook(count) for m in twin.modules()]
    try:
        with torch.no_grad():
            twin(torch.empty(1, in_chans, px, px, device="meta"))
    finally:
        for hook in hooks:
            hook.remove()
    return total
