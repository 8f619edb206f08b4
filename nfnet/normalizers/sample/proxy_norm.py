"""Proxy normalisation behind layer or group normalisation.

Idea: Layer and group normalisation let channels become constant with depth, which batch normalisation does not. A
    Gaussian proxy passes the same affine map and activation; its mean and variance, by channel, normalise what
    follows.
Formula: y = norm(x) without affine map, z = activation(weight * y + bias); proxy Y = N(shift, (1 + scale)^2); output
    (z - E) / sqrt(Var + 0.03), E and Var of activation(weight * Y + bias) over 200 quantiles of Y.
Training and evaluation: the same; gradients flow through E and Var. shift and scale are learned, 0 at the start.
When: in place of layer or group normalisation wherever these are used in convolutional networks.
Source: Labatie et al. 2021 (arXiv 2106.03743); code graphcore/examples.
Uncertainty: result tables were not seen. The source decays shift and scale alone (1e-5); this house's rules decay no
    vector. Behind a ReLU the output's variance is V / (V + 0.03) = 0.92, not 1.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from nfnet.normalizers.gaussian import activation_moments
from nfnet.normalizers.method import Method, NormSite, act, by_channel, method, wide
from nfnet.normalizers.sample.grouping import num_groups

PROXY_EPS = 0.03


class ProxyNorm(nn.Module):
    def __init__(self, channels: int, groups: int, activation: str, *, eps: float) -> None:
        super().__init__()
        self.groups, self.eps, self.function = groups, eps, act(activation)
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.shift = nn.Parameter(torch.zeros(channels))
        self.scale = nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.group_norm(wide(x), self.groups, None, None, self.eps)
        z = self.function(y * by_channel(self.weight) + by_channel(self.bias))
        mean, var = activation_moments(
            self.function, self.weight * self.shift + self.bias, self.weight * (1 + self.scale)
        )
        return ((z - by_channel(mean)) * by_channel(torch.rsqrt(var + PROXY_EPS))).to(x.dtype)


@method("layer_norm_proxy")
@dataclass(frozen=True, kw_only=True)
class LayerNormProxy(Method):
    biases = False

    eps: float = 1e-3

    def norm_act(self, site: NormSite) -> nn.Module:
        return ProxyNorm(site.channels, 1, site.activation, eps=self.eps)


@method("group_norm_proxy")
@dataclass(frozen=True, kw_only=True)
class GroupNormProxy(LayerNormProxy):
    groups: int = 0
    """0 = 32, or as many as leave 4 channels to each."""

    def norm_act(self, site: NormSite) -> nn.Module:
        return ProxyNorm(site.channels, num_groups(site.channels, self.groups), site.activation, eps=self.eps)
