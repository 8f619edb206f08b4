"""Independent-Component layer: batch normalisation and dropout before each weight layer.

Idea: A weight layer learns faster from independent inputs. Batch normalisation whitens each unit by itself, dropout
    makes units more independent; both stand behind the activation and before the convolution.
Formula: dropout(batch_norm(activation(x))), element by element. With keep probability p the correlation of two
    zero-mean units is multiplied by p, and the mutual information of units by p^2.
Training and evaluation: as batch normalisation and dropout.
When: as batch normalisation, where a little dropout is wanted too. Dropout must follow the normalisation: the factor
    is p only for zero-mean units.
Source: Chen et al. 2019 (arXiv 1905.05928).
Uncertainty: the paper's drop rate was not seen; 0.05 is quoted, ports use 0.2. The dropped units' variance reaches
    the next layer's statistics in training and not in evaluation: read the gap between the two.
"""

from dataclasses import dataclass

from torch import nn

from nfnet.normalizers.batch.statistics import BatchStatisticsNorm, check_statistics
from nfnet.normalizers.method import Method, NormSite, act, method


@method("independent_component")
@dataclass(frozen=True, kw_only=True)
class IndependentComponent(Method):
    batch_free, eval_is_train, biases = False, False, False

    stat_group: int = 0
    """Samples that share statistics; 0 = the batch of a rank."""
    drop_rate: float = 0.05
    dropout_first: bool = False
    """The other order, as a control: dropout meets units whose mean is not zero, and the factor is not p."""
    momentum: float = 0.1
    eps: float = 1e-5

    def norm_act(self, site: NormSite) -> nn.Module:
        norm = BatchStatisticsNorm(site.channels, stat_group=self.stat_group, momentum=self.momentum, eps=self.eps)
        drop = nn.Dropout(self.drop_rate)
        return nn.Sequential(act(site.activation), *([drop, norm] if self.dropout_first else [norm, drop]))

    def check_batch(self, batch: int) -> None:
        check_statistics(batch, self.stat_group)
