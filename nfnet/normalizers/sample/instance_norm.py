"""Instance normalisation: each channel of each sample by itself.

Idea: Contrast and mean of every channel are taken out of every image. What is left of variability between samples is
    the pattern alone; where brightness or contrast tells the classes, the network cannot see it.
Formula: y = weight * (x - mean) / sqrt(var + eps) + bias, mean and var over the positions of one channel of one
    sample.
Training and evaluation: the same.
When: style transfer; in classification a control.
Source: Ulyanov et al. 2016 (arXiv 1607.08022); the failure: Labatie et al. 2021 (arXiv 2106.03743).
Uncertainty: none of formula. Maps of one position have no variance and are refused.
"""

from dataclasses import dataclass

import torch
from torch import nn

from nfnet.normalizers.method import Method, NormSite, act, method


class _InstanceNorm(nn.GroupNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[2] * x.shape[3] == 1:
            raise ValueError("instance normalisation of maps of one position gives zero; use larger images")
        return super().forward(x)


@method("instance_norm")
@dataclass(frozen=True, kw_only=True)
class InstanceNorm(Method):
    biases = False

    eps: float = 1e-5

    def norm_act(self, site: NormSite) -> nn.Module:
        return nn.Sequential(_InstanceNorm(site.channels, site.channels, eps=self.eps), act(site.activation))
