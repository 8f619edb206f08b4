"""Pre-activation residual networks with any method: ResNet-v2, SE-ResNeXt-D, NFNet, and the small ones between.

The shapes are those of `nfnet.variants`; with the method `normalizer_free` an NFNet's shape gives the NFNet, number for number.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nfnet.layers import MaxPoolSame, SqueezeExcite, StochasticDepth, avg_pool_same
from nfnet.normalizers.method import ConvSite, Method, NormSite
from nfnet.trunks.trunk import Trunk, TrunkOptions
from nfnet.variants import Position, Variant


@dataclass(frozen=True, kw_only=True)
class Shape(Variant):
    basic: bool = False
    """Branches of two 3x3 convolutions of the block's width, in place of bottlenecks."""
    padding: str = "symmetric"
    """Of convolutions (`nfnet.block.Conventions`)."""


class ResidualBlock(nn.Module):
    """shortcut + branch; the branch is norm-act-conv, two to four times, and squeeze-excite."""

    def __init__(
        self,
        shape: Shape,
        position: Position,
        method: Method,
        *,
        expected_std: float,
        activation: str,
        drop_path: float,
        after: Sequence[nn.Module],
    ) -> None:
        super().__init__()
        in_channels, out_channels, stride = position.in_channels, position.out_channels, position.stride
        self.norm_act0 = method.norm_act(
            NormSite(channels=in_channels, activation=activation, after=after, expected_std=expected_std)
        )
        self.conv_shortcut: nn.Module | None = None
        self.pool_stride = 1
        if stride > 1 or in_channels != out_channels:
            self.pool_stride = stride if shape.shortcut == "pool" else 1
            self.conv_shortcut = method.conv(
                ConvSite(
                    in_channels=in_channels,
                    out_channels=out_channels,
                    kernel=1,
                    stride=stride // self.pool_stride,
                    padding=shape.padding,
                    reads=self.norm_act0 if self.pool_stride == 1 else None,
                )
            )
        layers: list[nn.Module] = []
        self.convs: list[nn.Module] = []
        channels, reads = in_channels, self.norm_act0
        for i, (width, kernel, groups, step) in enumerate(_layers(shape, position)):
            if i:
                reads = method.norm_act(NormSite(channels=channels, activation=activation, after=self.convs[-1:]))
                layers.append(reads)
            conv = method.conv(
                ConvSite(
                    in_channels=channels,
                    out_channels=width,
                    kernel=kernel,
                    stride=step,
                    groups=groups,
                    padding=shape.padding,
                    reads=reads,
                )
            )
            layers.append(conv)
            self.convs.append(conv)
            channels = width
        self.branch = nn.Sequential(*layers)
        self.squeeze_excite = (
            None if shape.squeeze_excite == "none" else SqueezeExcite(out_channels, shape.squeeze_width(out_channels))
        )
        self.gate_scale = method.gate_factor / 2  # `SqueezeExcite` gives gates in (0, 2)
        self.branch_end = method.branch_end()
        self.drop_path = StochasticDepth(drop_path, rescale=method.branch_variance == 0)

    @property
    def sources(self) -> Sequence[nn.Module]:
        """Whose outputs add up to this block's; () where something lies between."""
        if self.squeeze_excite is not None:
            return ()
        return (self.convs[-1], self.conv_shortcut or self.norm_act0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.norm_act0(x)
        shortcut = x
        if self.conv_shortcut is not None:
            shortcut = self.conv_shortcut(avg_pool_same(out, self.pool_stride) if self.pool_stride > 1 else out)
        out = self.branch(out)
        if self.squeeze_excite is not None:
            out = out * (self.squeeze_excite(out) * self.gate_scale)
        out = self.branch_end(out)
        if self.training and self.drop_path.rate:
            out = out * self.drop_path(out.new_ones(1, 1, 1, 1), out)
        return shortcut + out


def _layers(shape: Shape, position: Position) -> list[tuple[int, int, int, int]]:
    """(width, kernel, groups, stride) of a branch's convolutions."""
    out_channels, stride = position.out_channels, position.stride
    if shape.basic:
        return [(out_channels, 3, 1, stride), (out_channels, 3, 1, 1)]
    inner, groups = shape.inner_width(position.in_channels, out_channels, first=position.index == 0)
    second = [(inner, 3, groups, 1)] if shape.second_3x3 else []
    return [(inner, 1, 1, 1), (inner, 3, groups, stride), *second, (out_channels, 1, 1, 1)]


class ResidualTrunk(Trunk):
    has_branches = True

    def __init__(self, shape: Shape, num_classes: int, method: Method, options: TrunkOptions) -> None:
        super().__init__(shape, shape.num_features, num_classes, method, options)
        activation, self.depths = self.activation, shape.depths
        self.stem, sources = _stem(shape, method, options.in_chans, activation)
        blocks: list[ResidualBlock] = []
        expected_std, total = 1.0, sum(shape.depths)
        for at in shape.positions():
            block = ResidualBlock(
                shape,
                at,
                method,
                expected_std=expected_std,
                activation=activation,
                drop_path=options.stochastic_depth * at.index / total,
                after=sources,
            )
            starts_anew = block.conv_shortcut is not None
            expected_std = ((1.0 if starts_anew else expected_std**2) + method.branch_variance) ** 0.5
            sources = block.sources
            blocks.append(block)
        self.blocks = nn.ModuleList(blocks)
        self.final = _final(shape, method, activation, sources)
        method.prepare(self)

    @property
    def branches(self) -> list[Sequence[Any]]:
        return [block.convs for block in self.blocks]  # type: ignore[misc]


def _stem(shape: Shape, method: Method, in_chans: int, activation: str) -> tuple[nn.Sequential, Sequence[nn.Module]]:
    """Convolutions with norm-act between and none after the last, a max pool if the shape has one; what the sum is made of."""
    layers: list[nn.Module] = []
    reads: nn.Module | None = None
    for i, (width, stride) in enumerate(zip(shape.stem_widths, shape.stem_strides, strict=True)):
        if i:
            reads = method.norm_act(NormSite(channels=in_chans, activation=activation, after=layers[-1:]))
            layers.append(reads)
        layers.append(
            method.conv(
                ConvSite(
                    in_channels=in_chans,
                    out_channels=width,
                    kernel=shape.stem_kernel,
                    stride=stride,
                    padding=shape.padding,
                    reads=reads,
                )
            )
        )
        in_chans = width
    if not shape.stem_pool:
        return nn.Sequential(*layers), layers[-1:]
    return nn.Sequential(*layers, MaxPoolSame(3, 2, shape.padding)), ()


def _final(shape: Shape, method: Method, activation: str, sources: Sequence[nn.Module]) -> nn.Sequential:
    """The last 1x1 convolution, if there is one, and norm-act: an NFNet's reads the bare sum, so others normalise it first."""
    if not shape.final_width:
        return nn.Sequential(method.norm_act(NormSite(channels=shape.widths[-1], activation=activation, after=sources)))
    conv = method.conv(
        ConvSite(in_channels=shape.widths[-1], out_channels=shape.final_width, kernel=1, padding=shape.padding)
    )
    return nn.Sequential(
        conv, method.norm_act(NormSite(channels=shape.final_width, activation=activation, after=(conv,)))
    )
