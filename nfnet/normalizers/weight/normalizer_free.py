"""Normaliser-free: scaled weight standardisation, and branches whose variance is kept account of.

Idea: Filters of zero mean keep channels from drifting; a gain for the activation keeps unit variance through every
    layer; a block divides its branch's input by the standard deviation that the sum is expected to have, and adds the
    branch times 0.2.
Formula: filter = gain * (w - mean) * rsqrt(max(var * fan_in, 1e-4)); x + alpha * skip_gain * branch(gamma *
    activation(x) / beta); variance grows by alpha^2 a block and begins again at each stage. Squeeze-excite times 2.
Training and evaluation: the same.
When: large batches and large rates with adaptive gradient clipping (`optim.clipping`), no dependence between samples,
    speed. Without clipping it diverges at rates that batch normalisation takes.
Source: Brock et al. 2021a (arXiv 2101.08692), 2021b (arXiv 2102.06171); code google-deepmind/deepmind-research.
Uncertainty: where papers and code differ, see the fields of `nfnet.block.Conventions`; here the code's way is taken.
"""

from dataclasses import dataclass

import torch
from torch import nn

from nfnet.layers import ScaledActivation, Standardisation, WSConv2d
from nfnet.normalizers.method import ConvSite, Method, NormSite, method


class ScaledBranch(nn.Module):
    def __init__(self, alpha: float, skip_init: float) -> None:
        super().__init__()
        self.alpha = alpha
        self.skip_gain = nn.Parameter(torch.full((1,), skip_init))  # one element: DeepSpeed cannot view zero dimensions

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (self.alpha * self.skip_gain).to(x.dtype)


@method("normalizer_free")
@dataclass(frozen=True, kw_only=True)
class NormalizerFree(Method):
    gate_factor = 2.0
    clipping = 0.02

    alpha: float = 0.2
    skip_init: float = 0.0
    """Of the gain at a branch's end."""

    def conv(self, site: ConvSite) -> nn.Module:
        form = Standardisation(padding=site.padding)
        sizes = site.in_channels, site.out_channels, site.kernel
        return WSConv2d(*sizes, stride=site.stride, groups=site.groups, form=form)

    def norm_act(self, site: NormSite) -> nn.Module:
        return ScaledActivation(site.activation, 1.0 / site.expected_std)

    def branch_end(self) -> nn.Module:
        return ScaledBranch(self.alpha, self.skip_init)

    @property
    def branch_variance(self) -> float:
        return self.alpha**2
