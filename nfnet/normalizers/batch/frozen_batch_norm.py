"""Frozen batch normalisation: running averages as constants, weight and bias trained.

Idea: Where batches are too small for statistics, as in detection, the averages of an earlier training stay as they
    are, and what is left of the layer is a fixed scale and shift with trained ones behind.
Formula: y = weight * (x - running_mean) / sqrt(running_var + eps) + bias.
Training and evaluation: the same.
When: fine-tuning with batches of a few images. From scratch the averages are 0 and 1, and nothing is normalised: a
    control.
Source: practice of detection; He et al. 2017, Mask R-CNN (arXiv 1703.06870).
Uncertainty: some freeze weight and bias too; here they are trained.
"""

from dataclasses import dataclass

import torch
from torch import nn

from nfnet.normalizers.batch.statistics import BatchStatisticsNorm
from nfnet.normalizers.method import Method, NormSite, act, method


class FrozenBatchNorm(BatchStatisticsNorm):
    def train_forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )


@method("frozen_batch_norm")
@dataclass(frozen=True, kw_only=True)
class Frozen(Method):
    biases = False

    eps: float = 1e-5

    def norm_act(self, site: NormSite) -> nn.Module:
        return nn.Sequential(FrozenBatchNorm(site.channels, eps=self.eps), act(site.activation))
