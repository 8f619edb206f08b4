"""Fields of the optimiser."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from nfnet.optim.schedule import learning_rate, step_rate
from pipeline.duration import Duration
from pipeline.errors import UserError


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """SGD with Nesterov momentum, AGC, linear warm-up and cosine decay, EMA (Brock et al. 2021, section 4 and A.1)."""

    learning_rate: float
    """Peak rate, as it is used: the papers' 0.1 * global_batch / 256 is `nfnet.optim.schedule.linear_scaling`."""
    warmup: Duration = field(default_factory=lambda: Duration(0, "steps"))
    final_learning_rate: float = 0.0
    schedule: Literal["cosine", "steps"] = "cosine"
    """After the warm-up: half a cosine to final_learning_rate; or a tenth of the rate after each of decay_steps (BiT)."""
    decay_steps: tuple[int, ...] = ()
    """Rising numbers of updates, for steps."""
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
    sam_rho: float = 0.0
    """SAM's radius, each rank's micro-batch perturbing with its own gradient; 0 = no SAM. The fine-tuned NFNet-F4+: 0.05."""
    sam_share: float = 0.2
    """Of a micro-batch, that the ascent reads (Brock et al. 2021, A.4)."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise UserError(f"optim.learning_rate is {self.learning_rate}; set a positive number")
        if list(self.decay_steps) != sorted(set(self.decay_steps)) or (self.schedule == "steps") != bool(
            self.decay_steps
        ):
            raise UserError(
                f"optim.decay_steps is {list(self.decay_steps)} with optim.schedule {self.schedule}; give rising numbers of "
                "updates for the schedule steps, and none for cosine"
            )
        if self.clipping < 0:
            raise UserError(f"optim.clipping is {self.clipping}; set AGC's lambda (0.01 in the paper), or 0 for none")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise UserError(f"optim.ema_decay is {self.ema_decay}; set a number from 0 to below 1, or none")
        if not (math.isfinite(self.sam_rho) and self.sam_rho >= 0):
            raise UserError(f"optim.sam_rho is {self.sam_rho}; set SAM's radius (0.05 in the papers), or 0 for no SAM")
        if not 0 < self.sam_share <= 1:
            raise UserError(
                f"optim.sam_share is {self.sam_share}; set a share of the micro-batch above 0 and at most 1"
            )

    def rate(self, step: int, *, total_steps: int, warmup_steps: int) -> float:
        if self.schedule == "steps":
            return step_rate(step, warmup_steps=warmup_steps, peak=self.learning_rate, decay_steps=self.decay_steps)
        return learning_rate(
            step,
            total_steps=total_steps,
            warmup_steps=warmup_steps,
            peak=self.learning_rate,
            final=self.final_learning_rate,
        )
