"""The networks: stem, blocks, last convolution, head. One definition serves NFNet, NF-ResNet and NF-RegNet.

Where papers and released code differ, the released code is followed; `Conventions` has the other ways.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from nfnet.block import Block, Conventions
from nfnet.functional import is_autocast, linear_fp32
from nfnet.layers import MaxPoolSame, ScaledActivation, SqueezeExcite, Standardisation, WSConv2d
from nfnet.variants import Variant


class FeatureInfo(NamedTuple):
    """One level of the feature pyramid."""

    num_chs: int
    reduction: int
    """Pixels of the image a pixel of the map, along one side."""
    module: str
    """The module whose output the map is."""


class NFNet(nn.Module):
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
        self.head_init = head_init or variant.head_init
        if self.head_init not in ("normal", "zero"):
            raise ValueError(f"head_init is {self.head_init!r}; choose normal (0.01) or zero")
        self.num_features, self.grad_checkpointing = variant.num_features, False
        activation = activation or variant.activation
        form = Standardisation(conventions.ws_eps, conventions.padding)
        self.stem = _stem(variant, in_chans, activation, form)
        self.blocks = nn.ModuleList(_blocks(variant, activation, stochastic_depth, conventions))
        self.final_conv = (
            WSConv2d(variant.widths[-1], variant.final_width, 1, form=form) if variant.final_width else None
        )
        self.final_act = ScaledActivation(activation)
        self.dropout = nn.Dropout(drop_rate)
        self.head = self._new_head(num_classes)

    def _new_head(self, num_classes: int, **where: Any) -> nn.Linear | nn.Identity:
        if num_classes < 0:
            raise ValueError(f"num_classes is {num_classes}; give 1 or more, or 0 for a network without a head")
        if num_classes == 0:
            return nn.Identity()
        head = nn.Linear(self.num_features, num_classes, **where)
        self._reset_head(head)
        return head

    def _reset_head(self, head: nn.Module) -> None:
        if not isinstance(head, nn.Linear):
            return
        if self.head_init == "zero":
            nn.init.zeros_(head.weight)
        else:
            nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)

    def reset_parameters(self) -> None:
        """Every parameter anew, as published; the head N(0, 0.01^2) or zero."""
        for module in self.modules():
            if isinstance(module, WSConv2d | SqueezeExcite | Block):
                module.reset_parameters()
        self._reset_head(self.head)

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """A new head for another number of classes, where the weights are; 0 takes the head away."""
        reference = next(self.blocks.parameters())
        self.head = self._new_head(num_classes, device=reference.device, dtype=reference.dtype)
        self.num_classes = num_classes

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only each block's input for the backward pass and compute the rest again: less memory, a third more work."""
        self.grad_checkpointing = enable

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
        for i, layer in enumerate(self.stem):
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
        found.append(self._end(x))
        return found if indices is None else [found[i] for i in indices]

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_chans, H, W) -> (N, num_features, h, w)."""
        x = self.stem(x)
        for block in self.blocks:
            if self.grad_checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self._end(x)

    def _end(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.final_act(x if self.final_conv is None else self.final_conv(x))
        return out

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """(N, num_features, h, w) -> pooled features (N, num_features) if `pre_logits`, else logits.

        Both are fp32 under autocast.
        """
        pooled = x.mean(dim=(2, 3), dtype=torch.float32) if is_autocast(x) else x.mean(dim=(2, 3))
        return pooled if pre_logits else linear_fp32(self.head, self.dropout(pooled))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


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
    width, expected_std, index = variant.stem_widths[-1], 1.0, 0
    last = sum(variant.depths) - (1 if conventions.stochastic_depth_inclusive else 0)
    for depth, stage_width, stage_stride in zip(variant.depths, variant.widths, variant.strides, strict=True):
        for i in range(depth):
            yield Block(
                variant,
                width,
                stage_width,
                stride=stage_stride if i == 0 else 1,
                expected_std=expected_std,
                activation=activation,
                drop_path=stochastic_depth * index / max(last, 1),
                conventions=conventions,
                first=index == 0,
            )
            # A transition uses the previous stage's std for its beta; only then does the variance start again at 1.
            expected_std = ((1.0 if i == 0 else expected_std**2) + conventions.alpha**2) ** 0.5
            width, index = stage_width, index + 1
