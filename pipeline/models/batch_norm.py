"""What statistics batch normalisation normalises with in training: of the micro-batch, of all ranks' micro-batches, or of before.

    local           each rank's own micro-batch, as torch does by itself
    synchronised    the micro-batches of all ranks together, as if one device had computed them
    frozen          the running statistics, which stay what they are, as in fine-tuning with small batches

Gains and biases are trained in all three. torch's own SyncBatchNorm runs on GPUs only and knows no network that joins the
normalisation with an activation; this one takes the place of both kinds, under their names.
"""

from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.errors import UserError

Statistics = Literal["local", "synchronised", "frozen"]


def set_statistics(network: nn.Module, statistics: Statistics) -> nn.Module:
    """The network with its batch normalisations replaced, their parameters and buffers kept. UserError if it has none."""
    if statistics == "local":
        return network
    num_found = 0
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, _BatchNorm):
                setattr(module, name, SharedBatchNorm(child, is_frozen=statistics == "frozen"))
                num_found += 1
    if not num_found:
        raise UserError(
            f"model.batch_norm is {statistics}, and the network has no batch normalisation; leave it at local"
        )
    return network


class SharedBatchNorm(nn.Module):
    """In the place of a batch normalisation, with an activation or without (timm's `BatchNormAct2d`)."""

    def __init__(self, own: _BatchNorm, *, is_frozen: bool) -> None:
        super().__init__()
        self.eps, self.momentum, self.is_frozen = own.eps, own.momentum, is_frozen
        for name, parameter in own._parameters.items():
            self.register_parameter(name, parameter)
        for name, buffer in own._buffers.items():
            self.register_buffer(name, buffer)
        for name, child in own.named_children():  # what follows the normalisation, in order: dropout, activation
            self.add_module(name, child)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, ...) -> the same shape and type."""
        own = cast(Any, self)
        if self.is_frozen or not self.training:
            x = F.batch_norm(x, own.running_mean, own.running_var, own.weight, own.bias, False, 0.0, self.eps)
        else:
            x = self._over_ranks(x)
        for child in self.children():
            x = child(x)
        return x

    def _over_ranks(self, x: torch.Tensor) -> torch.Tensor:
        own, wide = cast(Any, self), x.float()
        mean, variance, count = _moments(wide)
        if own.running_mean is not None:
            with torch.no_grad():
                own.num_batches_tracked.add_(1)
                share = self.momentum if self.momentum is not None else 1.0 / float(own.num_batches_tracked)
                own.running_mean.lerp_(mean, share)
                own.running_var.lerp_(variance * (count / max(count - 1, 1)), share)
        scale = torch.rsqrt(variance + self.eps)
        scale = scale if own.weight is None else scale * own.weight
        shift = -mean * scale if own.bias is None else own.bias - mean * scale
        form = (1, -1, *[1] * (x.dim() - 2))
        return torch.addcmul(shift.view(form), wide, scale.view(form)).to(x.dtype)


def _moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(C,) mean and variance of (N, C, ...) over all ranks, with derivatives, and the number of values behind each."""
    dims = [0, *range(2, x.dim())]
    variance, mean = torch.var_mean(x, dims, correction=0)
    count, size = x.numel() // x.shape[1], dist.get_world_size() if dist.is_initialized() else 1
    if size == 1:
        return mean, variance, count
    # Ranks have equal micro-batches. Variances and means, not sums of squares: those of large values cancel.
    means, variances = _OfAllRanks.apply(torch.stack([mean, variance])).unbind(1)
    whole = means.mean(0)
    return whole, (variances + (means - whole).square()).mean(0), count * size


class _OfAllRanks(torch.autograd.Function):
    """(...) of this rank -> (ranks, ...) of all; the derivative adds up what all ranks made of this one's."""

    @staticmethod
    def forward(ctx: Any, mine: torch.Tensor) -> torch.Tensor:
        everyone = mine.new_zeros(dist.get_world_size(), *mine.shape)
        everyone[dist.get_rank()] = mine
        dist.all_reduce(everyone)
        return everyone

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        everyone = gradients[0].clone()
        dist.all_reduce(everyone)
        return everyone[dist.get_rank()]
