"""Fixup: a start that keeps updates of deep residual networks bounded.

Idea: Branches begin at zero because their last convolution does; the others begin smaller, by a power of the depth,
    so that a step changes the function by as much as the rate says, whatever the depth. Scalars take over shifting
    and scaling.
Formula: of L branches with m convolutions, He's weights times L^(-1 / (2m - 2)), the last convolution and the
    classifier 0; a scalar bias before and after each activation, a scalar multiplier (1) and a bias at the end of a
    branch. Scalars learn at a tenth of the rate.
Training and evaluation: the same.
When: deep residual networks with strong augmentation (MixUp in the source). Needs residual branches.
Source: Zhang et al. 2019 (arXiv 1901.09321); code hongyi-zhang/Fixup.
Uncertainty: the source decays scalars too, this house's rules decay none. Only from the third step on has every
    tensor a gradient. A tenth of the rate: scalars are kept as sqrt(10) times their value, which for SGD is the same.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nfnet.normalizers.method import Method, NormSite, act, method

SLOW = 10**-0.5
"""A parameter u that stands for the number SLOW * u moves that number by SLOW^2 = 1/10 of the rate."""


class Scalar(nn.Module):
    def __init__(self, start: float = 0.0) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.full((1,), start / SLOW))

    def forward(self) -> torch.Tensor:
        return self.value * SLOW


class BiasedActivation(nn.Module):
    def __init__(self, activation: str) -> None:
        super().__init__()
        self.before, self.after, self.function = Scalar(), Scalar(), act(activation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x + self.before().to(x.dtype)) + self.after().to(x.dtype)


class BranchEnd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.multiplier, self.bias = Scalar(1.0), Scalar()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.multiplier().to(x.dtype) + self.bias().to(x.dtype)


@method("fixup")
@dataclass(frozen=True, kw_only=True)
class Fixup(Method):
    biases = False
    needs_branches = True

    def norm_act(self, site: NormSite) -> nn.Module:
        return BiasedActivation(site.activation)

    def branch_end(self) -> nn.Module:
        return BranchEnd()

    @torch.no_grad()
    def prepare(self, network: Any) -> None:
        if any(len(branch) < 2 for branch in network.branches):
            raise ValueError(
                "fixup shares its factor among a branch's convolutions but the last; these branches have one"
            )
        for branch in network.branches:
            for conv in branch[:-1]:
                conv.weight.mul_(len(network.branches) ** (-1 / (2 * len(branch) - 2)))
            branch[-1].weight.zero_()
        if isinstance(network.head, nn.Linear):
            network.head.weight.zero_()
