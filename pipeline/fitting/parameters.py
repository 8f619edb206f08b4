"""Sizes of a network's parameters as DeepSpeed's stages cut them: groups, padding, parts of a rank."""

from dataclasses import dataclass

from torch import nn

from nfnet.optim.param_groups import param_groups

ELEMENT = 4
"""Bytes: weights, gradients, momentum and averages are fp32 at every stage (`pipeline.engine.engine`)."""
STAGE_3_WHOLE = 100_000
"""Parameters of up to so many elements stay whole on every rank in stage 3 (stage3_param_persistence_threshold's default)."""


@dataclass(frozen=True)
class Parameters:
    """Elements of a network's parameters, group by group as the optimiser holds them."""

    groups: tuple[tuple[int, ...], ...]
    num_units: int
    """Rows of matrices and convolutions; a vector is one (`pipeline.engine.fragments`)."""

    @classmethod
    def of(cls, network: nn.Module) -> "Parameters":
        groups = param_groups(network, lr=1.0)
        units = sum(p.shape[0] if p.dim() > 1 else 1 for p in network.parameters())
        return cls(tuple(tuple(p.numel() for p in group["params"]) for group in groups), units)

    @property
    def each(self) -> list[int]:
        return [n for group in self.groups for n in group]

    @property
    def num_bytes(self) -> int:
        return ELEMENT * sum(self.each)

    def padded_groups(self, world: int) -> list[int]:
        """Bytes of each flat group in stages 1 and 2: a multiple of two elements a rank."""
        unit = 2 * world
        return [ELEMENT * (-(-sum(group) // unit) * unit) for group in self.groups]

    def padded(self, world: int, *, whole: bool | None = None) -> int:
        """Bytes of all parameters in stage 3, each a multiple of the ranks; of those that stay whole alone, or of the others."""
        chosen = [n for n in self.each if whole is None or (n <= STAGE_3_WHOLE) == whole]
        return ELEMENT * sum(-(-n // world) * world for n in chosen)

    def share(self, stage: int, world: int) -> int:
        """Bytes of a rank's part of one state."""
        if stage == 0:
            return self.num_bytes
        return (sum(self.padded_groups(world)) if stage < 3 else self.padded(world)) // world
