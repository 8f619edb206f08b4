"""Group normalisation with weight standardisation, as in BiT.

Idea: Filters with zero mean and unit variance smooth the loss; group normalisation behind them does without a batch.
    Together they reach large-batch accuracy with one image a device.
Formula: filter = (w - mean(w)) / sqrt(var(w) + eps), over the fan-in, biased; then group normalisation.
Training and evaluation: the same.
When: batches of 1 to 8; fine-tuning of large networks.
Source: Qiao et al. 2019 (arXiv 1903.10520); Kolesnikov et al. 2020 (arXiv 1912.11370).
Uncertainty: the authors' first code adds 1e-5 to the standard deviation, with the unbiased variance; eps inside the
    root has a sound gradient for constant filters. Output variance is about the fan-in: a norm must follow. Depthwise
    filters suffer.
"""

from dataclasses import dataclass

import torch
from torch import nn

from nfnet.normalizers.method import Conv2d, ConvSite, method
from nfnet.normalizers.sample.grouping import InGroups


class StandardisedConv2d(Conv2d):
    EPS = 1e-5

    def filters(self) -> torch.Tensor:
        var, mean = torch.var_mean(self.weight, dim=(1, 2, 3), correction=0, keepdim=True)
        return (self.weight - mean) * torch.rsqrt(var + self.EPS)


@method("group_norm_ws")
@dataclass(frozen=True, kw_only=True)
class GroupNormWS(InGroups):
    def conv(self, site: ConvSite) -> nn.Module:
        return StandardisedConv2d(site, bias=False)
