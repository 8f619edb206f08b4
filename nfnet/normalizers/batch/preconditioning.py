"""Batch-normalisation preconditioning: the gradients that a normalised network would have, and no layer in the forward pass.

Idea: To normalise a layer's input changes which way its gradients point. Here the forward pass is unnormalised;
    gradients of a weight and its bias are preconditioned so that an SGD step is that of the network with normalised
    inputs.
Formula: dw = (g_w - mean * g_b) / var, db = g_b - sum_j mean_j * dw_j; mean and var of each input channel over batch
    and positions. Exact for a plain SGD step of any rate: the function after it equals the normalised network's.
Training and evaluation: averages of mean and var (share of the old value 0.99, without the bias of their start) are
    all that is kept; evaluation is the plain network. Works with a batch of one.
When: online, or batches of a few samples, on networks that train without a normaliser but slowly.
Source: Lange, Helfrich, Ye 2022 (arXiv 2108.01110). Formula derived from its stated principle.
Uncertainty: average, floor of the variance (`floor` times the largest, and `eps`) and the paper's division by a
    constant could not be checked; the last is not done. Weight decay that is added to the gradient afterwards is not
    preconditioned; clipping and padding of edges break the equality. Grouped convolutions take the statistics of
    their own group.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nfnet.normalizers.method import Conv2d, ConvSite, Method, method, wide


class _Preconditioned(torch.autograd.Function):
    """(weight, bias) -> the same; their gradients back, preconditioned. mean, var: (groups, in / groups)."""

    @staticmethod
    def forward(
        ctx: Any, weight: torch.Tensor, bias: torch.Tensor, mean: torch.Tensor, var: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(mean, var)
        return weight.view_as(weight), bias.view_as(bias)

    @staticmethod
    def backward(ctx: Any, grad_weight: torch.Tensor, grad_bias: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        mean, var = ctx.saved_tensors
        out = len(grad_weight) // len(mean)  # output channels of a group
        mean, var = (v.repeat_interleave(out, 0)[:, :, None, None].to(grad_weight.dtype) for v in (mean, var))
        moved = (grad_weight - mean * grad_bias[:, None, None, None]) / var
        return moved, grad_bias - (mean * moved).sum((1, 2, 3)), None, None


class PreconditionedConv2d(Conv2d):
    input_mean: torch.Tensor
    input_square: torch.Tensor
    weight_of_average: torch.Tensor

    def __init__(self, site: ConvSite, settings: "Preconditioning") -> None:
        super().__init__(site, bias=True)
        self.settings = settings
        self.register_buffer("input_mean", torch.zeros(site.in_channels))
        self.register_buffer("input_square", torch.zeros(site.in_channels))
        self.register_buffer("weight_of_average", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        assert self.bias is not None
        mean, var = self.statistics(wide(x.detach()))
        weight, bias = _Preconditioned.apply(
            self.weight, self.bias, mean.view(self.groups, -1), var.view(self.groups, -1)
        )
        return self.convolve(x, weight, bias)

    @torch.no_grad()
    def statistics(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Averages up to now of mean and variance of each input channel (C,)."""
        new = 1 - self.settings.average
        for average, value in ((self.input_mean, x.mean((0, 2, 3))), (self.input_square, x.square().mean((0, 2, 3)))):
            average.lerp_(value.to(average.dtype), new)
        self.weight_of_average.lerp_(torch.ones_like(self.weight_of_average), new)
        mean = self.input_mean / self.weight_of_average
        var = self.input_square / self.weight_of_average - mean.square()
        return mean, var.clamp(min=0) + self.settings.floor * var.max() + self.settings.eps


@method("preconditioning")
@dataclass(frozen=True, kw_only=True)
class Preconditioning(Method):
    exact_gradients = False

    average: float = 0.99
    """Share of the old value that a step keeps; 0 = this batch's statistics alone."""
    floor: float = 1e-2
    """Added to the variance, as a share of the layer's largest."""
    eps: float = 1e-4
    """Added to the variance."""

    def conv(self, site: ConvSite) -> nn.Module:
        return PreconditionedConv2d(site, settings=self)
