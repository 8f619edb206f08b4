"""Dynamic tanh and its erf sibling: a bounded function in place of a normaliser.

Idea: What layer normalisation does to activations looks like an S-shaped curve. A tanh (or erf) with a learned slope
    does that element by element and needs no statistics.
Formula: y = weight * tanh(alpha * x) + bias, or weight * erf(alpha * x + s) + bias; alpha (0.5 at the start) and s
    (0) one number a layer, weight and bias by channel; then the activation.
Training and evaluation: the same.
When: transformers. In place of batch normalisation in convolutional networks its author reports a loss.
Source: Zhu et al. 2025 (arXiv 2503.10622); the erf form: arXiv 2512.10938.
Uncertainty: numbers in place of batch normalisation (76.2 to 68.9 for a ResNet-50) were not seen in print. alpha may
    turn negative.
"""

from dataclasses import dataclass

import torch
from torch import nn

from nfnet.normalizers.method import Method, NormSite, act, by_channel, method


class DynamicTanhLayer(nn.Module):
    def __init__(self, channels: int, alpha: float, *, is_erf: bool) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((1,), alpha))
        self.offset = nn.Parameter(torch.zeros(1)) if is_erf else None
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * self.alpha.to(x.dtype)
        y = torch.tanh(y) if self.offset is None else torch.erf(y + self.offset.to(x.dtype))
        return y * by_channel(self.weight).to(x.dtype) + by_channel(self.bias).to(x.dtype)


@method("dynamic_tanh")
@dataclass(frozen=True, kw_only=True)
class DynamicTanh(Method):
    biases = False

    alpha: float = 0.5
    """Slope at the start."""

    def norm_act(self, site: NormSite) -> nn.Module:
        return nn.Sequential(DynamicTanhLayer(site.channels, self.alpha, is_erf=False), act(site.activation))


@method("dynamic_erf")
@dataclass(frozen=True, kw_only=True)
class DynamicErf(DynamicTanh):
    def norm_act(self, site: NormSite) -> nn.Module:
        return nn.Sequential(DynamicTanhLayer(site.channels, self.alpha, is_erf=True), act(site.activation))
