"""Batch Kalman normalisation: batch statistics, filtered with what the layer below lets one expect.

Idea: A convolution's input was normalised, so its output's statistics can be predicted from its weights. Statistics
    of a small group are noisy measurements; the filter mixes them with the prediction, as a Kalman filter does.
Formula: mean' = p * predicted + (1 - p) * measured, var' the mixture's: p * pv + (1 - p) * mv + p * (1 - p) * (pm -
    mm)^2; then as batch normalisation with mean', var'. Where mean(pv / mv) is 100 or more, p is 0. Sums add means
    and variances.
Training and evaluation: gradients flow through the prediction; evaluation uses running averages of mean', var' of the
    first group, momentum 0.1.
When: groups of 2 to 8. The source's p: 0.9 for groups of 2, 0.05 for one group of 128.
Source: Wang et al. 2018 (arXiv 1802.03133); code wanggrun/Kalman-Normalization.
Uncertainty: the paper's learned transition is not in its code and not here. `prediction="faithful"` draws noise with
    the mean and variance of before the normalisation, as the code does; the layer really sees activation(N(bias,
    weight^2)), which `sound` (the default) puts in closed form. Padding is not predicted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from nfnet.normalizers.batch.statistics import BatchStatisticsNorm, Moments, check_statistics
from nfnet.normalizers.gaussian import activation_moments
from nfnet.normalizers.method import Conv2d, ConvSite, Method, NormSite, act, method

LIMIT = 100.0
NOISE_PX = 8
"""Side of the drawn maps."""


class KalmanNorm(BatchStatisticsNorm):
    is_plain = False
    belief: Moments | None = None
    """mean', var' of the last forward pass in training, (groups, C)."""

    def __init__(
        self, channels: int, after: Sequence[nn.Module], activation: str, *, p: float, prediction: str, **settings: Any
    ) -> None:
        super().__init__(channels, **settings)
        self.p, self.prediction, self.function = p, prediction, act(activation)
        self.after = tuple(after)  # a tuple, so that they are no children of this module

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "belief": None}  # a part of a graph cannot be copied

    def moments(self, groups: torch.Tensor) -> Moments:
        var, mean = torch.var_mean(groups, dim=(1, 3), correction=0)
        found = self.predicted(groups)
        if found is not None:
            expected_mean, expected_var = found
            ratio = (expected_var.detach() / (var.detach() + self.eps)).mean(1, keepdim=True)
            p = torch.where(ratio < LIMIT, self.p, 0.0).to(mean.dtype)
            gap = (mean - expected_mean).square()
            mean, var = torch.lerp(mean, expected_mean, p), torch.lerp(var, expected_var, p) + p * (1 - p) * gap
        self.belief = mean, var
        self.track(mean[:1], var[:1], count=groups.shape[1] * groups.shape[3])
        return mean, var

    def predicted(self, groups: torch.Tensor) -> Moments | None:
        if self.p == 0:
            return None
        parts = [_prediction(source, self.prediction, groups) for source in self.after]
        if not parts or None in parts:
            return None
        return sum(m for m, _ in parts), sum(v for _, v in parts)  # type: ignore[misc, return-value]


def _prediction(source: nn.Module, prediction: str, groups: torch.Tensor) -> Moments | None:
    """Mean and variance, broadcast from (groups or 1, C), of what `source` gives. None: it cannot be known."""
    if isinstance(source, KalmanUnit):  # a shortcut: the sum's earlier value
        return source[0].belief  # type: ignore[return-value]
    below = source.reads if isinstance(source, KalmanConv) else None
    if below is None or below.belief is None:
        return None
    assert isinstance(source, KalmanConv)
    filters = source.filters().to(groups.dtype)
    if prediction == "faithful":
        mean, var = below.belief
        noise = torch.randn(len(mean), 4, mean.shape[1], NOISE_PX, NOISE_PX, device=mean.device, dtype=mean.dtype)
        drawn = below.function(noise * (var + below.eps).sqrt()[:, None, :, None, None] + mean[:, None, :, None, None])
        out = F.conv2d(drawn.flatten(0, 1), filters, groups=source.groups).to(mean.dtype)
        v, m = torch.var_mean(out.view(len(mean), 4, out.shape[1], -1), dim=(1, 3), correction=0)
        return m, v
    assert below.weight is not None and below.bias is not None
    m, v = activation_moments(below.function, below.bias, below.weight)
    return _through(m, filters, source.groups), _through(v, filters.square(), source.groups)


def _through(vector: torch.Tensor, filters: torch.Tensor, groups: int) -> torch.Tensor:
    """(C,) through the sums of the filters: (1, O). No convolution, which autocast would do in half precision."""
    outputs, inputs = filters.shape[:2]
    seen = vector.view(groups, inputs).repeat_interleave(outputs // groups, 0)
    return (filters.sum((2, 3)) * seen).sum(1)[None]


class KalmanUnit(nn.Sequential):
    """Normalisation and activation."""


class KalmanConv(Conv2d):
    reads: KalmanNorm | None = None

    def __init__(self, site: ConvSite) -> None:
        super().__init__(site, bias=False)
        below = site.reads[0] if isinstance(site.reads, KalmanUnit) else None
        object.__setattr__(self, "reads", below)  # not a child of this module


@method("batch_kalman_norm")
@dataclass(frozen=True, kw_only=True)
class BatchKalman(Method):
    batch_free, eval_is_train, biases = False, False, False

    stat_group: int = 0
    """Samples that share statistics; 0 = the batch of a rank."""
    p: float = 0.9
    """The prediction's share, 0 to 1."""
    prediction: str = "sound"
    """sound, or faithful to the published code."""
    momentum: float = 0.1
    eps: float = 1e-5

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1 or self.prediction not in ("sound", "faithful"):
            raise ValueError(
                f"p is {self.p}, prediction {self.prediction!r}; p lies in 0 to 1, prediction is sound or faithful"
            )

    def conv(self, site: ConvSite) -> nn.Module:
        return KalmanConv(site)

    def norm_act(self, site: NormSite) -> nn.Module:
        settings = {name: getattr(self, name) for name in ("stat_group", "p", "prediction", "momentum", "eps")}
        return KalmanUnit(KalmanNorm(site.channels, site.after, site.activation, **settings), act(site.activation))

    def check_batch(self, batch: int) -> None:
        check_statistics(batch, self.stat_group)
