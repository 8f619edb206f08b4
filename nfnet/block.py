"""The residual block of all three families (Brock et al. 2021a, section 3; 2021b, section 2 and figure 5).

    x' = shortcut + alpha * skip_gain * f(gamma * activation(x) * beta)

with beta = 1 / expected standard deviation of x, so that f always sees unit variance.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from nfnet.functional import scaled_add
from nfnet.layers import ScaledActivation, SqueezeExcite, Standardisation, StochasticDepth, WSConv2d, avg_pool_same
from nfnet.variants import Position, Variant


@dataclass(frozen=True, kw_only=True)
class Conventions:
    """Where the papers, the published code and timm differ. The defaults are the published code's."""

    alpha: float = 0.2
    beta_first: bool = False
    """True: scale down by beta, then the nonlinearity (2021b, captions of figures 5 and 6); the code scales after it."""
    se_activation: str = "relu"
    """Of squeeze-excite's hidden layer: the code's plain ReLU; any other name is that scaled activation (2021b, C)."""
    stochastic_depth_rescale: bool = False
    """True: kept branches are divided by the keep rate, as timm's DropPath does."""
    stochastic_depth_inclusive: bool = False
    """True: rates run from 0 to the maximum, last block included (timm); the code gives block i of N the share i / N."""
    ws_eps: float | None = None
    """None: var * fan_in is floored at 1e-4 (the code); a number is added to the raw variance (timm: 1e-5 or 1e-6)."""
    padding: str = "same"
    """same: TensorFlow's, the odd pixel at the end; symmetric: kernel // 2 on both sides (timm's nf_resnet, nf_regnet)."""
    skip_init: float | None = 0.0
    """Initial SkipInit gain; 1 to look at signal propagation, None for a branch without one."""

    def __post_init__(self) -> None:
        if self.padding not in ("same", "symmetric"):
            raise ValueError(f"padding is {self.padding!r}; choose same or symmetric")


class Block(nn.Module):
    """Pre-activation bottleneck: 1x1, 3x3 (strided, grouped), in NFNets a second 3x3, 1x1; squeeze-excite times 2."""

    def __init__(
        self,
        variant: Variant,
        position: Position,
        conventions: Conventions,
        *,
        expected_std: float,
        activation: str,
        drop_path: float,
    ) -> None:
        super().__init__()
        in_channels, out_channels, stride = position.in_channels, position.out_channels, position.stride
        inner, groups = variant.inner_width(in_channels, out_channels, first=position.index == 0)
        form = Standardisation(conventions.ws_eps, conventions.padding)
        self.alpha, self.stride, self.se_place = conventions.alpha, stride, variant.squeeze_excite
        self.expected_std = expected_std
        """Of the block's input at initialisation."""
        self.act0 = ScaledActivation(activation, 1.0 / expected_std, scale_first=conventions.beta_first)
        self.conv0 = WSConv2d(in_channels, inner, 1, form=form)
        self.act1 = ScaledActivation(activation)
        self.conv1 = WSConv2d(inner, inner, 3, stride=stride, groups=groups, form=form)
        if variant.second_3x3:
            self.act1b = ScaledActivation(activation)
            self.conv1b = WSConv2d(inner, inner, 3, groups=groups, form=form)
        self.has_second_3x3 = variant.second_3x3
        self.act2 = ScaledActivation(activation)
        self.conv2 = WSConv2d(inner, out_channels, 1, form=form)
        self.conv_shortcut: WSConv2d | None = None
        self.pool_stride = 1
        if stride > 1 or in_channels != out_channels:
            self.pool_stride = stride if variant.shortcut == "pool" else 1
            self.conv_shortcut = WSConv2d(in_channels, out_channels, 1, stride=stride // self.pool_stride, form=form)
        self.squeeze_excite: SqueezeExcite | None = None
        if variant.squeeze_excite != "none":
            channels = out_channels if variant.squeeze_excite == "after" else inner
            self.squeeze_excite = SqueezeExcite(channels, variant.squeeze_width(channels), conventions.se_activation)
        self.stochastic_depth = StochasticDepth(drop_path, rescale=conventions.stochastic_depth_rescale)
        self.skip_init = conventions.skip_init
        # One element and not a scalar: DeepSpeed broadcasts parameters as bytes and cannot view zero dimensions.
        self.skip_gain = nn.Parameter(torch.empty(1)) if conventions.skip_init is not None else None
        self.own_numbers = ((self.act0, "factor"), (self.act0, "before"), (self.stochastic_depth, "keep"))
        """Attributes in which blocks of one kind differ: floats, or scalar tensors in their place
        (`pipeline.compilation.compile_engine`)."""
        self.watch: Callable[[torch.Tensor], object] | None = None
        """Sees the end of the branch, squeeze-excite included: what signal propagation is about."""
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The SkipInit gain alone; the layers have their own."""
        if self.skip_gain is not None:
            nn.init.constant_(self.skip_gain, self.skip_init or 0.0)

    def branch(self, out: torch.Tensor) -> torch.Tensor:
        """The residual branch's convolutions, from its activated input; a squeeze-excite at their end is not applied."""
        out = self.conv0(out)
        out = self.conv1(self.act1(out))
        if self.has_second_3x3:
            out = self.conv1b(self.act1b(out))
        if self.squeeze_excite is not None and self.se_place == "inside":
            out = out * self.squeeze_excite(out)
        return self.conv2(self.act2(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.act0(x)
        shortcut = x
        if self.conv_shortcut is not None:
            shortcut = self.conv_shortcut(avg_pool_same(out, self.pool_stride) if self.pool_stride > 1 else out)
        out = self.branch(out)
        gates = self.squeeze_excite(out) if self.squeeze_excite is not None and self.se_place == "after" else None
        if self.watch is not None:
            self.watch(out if gates is None else out * gates)
        # All that multiplies the branch is gathered first: the images are read and written once.
        scale = self.skip_gain * self.alpha if self.skip_gain is not None else out.new_full((1,), self.alpha)
        scale = scale.view(1, 1, 1, 1) if gates is None else gates * scale
        return scaled_add(shortcut, out, self.stochastic_depth(scale, out))
