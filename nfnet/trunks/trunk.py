"""What every trunk has: a shape, a method, features, a head."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from nfnet.network import Network
from nfnet.normalizers.method import Method


@dataclass(frozen=True, kw_only=True)
class TrunkOptions:
    """Besides a shape and a method; the same words as of our own networks."""

    in_chans: int = 3
    activation: str | None = None
    """None: the shape's own."""
    drop_rate: float = 0.0
    stochastic_depth: float = 0.0
    head_init: str = "normal"


class AnyShape(Protocol):
    @property
    def train_px(self) -> int: ...

    @property
    def activation(self) -> str: ...


class Trunk(Network):
    """A network whose normalisation, weights and branches are a method's; a subclass adds stem, blocks and `final`."""

    has_branches: ClassVar[bool] = False
    final: nn.Module
    """After the last block, its activation included."""

    def __init__(
        self, shape: AnyShape, num_features: int, num_classes: int, method: Method, options: TrunkOptions
    ) -> None:
        super().__init__()
        if not self.has_branches and method.needs_branches:
            raise ValueError(f"{method.name} changes residual branches, and this trunk has none; choose a residual one")
        if not self.has_branches and options.stochastic_depth:
            raise ValueError("this trunk has no residual branches to drop; set stochastic_depth to 0")
        self.num_features, self.num_classes, self.method = num_features, num_classes, method
        self.in_chans, self.px = options.in_chans, shape.train_px
        self.activation = options.activation or shape.activation
        self.before_head = method.before_head(num_features)
        self.add_head(options.drop_rate, options.head_init)

    @property
    def branches(self) -> list[Sequence[Any]]:
        """The convolutions of each residual branch, in order; [] in a chain of layers."""
        return []

    def set_grad_checkpointing(self, enable: bool = True, share: float = 1.0, every: int = 1) -> None:
        """Keep only the input of each block, or of a part of them, for the backward pass. Running averages then
        move twice a step, so it is refused with those."""
        if enable and not self.method.batch_free:
            raise ValueError(f"{self.method.name} takes statistics in the forward pass, which checkpointing repeats")
        super().set_grad_checkpointing(enable, share, every)

    def end(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.final(x)
        return out

    def forward_intermediates(self, x: torch.Tensor) -> list[torch.Tensor]:
        """(N, in_chans, H, W) -> at each resolution the last map before it falls, as its reader sees it; finest first."""
        found, x = [], self.stem(x)
        for block in self.blocks:
            out = block(x)
            if out.shape[-2:] != x.shape[-2:]:
                found.append(block.norm_act0(x) if hasattr(block, "norm_act0") else x)  # type: ignore[operator]
            x = out
        return [*found, self.end(x)]

    def pooled(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.before_head(super().pooled(x))
        return out
