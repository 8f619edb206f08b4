"""NFNet: residual blocks without normalisation (Brock et al. 2021, section 2 and figure 5; code `nfnets/nfnet.py`).

    x' = shortcut + alpha * skip_gain * f(activation(x) * beta)

with beta = 1 / expected standard deviation of x, so that f always sees unit variance. Where paper and released code
differ, the released code is followed: activation before beta, ReLU in squeeze-excite, stochastic depth without
rescaling.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from nfnet.layers import ScaledActivation, SqueezeExcite, StochasticDepth, WSConv2d, avg_pool_same
from nfnet.variants import Variant


class NFBlock(nn.Module):
    """Pre-activation bottleneck: 1x1, grouped 3x3 (strided), grouped 3x3, 1x1, squeeze-excite."""

    def __init__(
        self,
        variant: Variant,
        in_channels: int,
        out_channels: int,
        *,
        stride: int,
        expected_std: float,
        activation: str,
        alpha: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        inner, groups = variant.inner_width(out_channels)
        self.alpha, self.stride = alpha, stride
        self.act0 = ScaledActivation(activation, 1.0 / expected_std)
        self.conv0 = WSConv2d(in_channels, inner, 1)
        self.act1 = ScaledActivation(activation)
        self.conv1 = WSConv2d(inner, inner, 3, stride=stride, groups=groups)
        self.act1b = ScaledActivation(activation)
        self.conv1b = WSConv2d(inner, inner, 3, groups=groups)
        self.act2 = ScaledActivation(activation)
        self.conv2 = WSConv2d(inner, out_channels, 1)
        has_shortcut = stride > 1 or in_channels != out_channels
        self.conv_shortcut = WSConv2d(in_channels, out_channels, 1) if has_shortcut else None
        self.squeeze_excite = SqueezeExcite(out_channels, int(out_channels * variant.se_ratio))
        self.stochastic_depth = StochasticDepth(drop_path)
        # One element and not a scalar: DeepSpeed broadcasts parameters as bytes and cannot view zero dimensions.
        self.skip_gain = nn.Parameter(torch.zeros(1))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.skip_gain)

    def branch(self, out: torch.Tensor) -> torch.Tensor:
        """The residual branch from its activated input, squeeze-excite (times 2) included."""
        out = self.conv0(out)
        out = self.conv1(self.act1(out))
        out = self.conv1b(self.act1b(out))
        out = self.conv2(self.act2(out))
        return 2 * self.squeeze_excite(out) * out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.act0(x)
        shortcut = x
        if self.conv_shortcut is not None:
            shortcut = self.conv_shortcut(avg_pool_same(out, self.stride) if self.stride > 1 else out)
        branch = self.stochastic_depth(self.branch(out))
        return torch.addcmul(shortcut, branch, self.skip_gain * self.alpha)


class NFNet(nn.Module):
    """(N, in_chans, H, W) -> logits (N, num_classes)."""

    def __init__(
        self,
        variant: Variant,
        num_classes: int = 1000,
        *,
        in_chans: int = 3,
        activation: str | None = None,
        drop_rate: float = 0.0,
        stochastic_depth: float = 0.0,
        alpha: float = 0.2,
        head_init: str = "normal",
    ) -> None:
        super().__init__()
        if head_init not in ("normal", "zero"):
            raise ValueError(f"head_init is {head_init!r}; choose normal (0.01) or zero")
        self.variant, self.num_classes, self.head_init = variant, num_classes, head_init
        self.num_features = variant.num_features
        activation = activation or variant.activation
        self.stem = _stem(variant, in_chans, activation)
        self.blocks = nn.ModuleList()
        width, expected_std, index = variant.stem_widths[-1], 1.0, 0
        for stage_depth, stage_width, stage_stride in zip(variant.depths, variant.widths, variant.strides, strict=True):
            for i in range(stage_depth):
                block = NFBlock(
                    variant,
                    width,
                    stage_width,
                    stride=stage_stride if i == 0 else 1,
                    expected_std=expected_std,
                    activation=activation,
                    alpha=alpha,
                    drop_path=stochastic_depth * index / sum(variant.depths),
                )
                self.blocks.append(block)
                # A transition uses the previous stage's std for its beta; only then does the variance start again at 1.
                expected_std = ((1.0 if i == 0 else expected_std**2) + alpha**2) ** 0.5
                width, index = stage_width, index + 1
        self.final_conv = WSConv2d(width, self.num_features, 1)
        self.final_act = ScaledActivation(activation)
        self.dropout = nn.Dropout(drop_rate)
        self.head = nn.Linear(self.num_features, num_classes)
        self._reset_head()

    def reset_parameters(self) -> None:
        """Every parameter anew, as published; the head N(0, 0.01^2) or zero."""
        for module in self.modules():
            if isinstance(module, WSConv2d | SqueezeExcite | NFBlock):
                module.reset_parameters()
        self._reset_head()

    def _reset_head(self) -> None:
        if self.head_init == "zero":
            nn.init.zeros_(self.head.weight)
        else:
            nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def reset_classifier(self, num_classes: int) -> None:
        """A new head for another number of classes."""
        self.num_classes = num_classes
        weight = self.head.weight
        self.head = nn.Linear(self.num_features, num_classes, device=weight.device, dtype=weight.dtype)
        self._reset_head()

    def forward_features(
        self, x: torch.Tensor, observe: Callable[[NFBlock | None, torch.Tensor], Any] | None = None
    ) -> torch.Tensor:
        """(N, in_chans, H, W) -> (N, num_features, h, w). `observe` sees the stem's map (None) and each block's."""
        x = self.stem(x)
        if observe is not None:
            observe(None, x)
        for block in self.blocks:
            x = block(x)
            if observe is not None:
                observe(block, x)  # type: ignore[arg-type]
        out: torch.Tensor = self.final_act(self.final_conv(x))
        return out

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """(N, num_features, h, w) -> pooled features (N, num_features) if `pre_logits`, else logits."""
        pooled = x.mean(dim=(2, 3))
        if pre_logits:
            return pooled
        logits: torch.Tensor = self.head(self.dropout(pooled))
        return logits

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


def _stem(variant: Variant, in_chans: int, activation: str) -> nn.Sequential:
    """3x3 convolutions with activations between, none after the last."""
    layers: list[nn.Module] = []
    for i, (width, stride) in enumerate(zip(variant.stem_widths, variant.stem_strides, strict=True)):
        if i:
            layers.append(ScaledActivation(activation))
        layers.append(WSConv2d(in_chans, width, 3, stride=stride))
        in_chans = width
    return nn.Sequential(*layers)
