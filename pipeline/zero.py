"""Where the state of each parameter lies: in the optimiser's own tensors, or in ZeRO's flat partitions.

Under ZeRO a parameter group of the optimiser is one flat fp32 tensor, this rank's partition of the group; DeepSpeed's
`_hp_mapping` on a parameter says which part of the parameter that is and where it lies in the flat tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pipeline.update import Fragment


@dataclass(frozen=True)
class Place:
    """A fragment and the optimiser tensor that holds it."""

    fragment: Fragment
    parameter: nn.Parameter
    owner: torch.Tensor
    """The key of the optimiser's state: the parameter itself, or ZeRO's flat partition."""
    offset: int
    """Of the fragment in the flattened owner."""
    group: int

    def state_view(self, optimizer: torch.optim.Optimizer, kind: str, *, create: bool = False) -> torch.Tensor | None:
        """Flat view of the fragment's master weights, momentum or average; None where there is none yet."""
        if kind == "weights":
            return self.fragment.weight
        state = optimizer.state[self.owner]
        if kind not in state:
            if not create:
                return None
            state[kind] = torch.zeros_like(self.owner, dtype=torch.float32)
        return state[kind].view(-1)[self.offset : self.offset + self.fragment.weight.numel()]


def places(
    network: nn.Module, optimizer: torch.optim.Optimizer, zero: Any | None, clip: dict[str, bool]
) -> list[Place]:
    """This rank's fragments, in the order of the network's parameters."""
    group_of: dict[int, int] = {}
    for i, group in enumerate(zero.bit16_groups if zero is not None else [g["params"] for g in optimizer.param_groups]):
        group_of |= {id(p): i for p in group}
    found = []
    for name, parameter in network.named_parameters():
        group = group_of[id(parameter)]
        if zero is None:
            owner, offset, start, numel = parameter, 0, 0, parameter.numel()
        else:
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:  # wholly on other ranks
                continue
            owner = zero.single_partition_of_fp32_groups[group]
            offset, start = mapping.hp_fragment_address.start, mapping.lp_fragment_address.start
            numel = mapping.hp_fragment_address.numel
        weight = owner.detach().view(-1)[offset : offset + numel]
        fragment = Fragment(name, tuple(parameter.shape), start, weight, clip[name])
        found.append(Place(fragment, parameter, owner, offset, group))
    return found


def gradient_pieces(found: list[Place], zero: Any | None) -> list[torch.Tensor]:
    """The gradient of each place, averaged over ranks, shaped as the parameter or flat; writing to it changes the update.

    ZeRO keeps, between the last backward and the step, a list of pieces for each group whose concatenation is the rank's
    partition: a piece is found by its offset, and a piece of another length is an error and not a guess.
    """
    if zero is None:
        missing = [p.fragment.name for p in found if p.parameter.grad is None]
        if missing:
            raise RuntimeError(f"no gradient reached {missing[0]} (and {len(missing) - 1} more parameters)")
        return [p.parameter.grad for p in found]  # type: ignore[misc]
    by_offset: list[dict[int, torch.Tensor]] = []
    for group in range(len(zero.bit16_groups)):
        offset, pieces = 0, {}
        for piece in zero.averaged_gradients[group]:
            pieces[offset] = piece
            offset += piece.numel()
        by_offset.append(pieces)
    out = []
    for place in found:
        piece = by_offset[place.group].get(place.offset)
        if piece is None or piece.numel() != place.fragment.weight.numel():
            raise RuntimeError(
                f"DeepSpeed's partition holds no gradient for {place.fragment.name}; this version is not usable"
            )
        out.append(piece)
    return out
