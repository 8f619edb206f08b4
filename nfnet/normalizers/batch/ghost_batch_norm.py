"""Ghost batch normalisation: a large batch, normalised in small parts one after the other.

Idea: Large batches generalise worse, partly because their statistics are too exact. The batch is cut into ghost
    batches that are normalised by themselves; the running averages move once for each of them, as if they were steps.
Formula: that of batch normalisation over each ghost batch in turn; batch / `stat_group` updates of the averages a
    step.
Training and evaluation: as batch normalisation.
When: batches of 1,000 and more. The source scales the rate with the root of the batch and clips the global norm at 5.
Source: Hoffer et al. 2017 (arXiv 1705.08741); code eladhoffer/bigBatch.
Uncertainty: other libraries' ghost batches move the averages once a step; here `batch_norm` with `stat_group` does.
"""

from dataclasses import dataclass

import torch
from torch import nn

from nfnet.normalizers.batch.statistics import BatchStatisticsNorm, check_statistics
from nfnet.normalizers.method import Method, NormSite, act, method


class GhostBatchNorm(BatchStatisticsNorm):
    is_plain = False

    @torch.no_grad()
    def track(self, mean: torch.Tensor, var: torch.Tensor, *, count: int) -> None:
        for ghost in range(len(mean)):
            super().track(mean[ghost : ghost + 1], var[ghost : ghost + 1], count=count)


@method("ghost_batch_norm")
@dataclass(frozen=True, kw_only=True)
class GhostBatches(Method):
    batch_free, eval_is_train, biases = False, False, False

    stat_group: int = 128
    """Samples of a ghost batch."""
    momentum: float = 0.1
    eps: float = 1e-5

    def norm_act(self, site: NormSite) -> nn.Module:
        norm = GhostBatchNorm(site.channels, stat_group=self.stat_group, momentum=self.momentum, eps=self.eps)
        return nn.Sequential(norm, act(site.activation))

    def check_batch(self, batch: int) -> None:
        check_statistics(batch, self.stat_group)
