"""One normaliser at the last layer only: batch normalisation of the pooled features.

Idea: Much of what batch normalisation does for stability comes from the layer before the classifier: with it alone,
    an otherwise unnormalised network takes larger rates.
Formula: plain biased convolutions and bare activations; the pooled features (N, C) go through batch normalisation.
Training and evaluation: as batch normalisation.
When: a control, to see how much of the effect a single layer has.
Source: Bjorck et al. 2018 (arXiv 1806.02375); Huang et al. 2020 (arXiv 2002.10801).
Uncertainty: the sources' tables were not seen.
"""

from dataclasses import dataclass

from torch import nn

from nfnet.normalizers.batch.statistics import BatchStatisticsNorm, check_statistics
from nfnet.normalizers.method import Method, method


@method("last_layer_norm")
@dataclass(frozen=True, kw_only=True)
class LastLayerNorm(Method):
    batch_free, eval_is_train = False, False

    stat_group: int = 0
    """Samples that share statistics; 0 = the batch of a rank."""
    momentum: float = 0.1
    eps: float = 1e-5

    def before_head(self, channels: int) -> nn.Module:
        return BatchStatisticsNorm(channels, stat_group=self.stat_group, momentum=self.momentum, eps=self.eps)

    def check_batch(self, batch: int) -> None:
        check_statistics(batch, self.stat_group)
