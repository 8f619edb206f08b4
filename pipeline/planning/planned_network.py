"""A run's network on tensors without contents: its parameters, and what a pass over it holds."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from nfnet.analysis.step_profile import StepProfile, step_profile
from nfnet.network import Network as Blocks
from pipeline.errors import UserError
from pipeline.fitting.parameters import Parameters
from pipeline.models.backbone import make
from pipeline.training.run import Run


@dataclass(frozen=True)
class Network:
    """What a plan knows of a run's network, whatever the machines."""

    parameters: Parameters
    profile: StepProfile
    checkpointed: StepProfile | None
    """All blocks computed again."""
    num_blocks: int
    """Of which a part can be computed again; 0 where it is all or none."""
    profile_of: Callable[[float, int], StepProfile]
    """By the share of the blocks that are computed again, and every which of these."""

    @classmethod
    def of(cls, run: Run, num_classes: int) -> "Network":
        """On tensors without contents; a few seconds."""
        with torch.device("meta"):
            network = make(run.model.name, num_classes, run.model.options)
        px, precision = run.augment.image_px, run.engine.precision
        try:
            checkpointed = step_profile(network, px, precision=precision, checkpointing=1.0)
        except ValueError as error:
            if run.engine.activation_checkpointing:
                raise UserError(f"{error}; set engine.activation_checkpointing to false") from None
            checkpointed = None

        @lru_cache
        def profile_of(share: float, every: int) -> StepProfile:
            return step_profile(network, px, precision=precision, checkpointing=share, every=every)

        num_blocks = len(network.blocks) if isinstance(network, Blocks) and checkpointed is not None else 0
        parameters, plain = Parameters.of(network), step_profile(network, px, precision=precision)
        return cls(parameters, plain, checkpointed, num_blocks, profile_of)

    def at(self, share: float, every: int = 1) -> StepProfile | None:
        """None where the network cannot."""
        if not share:
            return self.profile
        return self.checkpointed if (share, every) == (1.0, 1) else self.profile_of(share, every)
