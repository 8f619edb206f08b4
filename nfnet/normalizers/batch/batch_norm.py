"""Batch normalisation: each channel to zero mean and unit variance over the batch.

Idea: A channel is brought to mean 0 and variance 1 over the samples of a group and all positions, then scaled and
    shifted. The noise of the statistics regularises; large rates become stable; residual branches are scaled down at
    the start.
Formula: y = weight * (x - mean) / sqrt(var + eps) + bias; mean and biased var over `stat_group` samples and all
    positions.
Training and evaluation: running averages (momentum of the new value 0.1, unbiased variance) replace the statistics.
When: the default wherever `stat_group` is 16 or more and batches are not sorted. `stat_group` cuts the optimiser's
    batch into groups, as devices do; running averages move once a step, towards the mean over the groups.
Source: Ioffe, Szegedy 2015 (arXiv 1502.03167).
Uncertainty: what a paper calls its batch size is mostly the group, seldom the optimiser's batch.
"""

from dataclasses import dataclass

from torch import nn

from nfnet.normalizers.batch.statistics import BatchStatisticsNorm, check_statistics
from nfnet.normalizers.method import Method, NormSite, act, method


@method("batch_norm")
@dataclass(frozen=True, kw_only=True)
class BatchNorm(Method):
    batch_free, eval_is_train, biases = False, False, False

    stat_group: int = 0
    """Samples that share statistics; 0 = the batch of a rank."""
    momentum: float = 0.1
    eps: float = 1e-5

    def norm_act(self, site: NormSite) -> nn.Module:
        norm = BatchStatisticsNorm(site.channels, stat_group=self.stat_group, momentum=self.momentum, eps=self.eps)
        return nn.Sequential(norm, act(site.activation))

    def check_batch(self, batch: int) -> None:
        check_statistics(batch, self.stat_group)
