"""Fields of the optimiser."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from nfnet.optim.schedule import learning_rate, step_rate, warmup_stable_decay
from pipeline.configuration import check_fields
from pipeline.duration import Duration
from pipeline.errors import UserError
from pipeline.field_types import Count, Form, NonNegative, Positive, Range, ShareBelowOne, Text

RateScale = Annotated[
    str, Form(r"[^=]*\S[^=]*=\s*(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?\s*", "PART=NUMBER or PATTERN=NUMBER")
]


Clip = Literal["agc", "agc_layer", "norm", "none"]


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """SGD with Nesterov momentum, AGC, linear warm-up and cosine decay, EMA (Brock et al. 2021, section 4 and A.1); or others."""

    name: Literal["sgd", "momentum", "adamw", "lion", "lamb", "muon"] = "sgd"
    """sgd: Nesterov's, fused; momentum: without Nesterov; the others as torch and timm have them. lamb and muon need whole
    parameters: engine.zero_stage 0."""
    learning_rate: Positive
    """Peak rate, as it is used: the papers' 0.1 * global_batch / 256 is `nfnet.optim.schedule.linear_scaling`."""
    warmup: Duration = field(default_factory=lambda: Duration(0, "steps"))
    """Linear, from 0 to learning_rate; a part of the run's duration."""
    final_learning_rate: NonNegative = 0.0
    """Where the cosine ends."""
    schedule: Literal["cosine", "steps", "stable"] = "cosine"
    """After the warm-up: half a cosine to final_learning_rate; a tenth of the rate after each of decay_steps (BiT); or the same
    rate until a cool-down (warm-up-stable-decay)."""
    cooldown_share: ShareBelowOne = 0.2
    """Of the run, in which the rate falls to final_learning_rate in a straight line; for stable."""
    decay_steps: tuple[Count, ...] = ()
    """Rising numbers of updates, for steps."""
    momentum: ShareBelowOne = 0.9
    """Nesterov's, or of whichever optimiser: the share of the first moment that an update keeps; 0 = none."""
    second_momentum: ShareBelowOne = 0.999
    """The same of the second moment (beta 2), for adamw, lamb, lion (0.99 is usual there) and muon."""
    epsilon: Positive = 1e-8
    """Added to the root of the second moment, for adamw and lamb."""
    weight_decay: NonNegative = 0.0
    """Not applied to gains, biases and SkipInit gains. Added to the gradient after clipping, for sgd, momentum and lamb; for the
    others times the learning rate and taken off the weights."""
    layer_decay: Annotated[float, Range(0, 1, without="low")] = 1.0
    """Rates fall by this factor from each layer to the one before it, counted from the head; 1 = all have the same."""
    rate_scales: tuple[RateScale, ...] = ()
    """Times the learning rate, by part of the network (stem=0.1, stage 0=0.5, head=10) or pattern of names (*.bias=2)."""
    frozen: tuple[Text, ...] = ()
    """Parts of the network, or patterns of names, that are not trained; engine.zero_stage 0 to 2."""
    clip: Clip = "agc"
    """How gradients are clipped: unit by unit (AGC), by AGC with each tensor as one unit (agc_layer), all by their common norm,
    or not."""
    clip_norm: Positive = 1.0
    """Largest common norm of the gradients, for norm."""
    unclipped: tuple[Text, ...] = ()
    """Parts of the network, or patterns of names, that AGC leaves alone, besides the classifier's weight."""
    clip_head: bool = False
    """AGC clips the classifier's weight as well; Brock et al. 2021b leave it alone."""
    clipping: NonNegative = 0.01
    """AGC's lambda; 0 switches AGC off."""
    clipping_eps: Positive = 1e-3
    """AGC's floor of a parameter's norm, so that weights that begin at 0 can move."""
    loss: Literal["softmax", "binary"] = "softmax"
    """Cross-entropy over all classes together, or of each class by itself."""
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
                "updates for the schedule steps, and none for the others"
            )
        if self.final_learning_rate > self.learning_rate:
            raise UserError(
                f"optim.final_learning_rate is {self.final_learning_rate:g}, above the peak optim.learning_rate "
                f"{self.learning_rate:g}, from which the rate falls; lower it"
            )
        if self.final_learning_rate and self.schedule == "steps":
            raise UserError(
                f"optim.final_learning_rate is {self.final_learning_rate:g}, which is where cosine and stable end, and "
                "optim.schedule is steps; set it to 0"
            )
        if self.clip_head and not self.uses_agc:
            raise UserError(
                "optim.clip_head has AGC clip the classifier's weight, and AGC is off; set optim.clip to agc with optim.clipping "
                "above 0, or clip_head to false"
            )
        if self.unclipped and not self.uses_agc:
            raise UserError(
                f"optim.unclipped names {self.unclipped[0]!r}, which AGC is to leave alone, and AGC is off; set optim.clip to "
                "agc with optim.clipping above 0, or name none"
            )

    @property
    def uses_agc(self) -> bool:
        return self.clip in ("agc", "agc_layer") and self.clipping > 0

    @property
    def moments(self) -> tuple[str, ...]:
        """Names of the states that the optimiser keeps of a parameter."""
        return {
            "sgd": ("momentum",),
            "momentum": ("momentum_buffer",),
            "adamw": ("exp_avg", "exp_avg_sq"),
            "lamb": ("exp_avg", "exp_avg_sq"),
            "lion": ("exp_avg",),
            "muon": ("momentum_buffer", "exp_avg", "exp_avg_sq"),
        }[self.name]

    @property
    def num_states(self) -> int:
        """Tensors of the size of the weights that a checkpoint holds."""
        return 1 + len(self.moments) + (self.ema_decay is not None)

    def check_engine(self, zero_stage: int) -> None:
        """UserError where the optimiser does not work at this stage."""
        if zero_stage and self.name in ("lamb", "muon"):
            raise UserError(
                f"optim.name is {self.name}, which needs whole parameters, and engine.zero_stage {zero_stage} cuts them; set "
                "engine.zero_stage to 0, or take adamw or lion"
            )
        if zero_stage == 3 and self.frozen:
            raise UserError(
                f"optim.frozen names {self.frozen[0]!r}, and engine.zero_stage 3 cuts up what is frozen too; set "
                "engine.zero_stage to 0, 1 or 2"
            )

    @property
    def advice(self) -> str:
        """What of these fields is likely to be a mistake, in one sentence; "" if nothing is."""
        if self.uses_agc and self.name not in ("sgd", "momentum"):
            return (
                f"optim.clip is agc with optim.name {self.name}: its updates hardly depend on the size of a gradient, so AGC "
                "changes little but which batches count, and was not studied with it; --optim.clip norm is usual there"
            )
        return ""

    def rate(self, step: int, *, total_steps: int, warmup_steps: int) -> float:
        if self.schedule == "steps":
            return step_rate(step, warmup_steps=warmup_steps, peak=self.learning_rate, decay_steps=self.decay_steps)
        if self.schedule == "stable":
            return warmup_stable_decay(
                step,
                total_steps=total_steps,
                warmup_steps=warmup_steps,
                cooldown_steps=min(round(self.cooldown_share * total_steps), total_steps - warmup_steps),
                peak=self.learning_rate,
                final=self.final_learning_rate,
            )
        return learning_rate(
            step,
            total_steps=total_steps,
            warmup_steps=warmup_steps,
            peak=self.learning_rate,
            final=self.final_learning_rate,
        )
