"""VGG-like chains of 3x3 convolutions, without shortcuts: where a network needs a normaliser most."""

from dataclasses import dataclass

import torch
from torch import nn

from nfnet.normalizers.method import ConvSite, Method, NormSite
from nfnet.trunks.trunk import Trunk, TrunkOptions


@dataclass(frozen=True, kw_only=True)
class ChainShape:
    stages: tuple[tuple[int, ...], ...]
    """Widths of the convolutions of each stage; a 2x2 max pool ends a stage."""
    hidden: tuple[int, ...] = ()
    """Fully connected layers behind the last map, with ReLU and dropout between (Simonyan, Zisserman 2015)."""
    train_px: int = 224
    activation: str = "relu"


class ChainTrunk(Trunk):
    """conv-norm-act chains. With `hidden` layers features are their output, for images of `train_px` only."""

    def __init__(self, shape: ChainShape, num_classes: int, method: Method, options: TrunkOptions) -> None:
        widths = [*(w for stage in shape.stages for w in stage)]
        super().__init__(shape, (shape.hidden or widths)[-1], num_classes, method, options)
        self.stem = nn.Identity()
        stages: list[nn.Module] = []
        channels = options.in_chans
        for stage in shape.stages:
            layers: list[nn.Module] = []
            for width in stage:
                conv = method.conv(
                    ConvSite(in_channels=channels, out_channels=width, kernel=3, reads=layers[-1] if layers else None)
                )
                layers += [conv, method.norm_act(NormSite(channels=width, activation=self.activation, after=(conv,)))]
                channels = width
            stages.append(nn.Sequential(*layers, nn.MaxPool2d(2)))
        self.blocks = nn.ModuleList(stages)
        side = shape.train_px >> len(shape.stages)
        self.final = _hidden(channels * side**2, shape.hidden, options.drop_rate) if shape.hidden else nn.Identity()
        method.prepare(self)


class _Maps(nn.Module):
    """(N, C) -> (N, C, 1, 1)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :, None, None]


def _hidden(inputs: int, widths: tuple[int, ...], drop_rate: float) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten()]
    for i, width in enumerate(widths):
        linear = nn.Linear(inputs, width)
        if not linear.weight.is_meta:
            nn.init.normal_(linear.weight, std=(2 / inputs) ** 0.5)
            nn.init.zeros_(linear.bias)
        layers += [*([nn.Dropout(drop_rate)] if i else []), linear, nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, _Maps())
