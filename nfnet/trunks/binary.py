"""ReActNet-like trunks of binary convolutions with a method (Liu et al. 2020; Chen et al. 2021, arXiv 2104.08215).

A block is two steps, a 3x3 and a 1x1 convolution, each around a shortcut: bias, sign, convolution, norm (the method's, without
activation), plus shortcut, then bias, PReLU, bias. Where channels double, two 1x1 convolutions stand side by side. Where the
method keeps account of the variance (`Method.branch_variance`) a step's input is divided by the expected standard deviation,
which grows by step and begins again where maps shrink.

Activations are always binary. `binary_weights` makes the filters so too: the source trains first without, then with them, from
the first step's weights. The account holds for real filters: binary ones on signs have an output variance of 2 / pi, not 1,
while their latent weights are normal; `binary_gain` sqrt(pi / 2) mends that (ours, no source's).

The convolutions are the method's, with the biases that it gives them; the source's without normaliser have none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from nfnet.functional import padded, standardised
from nfnet.layers import WSConv2d
from nfnet.normalizers.method import Conv2d, ConvSite, Method, NormSite, by_channel
from nfnet.trunks.trunk import Trunk, TrunkOptions


@dataclass(frozen=True, kw_only=True)
class BinaryShape:
    stem_width: int = 32
    widths: tuple[int, ...]
    """Output channels of each block: those of its input, or twice as many."""
    strides: tuple[int, ...]
    train_px: int = 224
    activation: str = "identity"
    """Of the stem; a step's is its PReLU."""


class _Sign(torch.autograd.Function):
    """1 where x >= 0, else -1; backwards the derivative of a piecewise quadratic: 2 + 2x on [-1, 0), 2 - 2x on [0, 1), else 0."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return grad * (2 - 2 * x.abs()).clamp(min=0)


class _BinaryFilters(torch.autograd.Function):
    """mean |w| of each filter times the sign of w; backwards that mean, a constant, where |w| < 1, else 0."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor) -> torch.Tensor:
        scale = weight.abs().mean((1, 2, 3), keepdim=True)
        ctx.save_for_backward(weight, scale)
        return scale * torch.where(weight >= 0, 1.0, -1.0).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        weight, scale = ctx.saved_tensors
        return grad * scale * (weight.abs() < 1)


def sign(x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = _Sign.apply(x)
    return out


def binary_filters(weight: torch.Tensor) -> torch.Tensor:
    """(out, in, k, k) -> the same, with two values a filter."""
    out: torch.Tensor = _BinaryFilters.apply(weight)
    return out


class BinaryConv2d(nn.Module):
    """A method's convolution on signs; `binary_gain` 0 = its real filters."""

    def __init__(self, method: Method, site: ConvSite, binary_gain: float) -> None:
        super().__init__()
        self.conv, self.binary_gain, self.padding = method.conv(site), binary_gain, site.padding
        plain = isinstance(self.conv, WSConv2d) or type(self.conv).forward is Conv2d.forward
        if binary_gain and not plain:
            raise ValueError(
                f"{method.name} does more in a convolution than binary weights leave; set binary_weights to false"
            )

    def filters(self) -> torch.Tensor:
        """Binary; a gain of scaled weight standardisation is applied after that."""
        conv: Any = self.conv
        if isinstance(conv, WSConv2d):
            unit = standardised(conv.weight, torch.ones_like(conv.gain), conv.FLOOR, conv.form.added_eps)
            return binary_filters(unit) * (conv.gain.view(-1, 1, 1, 1) * self.binary_gain)
        return binary_filters(conv.filters()) * self.binary_gain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        conv: Any = self.conv
        x = sign(x)
        if not self.binary_gain:
            return conv(x)
        x, padding = padded(x, conv.kernel, conv.stride, self.padding)
        return F.conv2d(x, self.filters().to(x.dtype), conv.bias, conv.stride, padding)


class Shift(nn.Module):
    """A learned bias by channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + by_channel(self.bias).to(x.dtype)


class Step(nn.Module):
    """shortcut + norm(conv(sign(x / expected_std + bias))), then bias, PReLU, bias."""

    def __init__(self, method: Method, sites: Sequence[ConvSite], *, expected_std: float, binary_gain: float) -> None:
        super().__init__()
        self.scale = 1.0 / expected_std
        self.stride = sites[0].stride
        self.before = Shift(sites[0].in_channels)
        self.convs = nn.ModuleList(BinaryConv2d(method, site, binary_gain) for site in sites)
        self.norms = nn.ModuleList(
            method.norm_act(NormSite(channels=site.out_channels, activation="identity")) for site in sites
        )
        self.ends = nn.ModuleList(method.branch_end() for _ in sites)
        width = sum(site.out_channels for site in sites)
        self.after = nn.Sequential(Shift(width), nn.PReLU(width), Shift(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scaled = x * self.scale if self.scale != 1.0 else x
        shortcut = F.avg_pool2d(scaled, self.stride, ceil_mode=True) if self.stride > 1 else x
        read = self.before(scaled)
        parts = [
            shortcut + end(norm(conv(read))) for conv, norm, end in zip(self.convs, self.norms, self.ends, strict=True)
        ]
        out: torch.Tensor = self.after(torch.cat(parts, 1) if len(parts) > 1 else parts[0])
        return out


class BinaryTrunk(Trunk):
    has_branches = True

    def __init__(
        self,
        shape: BinaryShape,
        num_classes: int,
        method: Method,
        options: TrunkOptions,
        *,
        binary_weights: bool = False,
        binary_gain: float = 1.0,
    ) -> None:
        super().__init__(shape, shape.widths[-1], num_classes, method, options)
        if options.stochastic_depth:
            raise ValueError("a binary trunk drops no branches; set stochastic_depth to 0")
        width = shape.stem_width
        stem = method.conv(ConvSite(in_channels=options.in_chans, out_channels=width, kernel=3, stride=2))
        self.stem = nn.Sequential(
            stem, method.norm_act(NormSite(channels=width, activation=self.activation, after=(stem,)))
        )
        gain, variance = binary_gain if binary_weights else 0.0, 1.0
        blocks: list[nn.Module] = []
        for to, stride in zip(shape.widths, shape.strides, strict=True):
            steps: list[nn.Module] = []
            for sites in _sites(width, to, stride):
                steps.append(Step(method, sites, expected_std=variance**0.5, binary_gain=gain))
                variance = (1.0 if sites[0].stride > 1 else variance) + method.branch_variance
            blocks.append(nn.Sequential(*steps))
            width = to
        self.blocks = nn.ModuleList(blocks)
        self.final = nn.Identity()
        method.prepare(self)

    @property
    def branches(self) -> list[Sequence[Any]]:
        """One convolution each."""
        return [[conv.conv] for block in self.blocks for step in block for conv in step.convs]  # type: ignore[attr-defined]


def _sites(width: int, to: int, stride: int) -> list[list[ConvSite]]:
    """Of the convolutions of a block's two steps."""
    if to not in (width, 2 * width):
        raise ValueError(f"a block of {width} channels cannot give {to}; set widths to steps of 1 or 2 times")
    first = ConvSite(in_channels=width, out_channels=width, kernel=3, stride=stride)
    return [[first], [ConvSite(in_channels=width, out_channels=width, kernel=1)] * (to // width)]
