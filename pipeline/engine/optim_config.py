"""Fields of the optimiser."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from nfnet.optim.schedule import learning_rate, step_rate
from pipeline.configuration import check_fields
from pipeline.duration import Duration
from pipeline.errors import UserError
from pipeline.field_types import Count, NonNegative, Positive, Range, ShareBelowOne


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """SGD with Nesterov momentum, AGC, linear warm-up and cosine decay, EMA (Brock et al. 2021, section 4 and A.1)."""

    learning_rate: Positive
    """Peak rate, as it is used: the papers' 0.1 * global_batch / 256 is `nfnet.optim.schedule.linear_scaling`."""
    warmup: Duration = field(default_factory=lambda: Duration(0, "steps"))
    """Linear, from 0 to learning_rate; a part of the run's duration."""
    final_learning_rate: NonNegative = 0.0
    """Where the cosine ends."""
    schedule: Literal["cosine", "steps"] = "cosine"
    """After the warm-up: half a cosine to final_learning_rate; or a tenth of the rate after each of decay_steps (BiT)."""
    decay_steps: tuple[Count, ...] = ()
    """Rising numbers of updates, for steps."""
    momentum: ShareBelowOne = 0.9
    """Nesterov's; 0 = none."""
    weight_decay: NonNegative = 0.0
    """Coupled: added to the gradient after clipping; not applied to gains, biases and SkipInit gains."""
    clipping: NonNegative = 0.01
    """AGC's lambda; 0 switches AGC off."""
    clipping_eps: Positive = 1e-3
    """AGC's floor of a parameter's norm, so that weights that begin at 0 can move."""
    ema_decay: ShareBelowOne | None = None
    """None = no averaged weights; evaluation then uses the raw ones."""
    label_smoothing: ShareBelowOne = 0.0
    """The share of a label that is spread over all classes."""
    head_learning_rate_scale: NonNegative = 1.0
    """Times the learning rate, for the classifier."""
    sam_rho: NonNegative = 0.0
    """SAM's radius, each rank's micro-batch perturbing with its own gradient; 0 = no SAM. The fine-tuned NFNet-F4+: 0.05."""
    sam_share: Annotated[float, Range(0, 1, without="low")] = 0.2
    """Of a micro-batch, that the ascent reads (Brock et al. 2021, A.4)."""

    def __post_init__(self) -> None:
        check_fields(self, "optim")
        if list(self.decay_steps) != sorted(set(self.decay_steps)) or (self.schedule == "steps") != bool(
            self.decay_steps
        ):
            raise UserError(
                f"optim.decay_steps is {list(self.decay_steps)} with optim.schedule {self.schedule}; give rising numbers of "
                "updates for the schedule steps, and none for cosine"
            )
        if self.final_learning_rate > self.learning_rate:
            raise UserError(
                f"optim.final_learning_rate is {self.final_learning_rate:g}, above the peak optim.learning_rate "
                f"{self.learning_rate:g}, from which the cosine falls; lower it"
            )
        if self.final_learning_rate and self.schedule == "steps":
            raise UserError(
                f"optim.final_learning_rate is {self.final_learning_rate:g}, which is the cosine's end, and optim.schedule is "
                "steps; set it to 0"
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
