"""Layer normalisation: each sample by itself, all channels and positions together.

Idea: One mean and one variance a sample. Nothing of the batch is needed; differences between channels are kept, and
    grow with depth until channels are nearly constant, which is its failure in deep convolutional networks.
Formula: y = weight * (x - mean) / sqrt(var + eps) + bias, mean and var over (C, H, W), weight and bias by channel.
Training and evaluation: the same.
When: a control in convolutional networks; with proxy normalisation behind it a contender.
Source: Ba et al. 2016 (arXiv 1607.06450); the failure: Labatie et al. 2021 (arXiv 2106.03743).
Uncertainty: transformers and ConvNeXt take the channels of each position alone instead.
"""

from dataclasses import dataclass

from torch import nn

from nfnet.normalizers.method import Method, NormSite, act, method


@method("layer_norm")
@dataclass(frozen=True, kw_only=True)
class LayerNorm(Method):
    biases = False

    eps: float = 1e-5

    def norm_act(self, site: NormSite) -> nn.Module:
        return nn.Sequential(nn.GroupNorm(1, site.channels, eps=self.eps), act(site.activation))
