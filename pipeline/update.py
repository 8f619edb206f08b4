"""What one update does to the weights: rates, clipping and averaging as numbers.

The arithmetic lives in `nfnet` (AGC, SGD, schedule); here are its settings, and AGC over *fragments*: the contiguous parts
of parameters that this rank updates. Without ZeRO a fragment is a whole parameter; with it, a rank owns a cut of each
flattened group, and a unit (a row of a convolution or linear weight) may lie on two ranks. The squares of norms add up, so
one sum over ranks of (units, 2) numbers makes the clip exact wherever the cuts fall.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

import nfnet.agc as agc
from nfnet.schedule import learning_rate
from pipeline.duration import Duration
from pipeline.errors import UserError


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """SGD with Nesterov momentum, AGC, linear warm-up and cosine decay, EMA (Brock et al. 2021, section 4 and A.1)."""

    learning_rate: float
    """Peak rate, as it is used: the papers' 0.1 * global_batch / 256 is `nfnet.schedule.linear_scaling`."""
    warmup: Duration = field(default_factory=lambda: Duration(0, "steps"))
    final_learning_rate: float = 0.0
    momentum: float = 0.9
    weight_decay: float = 0.0
    """Coupled: added to the gradient after clipping; not applied to gains, biases and SkipInit gains."""
    clipping: float = 0.01
    """AGC's lambda; 0 switches AGC off."""
    clipping_eps: float = 1e-3
    ema_decay: float | None = None
    """None = no averaged weights; evaluation then uses the raw ones."""
    label_smoothing: float = 0.0
    head_learning_rate_scale: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise UserError(f"optim.learning_rate is {self.learning_rate}; set a positive number")
        if self.clipping < 0:
            raise UserError(f"optim.clipping is {self.clipping}; set AGC's lambda (0.01 in the paper), or 0 for none")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise UserError(f"optim.ema_decay is {self.ema_decay}; set a number from 0 to below 1, or none")

    def rate(self, step: int, *, total_steps: int, warmup_steps: int) -> float:
        return learning_rate(
            step,
            total_steps=total_steps,
            warmup_steps=warmup_steps,
            peak=self.learning_rate,
            final=self.final_learning_rate,
        )


@dataclass(frozen=True)
class Fragment:
    """A contiguous part of one parameter that this rank updates."""

    name: str
    shape: tuple[int, ...]
    """Shape of the whole parameter."""
    start: int
    """First element of the part in the flattened parameter."""
    weight: torch.Tensor
    """(numel,) fp32 master weights, a view that the optimiser updates."""
    clip: bool
    """False where AGC leaves the gradient alone (the classifier's weight)."""

    @property
    def num_units(self) -> int:
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def is_whole(self) -> bool:
        return self.weight.numel() == math.prod(self.shape)

    def element_units(self) -> torch.Tensor:
        """(numel,) int64: the unit of each element of the part."""
        unit_size = math.prod(self.shape) // self.num_units
        positions = torch.arange(self.start, self.start + self.weight.numel(), device=self.weight.device)
        return torch.div(positions, unit_size, rounding_mode="floor")


def unit_sums(fragment: Fragment, values: torch.Tensor) -> torch.Tensor:
    """(num_units,) fp32: this rank's part of each unit's sum of squares; units that lie elsewhere get 0."""
    values = values.float()
    if fragment.is_whole:
        return agc.unit_square_sums(values.reshape(fragment.shape), fragment.num_units)
    sums = torch.zeros(fragment.num_units, device=values.device)
    return sums.index_add_(0, fragment.element_units(), values.reshape(-1).square())


def scale_units(fragment: Fragment, gradient: torch.Tensor, coefficients: torch.Tensor) -> None:
    """Multiply each element of `gradient` (in place) by the coefficient of its unit."""
    if fragment.num_units == 1:
        gradient.mul_(coefficients)
    elif fragment.is_whole:
        gradient.mul_(coefficients.view(-1, *[1] * (gradient.dim() - 1)))
    else:
        gradient.view(-1).mul_(coefficients[fragment.element_units()])
