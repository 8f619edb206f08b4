"""Group normalisation: each sample by itself, channels in groups.

Idea: Mean and variance over some channels and all positions of one sample need no batch, and keep differences between
    the groups.
Formula: y = weight * (x - mean) / sqrt(var + eps) + bias, mean and var over channels / groups channels and all
    positions.
Training and evaluation: the same.
When: groups of samples below about 4, detection, whatever the batch does not allow.
Source: Wu, He 2018 (arXiv 1803.08494).
Uncertainty: 32 groups are the paper's; narrow networks here have fewer, so that a group has 4 channels at least.
"""

from dataclasses import dataclass

from nfnet.normalizers.method import method
from nfnet.normalizers.sample.grouping import InGroups


@method("group_norm")
@dataclass(frozen=True, kw_only=True)
class GroupNorm(InGroups):
    pass
