"""Layers of normaliser-free networks, as the published code computes them (Brock et al. 2021; `nfnets/base.py`)."""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from nfnet.functional import outside_autocast, padded, pooled_mean, scaled_activation, standardised, ws_conv2d

GAMMA = {
    "identity": 1.0,
    "gelu": 1.7015043497085571,
    "gelu_erf": 1.7015043497085571,
    "relu": 1.7139588594436646,
    "silu": 1.7881293296813965,
    "leaky_relu": 1.70590341091156,
    "tanh": 1.5939117670059204,
    "elu": 1.2716004848480225,
    "celu": 1.270926833152771,
    "selu": 1.0008515119552612,
    "softplus": 1.9203323125839233,
    "sigmoid": 4.803835391998291,
    "relu6": 1.7131484746932983,
}
"""1 / std of the activation of a standard normal: the published Monte-Carlo constants."""

FUNCTIONS = {
    "identity": nn.Identity(),
    "gelu": nn.GELU(approximate="tanh"),  # jax's default, and so the published networks'
    "gelu_erf": nn.GELU(),
    "relu": nn.ReLU(),
    "silu": nn.SiLU(),
    "leaky_relu": nn.LeakyReLU(0.01),
    "tanh": nn.Tanh(),
    "elu": nn.ELU(),
    "celu": nn.CELU(),
    "selu": nn.SELU(),
    "softplus": nn.Softplus(),
    "sigmoid": nn.Sigmoid(),
    "relu6": nn.ReLU6(),
}


class ScaledActivation(nn.Module):
    """gamma * activation(x) * scale, with gamma such that unit-variance input gives unit-variance output.

    `scale` is the block's beta, folded in: one multiplication for both constants. `scale_first`: gamma *
    activation(x * scale), as the paper's figures have it.
    """

    def __init__(self, name: str, scale: float = 1.0, *, scale_first: bool = False) -> None:
        super().__init__()
        if name not in GAMMA:
            raise ValueError(f"no activation {name!r}; choose one of {', '.join(sorted(GAMMA))}")
        self.name, self.function = name, FUNCTIONS[name]
        self.before: float | torch.Tensor = scale if scale_first else 1.0
        self.factor: float | torch.Tensor = GAMMA[name] * (1.0 if scale_first else scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return scaled_activation(x, self.name, self.function, self.factor, self.before)

    def extra_repr(self) -> str:
        return f"{self.name}, factor={float(self.factor):.6g}"


class Standardisation(NamedTuple):
    """How a convolution standardises its weight and pads its input; the defaults are the published code's."""

    added_eps: float | None = None
    """None: var * fan_in floored at 1e-4; a number: added to var, as timm does."""
    padding: str = "same"


class WSConv2d(nn.Module):
    """Convolution with scaled weight standardisation.

    weight: (out, in / groups, k, k), raw; standardised for each output unit over its fan-in N as
    gain * (W - mean) * rsqrt(max(var * N, 1e-4)), biased variance (2021b, section 2; the floor is the code's).
    gain, bias: (out,), initially 1 and 0.
    """

    FLOOR = 1e-4

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        stride: int = 1,
        groups: int = 1,
        form: Standardisation = Standardisation(),  # noqa: B008 - immutable
    ) -> None:
        super().__init__()
        self.kernel, self.stride, self.groups, self.form = kernel, stride, groups, form
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, kernel, kernel))
        self.gain = nn.Parameter(torch.empty(out_channels))
        self.bias = nn.Parameter(torch.empty(out_channels))
        self.reset_parameters()

    @property
    def fan_in(self) -> int:
        return self.weight.numel() // self.weight.shape[0]

    def reset_parameters(self) -> None:
        if self.weight.is_meta:  # there is nothing to draw, and torch takes long to find that out
            return
        nn.init.normal_(self.weight, std=self.fan_in**-0.5)
        nn.init.ones_(self.gain)
        nn.init.zeros_(self.bias)

    def standardised_weight(self) -> torch.Tensor:
        """The filters that the image meets, in the weight's shape."""
        return standardised(self.weight, self.gain, self.FLOOR, self.form.added_eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, padding = padded(x, self.kernel, self.stride, self.form.padding)
        return ws_conv2d(
            x,
            self.weight,
            self.gain,
            self.bias,
            stride=self.stride,
            padding=padding,
            groups=self.groups,
            floor=self.FLOOR,
            added_eps=self.form.added_eps,
        )

    def extra_repr(self) -> str:
        out, inner, k, _ = self.weight.shape
        return f"{inner * self.groups}, {out}, kernel={k}, stride={self.stride}, groups={self.groups}"


class MaxPoolSame(nn.Module):
    """kernel x kernel maximum with "SAME" padding that never wins."""

    def __init__(self, kernel: int, stride: int, padding: str = "same") -> None:
        super().__init__()
        self.kernel, self.stride, self.padding = kernel, stride, padding

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, padding = padded(x, self.kernel, self.stride, self.padding, value=float("-inf"))
        return F.max_pool2d(x, self.kernel, self.stride, padding)


def avg_pool_same(x: torch.Tensor, stride: int) -> torch.Tensor:
    """stride x stride average pool, "SAME" padding, counting only pixels of the image at odd edges."""
    return F.avg_pool2d(x, stride, stride, ceil_mode=True, count_include_pad=False)


class SqueezeExcite(nn.Module):
    """Gates 2 * (0, 1), (N, C, H, W) -> (N, C, 1, 1), from the mean over positions.

    The factor 2 keeps the variance about where it was (2021b, appendix C). The hidden activation is a plain ReLU in the
    published code; any other is the scaled one.
    """

    def __init__(self, channels: int, hidden: int, activation: str = "relu") -> None:
        super().__init__()
        self.reduce = nn.Linear(channels, hidden)
        self.act = nn.ReLU() if activation == "relu" else ScaledActivation(activation)
        self.expand = nn.Linear(hidden, channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.expand.weight.is_meta:
            return
        for layer in (self.reduce, self.expand):
            std = layer.in_features**-0.5
            nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
            nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # For so few numbers the casts of the weights to bf16 take longer than the products.
        return outside_autocast(self._gates, pooled_mean(x))[:, :, None, None]

    def _gates(self, mean: torch.Tensor) -> torch.Tensor:
        return 2 * torch.sigmoid(self.expand(self.act(self.reduce(mean))))


class StochasticDepth(nn.Module):
    """Drops a whole branch for some samples; the published code does not divide by the keep rate, `rescale` does."""

    def __init__(self, rate: float, *, rescale: bool = False) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"stochastic depth rate is {rate}; set a number from 0 to below 1")
        self.rate, self.rescale = rate, rescale
        self.drops = rate > 0
        self.keep: float | torch.Tensor = 1 - rate

    def forward(self, coefficient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """What the branch x (N, C, H, W) is multiplied with -> the same, 0 for the samples that are dropped."""
        if not self.training or not self.drops:
            return coefficient
        mask = (torch.rand(x.shape[0], 1, 1, 1, device=x.device) < self.keep).to(x.dtype)
        return coefficient * (mask / self.keep if self.rescale else mask)
