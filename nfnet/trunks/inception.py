"""Inception-v2-like trunks (Ioffe, Szegedy 2015; the widths as tensorflow/models' slim states them)."""

from dataclasses import dataclass

import torch
from torch import nn

from nfnet.normalizers.method import ConvSite, Method, NormSite
from nfnet.trunks.trunk import Trunk, TrunkOptions

# (1x1), (1x1, 3x3), (1x1, 3x3, 3x3), (pooled 1x1): outputs of a mixed block; 0 = that branch is not there.
V2 = (
    ((64,), (64, 64), (64, 96, 96), (32,), "avg", 1),
    ((64,), (64, 96), (64, 96, 96), (64,), "avg", 1),
    ((0,), (128, 160), (64, 96, 96), (0,), "max", 2),
    ((224,), (64, 96), (96, 128, 128), (128,), "avg", 1),
    ((192,), (96, 128), (96, 128, 128), (128,), "avg", 1),
    ((160,), (128, 160), (128, 160, 160), (96,), "avg", 1),
    ((96,), (128, 192), (160, 192, 192), (96,), "avg", 1),
    ((0,), (128, 192), (192, 256, 256), (0,), "max", 2),
    ((352,), (192, 320), (160, 224, 224), (128,), "avg", 1),
    ((352,), (192, 320), (192, 224, 224), (128,), "max", 1),
)
LEAST_WIDTH = 16


@dataclass(frozen=True, kw_only=True)
class InceptionShape:
    multiplier: float = 1.0
    """Of all widths, which are 16 at least."""
    small_stem: bool = False
    """One 3x3 convolution, for images of 32 to 64 pixels, in place of the stem that divides the side by 8."""
    blocks: tuple[int, ...] = tuple(range(len(V2)))
    """Which of the ten mixed blocks."""
    train_px: int = 224
    activation: str = "relu"

    def width(self, channels: int) -> int:
        return max(LEAST_WIDTH, int(channels * self.multiplier)) if channels else 0


class _Separable(nn.Module):
    """7x7 of stride 2 over each input channel, 8 maps each, then 1x1."""

    def __init__(self, in_chans: int, width: int, method: Method) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(in_chans, 8 * in_chans, 7, stride=2, padding=3, groups=in_chans, bias=False)
        self.pointwise = method.conv(ConvSite(in_channels=8 * in_chans, out_channels=width, kernel=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.pointwise(self.depthwise(x))
        return out


class Mixed(nn.Module):
    """Four branches from one input, side by side in the output."""

    def __init__(self, shape: InceptionShape, method: Method, channels: int, row: int, activation: str) -> None:
        super().__init__()
        ones, threes, fives, pooled, kind, stride = V2[row]
        self.out_channels = 0
        branches = []
        for branch, widths in enumerate((ones, threes, fives, pooled)):
            layers: list[nn.Module] = []
            if branch == 3:
                layers.append((nn.AvgPool2d if kind == "avg" else nn.MaxPool2d)(3, stride, 1))
            elif not widths[0]:
                continue
            width = channels
            for i, to in enumerate(w for w in map(shape.width, widths) if w):
                kernel = 1 if i == 0 else 3
                reads = layers[-1] if i else None
                conv = method.conv(
                    ConvSite(
                        in_channels=width,
                        out_channels=to,
                        kernel=kernel,
                        stride=stride if i == len(widths) - 1 else 1,
                        reads=reads,
                    )
                )
                layers += [conv, method.norm_act(NormSite(channels=to, activation=activation, after=(conv,)))]
                width = to
            self.out_channels += width
            branches.append(nn.Sequential(*layers))
        self.branches = nn.ModuleList(branches)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


class InceptionTrunk(Trunk):
    def __init__(self, shape: InceptionShape, num_classes: int, method: Method, options: TrunkOptions) -> None:
        activation = options.activation or shape.activation
        with torch.device("meta"):
            features = _blocks(shape, method, activation)[-1].out_channels
        super().__init__(shape, features, num_classes, method, options)
        self.stem = _stem(shape, method, options.in_chans, activation)
        self.blocks = nn.ModuleList(_blocks(shape, method, activation))
        self.final = nn.Identity()
        method.prepare(self)


def _blocks(shape: InceptionShape, method: Method, activation: str) -> list[Mixed]:
    blocks: list[Mixed] = []
    channels = shape.width(192)
    for row in shape.blocks:
        blocks.append(Mixed(shape, method, channels, row, activation))
        channels = blocks[-1].out_channels
    return blocks


def _stem(shape: InceptionShape, method: Method, in_chans: int, activation: str) -> nn.Sequential:
    wide, narrow = shape.width(192), shape.width(64)
    if shape.small_stem:
        conv = method.conv(ConvSite(in_channels=in_chans, out_channels=wide, kernel=3))
        return nn.Sequential(conv, method.norm_act(NormSite(channels=wide, activation=activation, after=(conv,))))
    first = _Separable(in_chans, narrow, method)
    second = method.conv(ConvSite(in_channels=narrow, out_channels=narrow, kernel=1))
    reads = method.norm_act(NormSite(channels=narrow, activation=activation, after=(second,)))
    third = method.conv(ConvSite(in_channels=narrow, out_channels=wide, kernel=3, reads=reads))
    return nn.Sequential(
        first,
        method.norm_act(NormSite(channels=narrow, activation=activation)),
        nn.MaxPool2d(3, 2, 1),
        second,
        reads,
        third,
        method.norm_act(NormSite(channels=wide, activation=activation, after=(third,))),
        nn.MaxPool2d(3, 2, 1),
    )
