"""The interface between a method and the trunks: a trunk asks a method for its parts, in the order of the forward pass.

A method is one file with one class: `@method("its_name") class Its(Method)`. Fields of the class are its settings, and become
options of the network. Its module's docstring is its page in docs/normalizers. No other file names it: see
docs/methods-and-trunks.md.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from nfnet.functional import padded
from nfnet.layers import FUNCTIONS

METHODS: dict[str, type["Method"]] = {}
"""By name. Complete once `nfnet.normalizers.registry` is imported."""


def act(name: str) -> nn.Module:
    """A bare activation. ValueError for names that there are not."""
    if name not in FUNCTIONS:
        raise ValueError(f"no activation {name!r}; choose one of {', '.join(sorted(FUNCTIONS))}")
    return FUNCTIONS[name]


def wide(x: torch.Tensor) -> torch.Tensor:
    """Half precision as fp32: statistics are never taken in less."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def by_channel(vector: torch.Tensor) -> torch.Tensor:
    """(C,) -> (C, 1, 1), to meet an image (N, C, H, W)."""
    return vector[:, None, None]


@dataclass(frozen=True, kw_only=True)
class ConvSite:
    """Where a convolution stands."""

    in_channels: int
    out_channels: int
    kernel: int
    stride: int = 1
    groups: int = 1
    padding: str = "symmetric"
    """As `nfnet.block.Conventions.padding`."""
    reads: nn.Module | None = None
    """The module, made by `norm_act`, whose output it reads, if nothing lies between."""


@dataclass(frozen=True, kw_only=True)
class NormSite:
    """Where normalisation and activation stand."""

    channels: int
    activation: str
    after: Sequence[nn.Module] = ()
    """The modules whose outputs it reads the sum of: convolutions; for a shortcut without one, what `norm_act` made for the
    same sum's earlier value. Empty where something else lies between."""
    expected_std: float = 1.0
    """Of its input at the start, in a network whose convolutions keep unit variance (`Method.branch_variance`)."""


class Conv2d(nn.Module):
    """Convolution (N, C, H, W) -> (N, O, H', W'); `filters` is what a method may change.

    weight: (out, in / groups, k, k), normal with variance 2 / fan_in (He et al. 2015); bias: (out,), 0, if there is one.
    """

    GAIN = 2.0
    """Variance of the fresh weight times fan-in."""

    def __init__(self, site: ConvSite, *, bias: bool) -> None:
        super().__init__()
        outputs, inputs, groups = site.out_channels, site.in_channels, site.groups
        if inputs % groups or outputs % groups:
            raise ValueError(f"{groups} groups do not divide {inputs} and {outputs} channels; change the widths")
        self.kernel, self.stride, self.groups, self.padding = site.kernel, site.stride, groups, site.padding
        self.weight = nn.Parameter(torch.empty(outputs, inputs // groups, site.kernel, site.kernel))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        self.reset_parameters()

    @property
    def fan_in(self) -> int:
        return self.weight[0].numel()

    def reset_parameters(self) -> None:
        if self.weight.is_meta:
            return
        nn.init.normal_(self.weight, std=(self.GAIN / self.fan_in) ** 0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def filters(self) -> torch.Tensor:
        """What the image meets, in the weight's shape."""
        return self.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.convolve(x, self.filters(), self.bias)

    def convolve(self, x: torch.Tensor, filters: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        x, padding = padded(x, self.kernel, self.stride, self.padding)
        return F.conv2d(x, filters, bias, self.stride, padding, groups=self.groups)


@dataclass(frozen=True, kw_only=True)
class Method:
    """What a trunk asks for; as it stands here, the plain network: biased convolutions and bare activations."""

    name: ClassVar[str] = ""
    batch_free: ClassVar[bool] = True
    """In training no sample's output depends on the other samples of its batch."""
    eval_is_train: ClassVar[bool] = True
    """Evaluation mode computes what training mode does."""
    exact_gradients: ClassVar[bool] = True
    """Gradients are the derivatives of the loss."""
    biases: ClassVar[bool] = True
    """Convolutions have biases of their own."""
    needs_branches: ClassVar[bool] = False
    """It changes residual branches: a chain of layers cannot take it."""
    clipping: ClassVar[float] = 0.0
    """AGC's lambda in the recipes that compare methods; 0 = none."""
    gate_factor: ClassVar[float] = 1.0
    """Squeeze-excite's gates are in (0, this)."""

    def conv(self, site: ConvSite) -> nn.Module:
        """A convolution."""
        return Conv2d(site, bias=self.biases)

    def norm_act(self, site: NormSite) -> nn.Module:
        """What stands between the sum of some convolutions and the next one: normalisation and activation."""
        return act(site.activation)

    def branch_end(self) -> nn.Module:
        """What a residual branch passes before it is added to its shortcut."""
        return nn.Identity()

    @property
    def branch_variance(self) -> float:
        """What a block adds to the variance, where the method keeps account of it; 0 = it does not."""
        return 0.0

    def before_head(self, channels: int) -> nn.Module:  # noqa: ARG002
        """(N, channels) -> (N, channels), between pooling and classifier."""
        return nn.Identity()

    def prepare(self, network: Any) -> None:
        """Last look at fresh weights, once the whole network (`nfnet.trunks.trunk.Trunk`) is made."""

    def check_batch(self, batch: int) -> None:
        """Raises ValueError, in one sentence, for a batch a rank that the method cannot take."""


def method(name: str) -> Callable[[type[Method]], type[Method]]:
    """Registers a class under a name."""

    def enter(cls: type[Method]) -> type[Method]:
        if name in METHODS:
            raise ValueError(f"two methods are called {name!r}; rename one")
        cls.name = name
        METHODS[name] = cls
        return cls

    return enter
