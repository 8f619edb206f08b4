"""SkipInit: residual branches that begin closed.

Idea: Batch normalisation scales residual branches down at the start, by the root of the depth. One learned scalar a
    branch, 0 at the start, does that without statistics: the network begins as the identity.
Formula: x + scalar * branch(x), scalar 0; biased convolutions, no normaliser.
Training and evaluation: the same.
When: deep residual networks at small and middling batches, with regularisation of their own. Needs residual branches.
Source: De, Smith 2020 (arXiv 2002.10444).
Uncertainty: its tables were seen in reviews only. At the first step a branch's convolutions have no gradient.
"""

from dataclasses import dataclass

import torch
from torch import nn

from nfnet.normalizers.method import Method, method


class BranchGain(nn.Module):
    def __init__(self, start: float) -> None:
        super().__init__()
        self.skip_gain = nn.Parameter(torch.full((1,), start))  # one element: DeepSpeed cannot view zero dimensions

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.skip_gain.to(x.dtype)


@method("skip_init")
@dataclass(frozen=True, kw_only=True)
class SkipInit(Method):
    needs_branches = True

    start: float = 0.0
    """Of the scalar; 1 and 1 / sqrt(2) are the source's failing controls."""

    def branch_end(self) -> nn.Module:
        return BranchGain(self.start)
