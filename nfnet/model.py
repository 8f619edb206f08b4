"""The networks: stem, blocks, last convolution, head. One definition serves NFNet, NF-ResNet and NF-RegNet.

Where papers and released code differ, the released code is followed; `Conventions` has the other ways.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from nfnet.block import Block, Conventions
from nfnet.layers import MaxPoolSame, ScaledActivation, SqueezeExcite, Standardisation, WSConv2d
from nfnet.network import Network
from nfnet.variants import Variant


class FeatureInfo(NamedTuple):
    """One level of the feature pyramid."""

    num_chs: int
    reduction: int
    """Pixels of the image a pixel of the map, along one side."""
    module: str
    """The module whose output the map is."""


class NFNet(Network):
    """(N, in_chans, H, W) -> logits (N, num_classes), or pooled features (N, num_features) if num_classes is 0."""

    options: dict[str, Any] | None = None
    """Keyword arguments of `create_model` that made the network; saved with its weights."""

    def __init__(
        self,
        variant: Variant,
        num_classes: int = 1000,
        *,
        in_chans: int = 3,
        activation: str | None = None,
        drop_rate: float = 0.0,
        stochastic_depth: float = 0.0,
        head_init: str | None = None,
        conventions: Conventions | None = None,
    ) -> None:
        super().__init__()
        conventions = conventions or Conventions()
        self.variant, self.num_classes, self.conventions = variant, num_classes, conventions
        self.num_features = variant.num_features
        activation = activation or variant.activation
        form = Standardisation(conventions.ws_eps, conventions.padding)
        self.stem = _stem(variant, in_chans, activation, form)
        self.blocks = nn.ModuleList(_blocks(variant, activation, stochastic_depth, conventions))
        self.final_conv = (
            WSConv2d(variant.widths[-1], variant.final_width, 1, form=form) if variant.final_width else None
        )
        self.final_act = ScaledActivation(activation)
        self.add_head(drop_rate, head_init or variant.head_init)

    def reset_parameters(self) -> None:
        """Every parameter anew, as published; the head N(0, 0.01^2) or zero."""
        for module in self.modules():
            if isinstance(module, WSConv2d | SqueezeExcite | Block):
                module.reset_parameters()
        self.reset_head(self.head)

    def reset_classifier(self, num_classes: int) -> None:
        """A new head for another number of classes, where the weights are; 0 takes the head away."""
        reference = next(self.blocks.parameters())
        self.head = self.new_head(num_classes, device=reference.device, dtype=reference.dtype)
        self.num_classes = num_classes

    @property
    def feature_info(self) -> list[FeatureInfo]:
        """What `forward_intermediates` returns: at each resolution the last map before it falls, as its reader sees it."""
        found = []
        channels, reduction = 0, 1
        for name, module, stride in self._steps():
            if stride > 1 and channels and name != "stem.0":
                found.append(FeatureInfo(channels, reduction, f"{name}.act0" if isinstance(module, Block) else name))
            reduction *= stride
            channels = _out_channels(module, channels)
        return [*found, FeatureInfo(self.num_features, reduction, "final_act")]

    def _steps(self) -> Iterator[tuple[str, nn.Module, int]]:
        """Stem layers and blocks in order, each with its stride."""
        for i, layer in enumerate(self.stem.children()):
            yield f"stem.{i}", layer, getattr(layer, "stride", 1)
        for i, block in enumerate(self.blocks):
            yield f"blocks.{i}", block, block.stride  # type: ignore[misc]

    def forward_intermediates(self, x: torch.Tensor, indices: Sequence[int] | None = None) -> list[torch.Tensor]:
        """(N, in_chans, H, W) -> a map (N, num_chs, H / reduction, W / reduction) for each entry of `feature_info`.

        Args:
            indices: which entries, negative ones counted from the end; None: all.
        """
        found: list[torch.Tensor] = []
        for name, module, stride in self._steps():
            if stride > 1 and name != "stem.0":
                found.append(module.act0(x) if isinstance(module, Block) else x)
            x = module(x)
        found.append(self.end(x))
        return found if indices is None else [found[i] for i in indices]

    def end(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.final_act(x if self.final_conv is None else self.final_conv(x))
        return out


def _out_channels(module: nn.Module, channels: int) -> int:
    if isinstance(module, Block):
        return module.conv2.weight.shape[0]
    return module.weight.shape[0] if isinstance(module, WSConv2d) else channels


def _stem(variant: Variant, in_chans: int, activation: str, form: Standardisation) -> nn.Sequential:
    """Convolutions with activations between, none after the last; then a max pool, if the family has one."""
    layers: list[nn.Module] = []
    for i, (width, stride) in enumerate(zip(variant.stem_widths, variant.stem_strides, strict=True)):
        if i:
            layers.append(ScaledActivation(activation))
        layers.append(WSConv2d(in_chans, width, variant.stem_kernel, stride=stride, form=form))
        in_chans = width
    if variant.stem_pool:
        layers.append(MaxPoolSame(3, 2, form.padding))
    return nn.Sequential(*layers)


def _blocks(variant: Variant, activation: str, stochastic_depth: float, conventions: Conventions) -> Iterator[Block]:
    expected_std, last = 1.0, sum(variant.depths) - (1 if conventions.stochastic_depth_inclusive else 0)
    for at in variant.positions():
        drop_path = stochastic_depth * at.index / max(last, 1)
        yield Block(variant, at, conventions, expected_std=expected_std, activation=activation, drop_path=drop_path)
        # A transition uses the previous stage's std for its beta; only then does the variance start again at 1.
        expected_std = ((1.0 if at.starts_stage else expected_std**2) + conventions.alpha**2) ** 0.5
