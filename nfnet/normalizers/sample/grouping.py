"""Groups of channels of one sample."""

from dataclasses import dataclass

from torch import nn

from nfnet.normalizers.method import Method, NormSite, act


def num_groups(channels: int, groups: int, *, usual: int = 32) -> int:
    """`groups`, or for 0 the largest divisor of `channels` that is at most `usual` and leaves 4 channels to a group.

    Raises:
        ValueError: `groups` does not divide the channels.
    """
    if groups:
        if channels % groups:
            raise ValueError(f"{groups} groups do not divide {channels} channels; set groups to a divisor, or to 0")
        return groups
    return max(n for n in range(1, min(usual, max(channels // 4, 1)) + 1) if channels % n == 0)


@dataclass(frozen=True, kw_only=True)
class InGroups(Method):
    """Group normalisation and activation, whatever the weights are."""

    biases = False

    groups: int = 0
    """0 = 32, or as many as leave 4 channels to each."""
    eps: float = 1e-5

    def norm_act(self, site: NormSite) -> nn.Module:
        return nn.Sequential(
            nn.GroupNorm(num_groups(site.channels, self.groups), site.channels, eps=self.eps), act(site.activation)
        )
