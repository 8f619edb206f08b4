"""Pre-activation residual networks with any method: ResNet-v2, SE-ResNeXt-D, NFNet, and the small ones between.

The shapes are those of `nfnet.variants`; with the method `normalizer_free` an NFNet's shape gives the NFNet, number for number.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from nfnet.layers import MaxPoolSame, SqueezeExcite, StochasticDepth, avg_pool_same
from nfnet.normalizers.method import ConvSite, Method, NormSite
from nfnet.trunks.trunk import Trunk
from nfnet.variants import Variant


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
        method: Method,
        in_channels: int,
        out_channels: int,
        *,
        stride: int,
        expected_std: float,
        activation: str,
        drop_path: float,
        first: bool,
        after: Sequence[nn.Module],
    ) -> None:
        super().__init__()
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
        for i, (width, kernel, groups, step) in enumerate(_layers(shape, in_channels, out_channels, stride, first)):
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


def _layers(
    shape: Shape, in_channels: int, out_channels: int, stride: int, first: bool
) -> list[tuple[int, int, int, int]]:
    """(width, kernel, groups, stride) of a branch's convolutions."""
    if shape.basic:
        return [(out_channels, 3, 1, stride), (out_channels, 3, 1, 1)]
    inner, groups = shape.inner_width(in_channels, out_channels, first=first)
    second = [(inner, 3, groups, 1)] if shape.second_3x3 else []
    return [(inner, 1, 1, 1), (inner, 3, groups, stride), *second, (out_channels, 1, 1, 1)]


class ResidualTrunk(Trunk):
    def __init__(
        self,
        shape: Shape,
        num_classes: int,
        method: Method,
        *,
        in_chans: int = 3,
        activation: str | None = None,
        drop_rate: float = 0.0,
        stochastic_depth: float = 0.0,
        head_init: str = "normal",
    ) -> None:
        super().__init__(
            shape.num_features,
            num_classes,
            method,
            in_chans=in_chans,
            px=shape.train_px,
            drop_rate=drop_rate,
            head_init=head_init,
        )
        activation = activation or shape.activation
        self.stem, sources = _stem(shape, method, in_chans, activation)
        blocks: list[ResidualBlock] = []
        width, expected_std, total = shape.stem_widths[-1], 1.0, sum(shape.depths)
        for depth, stage_width, stage_stride in zip(shape.depths, shape.widths, shape.strides, strict=True):
            for i in range(depth):
                block = ResidualBlock(
                    shape,
                    method,
                    width,
                    stage_width,
                    stride=stage_stride if i == 0 else 1,
                    expected_std=expected_std,
                    activation=activation,
                    drop_path=stochastic_depth * len(blocks) / total,
                    first=not blocks,
                    after=sources,
                )
                starts_stage = block.conv_shortcut is not None
                expected_std = ((1.0 if starts_stage else expected_std**2) + method.branch_variance) ** 0.5
                sources, width = block.sources, stage_width
                blocks.append(block)
        self.blocks = nn.ModuleList(blocks)
        self.final = _final(shape, method, activation, sources)
        method.prepare(self)

    @property
    def branches(self) -> list[Sequence[nn.Module]]:
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
