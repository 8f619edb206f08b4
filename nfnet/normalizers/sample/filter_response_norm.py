"""Filter response normalisation with a thresholded linear unit.

Idea: Each channel of each sample is divided by the root of its mean square; no mean is taken off. The bias that this
    leaves is mended by a learned threshold in place of ReLU's zero.
Formula: y = weight * x / sqrt(mean(x^2) + eps) + bias over the positions; output max(y, threshold), thresholds by
    channel, 0 at the start. The trunk's activation is replaced.
Training and evaluation: the same.
When: batches of a few samples with a long schedule. Needs a long warm-up of the rate (the source ramps up by a
    cosine).
Source: Singh, Krishnan 2020 (arXiv 1911.09737); eps 1e-6.
Uncertainty: reproductions on small sets are mixed. On maps of one position the output is nearly sign(x) unless eps is
    learned (`learned_eps`: 1e-6 + |e|, e 1e-4 at the start); without it they are refused. timm's has eps 1e-5.
"""

from dataclasses import dataclass

import torch
from torch import nn

from nfnet.normalizers.method import Method, NormSite, by_channel, method, wide


class FilterResponseNormTLU(nn.Module):
    def __init__(self, channels: int, *, eps: float = 1e-6, learned_eps: bool = False) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.threshold = nn.Parameter(torch.zeros(channels))
        self.learned_eps = nn.Parameter(torch.full((1,), 1e-4)) if learned_eps else None

    def normalised(self, x: torch.Tensor) -> torch.Tensor:
        """Before the affine map."""
        if x.shape[2] * x.shape[3] == 1 and self.learned_eps is None:
            raise ValueError("filter response normalisation of maps of one position needs learned_eps; set it to true")
        eps = self.eps if self.learned_eps is None else self.eps + self.learned_eps.abs()
        return x * torch.rsqrt(x.square().mean((2, 3), keepdim=True) + eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.normalised(wide(x)) * by_channel(self.weight) + by_channel(self.bias)
        return torch.maximum(out, by_channel(self.threshold).to(out.dtype)).to(x.dtype)


@method("filter_response_norm")
@dataclass(frozen=True, kw_only=True)
class FilterResponseNorm(Method):
    eps: float = 1e-6
    learned_eps: bool = False

    def norm_act(self, site: NormSite) -> nn.Module:
        return FilterResponseNormTLU(site.channels, eps=self.eps, learned_eps=self.learned_eps)
