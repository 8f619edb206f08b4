"""Parameters and multiply-adds, counted on the meta device: no memory, no arithmetic."""

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nfnet.layers import WSConv2d


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy on the meta device, wherever the model is; no weights are allocated."""
    # A memo that already holds every tensor's meta copy.
    memo: dict[int, torch.Tensor] = {id(b): b.to("meta") for b in model.buffers()}
    memo |= {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo)


def multiply_adds(model: nn.Module, px: int, *, in_chans: int | None = None) -> int:
    """Multiply-adds of convolutions, linear layers and attention for one image of px * px (the papers' "FLOPs").

    `in_chans` is needed only for a network whose first convolution does not read the image.
    """
    if in_chans is None:
        convs = (m for m in model.modules() if isinstance(m, WSConv2d | nn.Conv2d))
        in_chans = next((c.weight.shape[1] * c.groups for c in convs), 3)
    meta = meta_copy(model).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        meta(torch.empty(1, in_chans, px, px, device="meta"))
    return int(counter.get_total_flops()) // 2


def training_flops(model: nn.Module, px: int) -> tuple[float, str]:
    """Floating-point operations of a forward and a backward pass of one image, and why they cannot be counted ("" if they can).

    Six for each multiply-add: a backward pass has two products for each of the forward pass. What is computed again is not in it.
    """
    try:
        return 6.0 * multiply_adds(model, px), ""
    except (
        RuntimeError,
        NotImplementedError,
        TypeError,
        ValueError,
    ) as error:  # not every network runs on the meta device
        why = (str(error).splitlines() or [type(error).__name__])[0][:120]
        return 0.0, f"this network's arithmetic cannot be counted ({why}): its share of the device's rate is not shown"
