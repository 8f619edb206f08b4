"""Weight normalisation: length and direction of each filter apart.

Idea: A filter is a direction and a length that are learned separately, which conditions the gradient much as
    normalised activations do, without statistics. A start from data gives each pre-activation mean 0 and variance 1
    once.
Formula: filter = gain * v / |v| over the fan-in, gain and bias by output channel. The start: layer after layer with
    gain 1, bias 0, then gain = 1 / sqrt(var + 1e-8), bias = -mean * gain of that layer's output.
Training and evaluation: the same.
When: a control; recurrent and generative networks.
Source: Salimans, Kingma 2016 (arXiv 1602.07868); code openai/weightnorm.
Uncertainty: networks are built before there is data, so the start uses 32 images of unit noise (normalised images
    have about unit variance); `data_dependent_start` does it with others. A residual sum still grows with depth: the
    start sees each layer alone.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nfnet.normalizers.method import Conv2d, ConvSite, Method, method

NUM_IMAGES = 32


class WeightNormConv2d(Conv2d):
    starting = False

    def __init__(self, site: ConvSite) -> None:
        super().__init__(site, bias=True)
        norm = self.weight.detach().flatten(1).norm(dim=1)
        self.gain = nn.Parameter(torch.empty_like(norm) if norm.is_meta else norm)

    def filters(self) -> torch.Tensor:
        length = self.weight.square().sum((1, 2, 3), keepdim=True).sqrt()
        return self.weight * (self.gain[:, None, None, None] / length)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.starting:
            self.start(x)
        return super().forward(x)

    @torch.no_grad()
    def start(self, x: torch.Tensor) -> None:
        assert self.bias is not None
        self.gain.fill_(1.0)
        self.bias.zero_()
        var, mean = torch.var_mean(super().forward(x), dim=(0, 2, 3), correction=0)
        self.gain.copy_(torch.rsqrt(var + 1e-8))
        self.bias.copy_(-mean * self.gain)


@torch.no_grad()
def data_dependent_start(network: nn.Module, images: torch.Tensor) -> None:
    """Gains and biases such that each layer's output on `images` (N, C, H, W) has mean 0 and variance 1."""
    layers = [m for m in network.modules() if isinstance(m, WeightNormConv2d)]
    training = network.training
    for layer in layers:
        layer.starting = True
    network.eval()(images)
    network.train(training)
    for layer in layers:
        layer.starting = False


@method("weight_norm")
@dataclass(frozen=True, kw_only=True)
class WeightNorm(Method):
    def conv(self, site: ConvSite) -> nn.Module:
        return WeightNormConv2d(site)

    def prepare(self, network: Any) -> None:
        first = next(network.parameters())
        if not first.is_meta:
            images = torch.randn(NUM_IMAGES, network.in_chans, network.px, network.px, dtype=first.dtype)
            data_dependent_start(network, images)
