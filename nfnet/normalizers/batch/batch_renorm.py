"""Batch renormalisation: batch statistics, corrected towards the running ones.

Idea: Training normalises with other statistics than evaluation. A scale r and a shift d, constants for the gradient,
    bring the output to what the running averages would give; limits on them open slowly, so that training begins as
    batch normalisation.
Formula: y = weight * ((x - mean) / s * r + d) + bias; s = sqrt(var + eps), r = clip(s / running_std, 1 / r_max,
    r_max), d = clip((mean - running_mean) / running_std, -d_max, d_max), running values of before the step.
Training and evaluation: the average is kept of the standard deviation, not of the variance; evaluation uses the
    averages. r_max = 1, d_max = 0 for 1/32 of `total_steps`, then linear to 3 at 1/4 and to 5 at 5/32 of them (5,000,
    40,000 and 25,000 of 160,000). The steps are counted in a buffer, so that the limits go on where a run is resumed.
When: groups of 4 to 16 samples, or groups that are not drawn at random.
Source: Ioffe 2017 (arXiv 1702.03275); limits and momentum as quoted by implementations (google-research/corenet).
Uncertainty: the paper's tables were not seen; its limits are for 160,000 steps, and shorter runs scale them.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from nfnet.normalizers.batch.statistics import BatchStatisticsNorm, Moments, check_statistics
from nfnet.normalizers.method import Method, NormSite, act, method

R_MAX, D_MAX = 3.0, 5.0
CLOSED, R_OPEN, D_OPEN = 1 / 32, 1 / 4, 5 / 32
"""Shares of the steps."""


class BatchRenorm(BatchStatisticsNorm):
    running_std: torch.Tensor
    num_steps: torch.Tensor
    is_plain = False

    def __init__(self, channels: int, *, total_steps: int, stat_group: int, momentum: float, eps: float) -> None:
        super().__init__(channels, stat_group=stat_group, momentum=momentum, eps=eps)
        del self.running_var
        self.register_buffer("running_std", torch.ones(channels))
        self.register_buffer("num_steps", torch.zeros(1))
        self.total_steps = total_steps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            return self.train_forward(x)
        var = self.running_std.square()  # with `eps` in it already, and torch 2.11 takes no 0
        return F.batch_norm(
            x, self.running_mean, var, self.weight, self.bias, False, 0.0, torch.finfo(torch.float32).tiny
        )

    def limits(self) -> Moments:
        """(r_max, d_max) now."""
        done = self.num_steps / self.total_steps
        r_share = ((done - CLOSED) / (R_OPEN - CLOSED)).clamp(0, 1)
        d_share = ((done - CLOSED) / (D_OPEN - CLOSED)).clamp(0, 1)
        return 1 + (R_MAX - 1) * r_share, D_MAX * d_share

    def moments(self, groups: torch.Tensor) -> Moments:
        """Mean and variance that give the renormalised values."""
        var, mean = torch.var_mean(groups, dim=(1, 3), correction=0)
        std = (var + self.eps).sqrt()
        with torch.no_grad():
            r_max, d_max = self.limits()
            r = (std / self.running_std).clamp(1 / r_max, r_max)
            d = ((mean - self.running_mean) / self.running_std).clamp(-d_max, d_max)
            self.running_mean.lerp_(mean.mean(0).to(self.running_mean.dtype), self.momentum)
            self.running_std.lerp_(std.mean(0).to(self.running_std.dtype), self.momentum)
            self.num_steps += 1
        scaled = std / r  # (x - mean) / std * r + d = (x - (mean - d * std / r)) / (std / r)
        return mean - d * scaled, scaled.square() - self.eps


@method("batch_renorm")
@dataclass(frozen=True, kw_only=True)
class Renorm(Method):
    batch_free, eval_is_train, biases = False, False, False

    stat_group: int = 0
    """Samples that share statistics; 0 = the batch of a rank."""
    momentum: float = 0.01
    eps: float = 1e-5
    total_steps: int = 160_000
    """Of the training, which the limits of r and d open over."""

    def norm_act(self, site: NormSite) -> nn.Module:
        sizes = {"stat_group": self.stat_group, "momentum": self.momentum, "eps": self.eps}
        return nn.Sequential(BatchRenorm(site.channels, total_steps=self.total_steps, **sizes), act(site.activation))  # type: ignore[arg-type]

    def check_batch(self, batch: int) -> None:
        check_statistics(batch, self.stat_group)
