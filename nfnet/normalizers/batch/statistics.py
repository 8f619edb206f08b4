"""What the methods with batch statistics share: groups of samples, running averages, the affine map."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from nfnet.normalizers.method import wide

Moments = tuple[torch.Tensor, torch.Tensor]
"""Mean and biased variance, (groups of samples, C) each."""


def group_size(batch: int, stat_group: int) -> int:
    """Samples that share statistics; `stat_group` 0 = all. ValueError if the batch does not consist of such groups."""
    size = stat_group or batch
    if batch % size:
        raise ValueError(
            f"a batch of {batch} does not divide into groups of {size} samples; set stat_group to a divisor"
        )
    return size


def check_statistics(batch: int, stat_group: int) -> None:
    if group_size(batch, stat_group) < 2:
        raise ValueError(
            "statistics over one sample say nothing where maps are small; set batch and stat_group to 2 or more"
        )


class BatchStatisticsNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * weight + bias, by channel, over the samples of a group and all positions.

    In evaluation mode with running averages: mean, and the unbiased variance, as torch keeps them. Subclasses change what
    `moments` a group is normalised with. Input (N, C, H, W) or (N, C).
    """

    running_mean: torch.Tensor
    running_var: torch.Tensor
    is_plain = True
    """Without groups it is torch's own."""

    def __init__(
        self, channels: int, *, stat_group: int = 0, momentum: float = 0.1, eps: float = 1e-5, affine: bool = True
    ) -> None:
        super().__init__()
        self.stat_group, self.momentum, self.eps = stat_group, momentum, eps
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return self.train_forward(x)

    def train_forward(self, x: torch.Tensor) -> torch.Tensor:
        size = group_size(len(x), self.stat_group)
        if size * x[0, 0].numel() < 2:
            raise ValueError("one value a channel has no variance; use larger batches, stat_group or maps")
        if size == len(x) and self.is_plain:
            mean, var = self.running_mean, self.running_var
            return F.batch_norm(x, mean, var, self.weight, self.bias, True, self.momentum, self.eps)
        return self.normalised(x, size, self.moments)

    def normalised(self, x: torch.Tensor, size: int, moments: Callable[[torch.Tensor], Moments]) -> torch.Tensor:
        """With what `moments` makes of the groups (groups, size, C, positions)."""
        groups = wide(x).reshape(len(x) // size, size, x.shape[1], -1)
        mean, var = moments(groups)
        out = (groups - mean[:, None, :, None]) * torch.rsqrt(var + self.eps)[:, None, :, None]
        if self.weight is not None:
            out = out * self.weight[:, None] + self.bias[:, None]  # type: ignore[index]
        return out.reshape(x.shape).to(x.dtype)

    def moments(self, groups: torch.Tensor) -> Moments:
        var, mean = torch.var_mean(groups, dim=(1, 3), correction=0)
        self.track(mean, var, count=groups.shape[1] * groups.shape[3])
        return mean, var

    @torch.no_grad()
    def track(self, mean: torch.Tensor, var: torch.Tensor, *, count: int) -> None:
        """One step of the running averages, towards the mean over the groups."""
        unbiased = var.detach().mean(0) * (count / (count - 1))
        self.running_mean.lerp_(mean.detach().mean(0).to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
