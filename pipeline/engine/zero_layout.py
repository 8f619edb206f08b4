"""Where the state of each parameter lies: in the optimiser's own tensors, or in ZeRO's flat partitions.

Stage 0 leaves parameters alone. In stages 1 and 2 a parameter group of the optimiser is one flat fp32 tensor, this rank's
partition of the group; DeepSpeed's `_hp_mapping` on a parameter says which part of it that is and where it lies in the flat
tensor. In stage 3 each parameter is cut into as many equal parts as there are ranks (the last ones padded), and a group's
flat tensor holds this rank's parts one after the other.

What the library has no public way for is read from its attributes; a version without them is refused by name and number.
"""

import importlib.metadata
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pipeline.engine.fragments import Fragment
from pipeline.errors import UserError

NOBODY = -1
"""The number of no module."""


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
    index: int = 0
    """Of the parameter in its group."""

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


class FragmentLayout(ABC):
    """One ZeRO stage's way to hold master weights and gradients."""

    needs: tuple[str, ...] = ()
    """Attributes of the library's optimiser that are read or called here."""

    def __init__(self, engine: Any, optimizer: torch.optim.Optimizer) -> None:
        self.zero, self.optimizer = engine.optimizer, optimizer
        missing = [a for a in self.needs if not hasattr(self.zero, a)]
        if missing:
            raise UserError(_unknown(f"its optimiser has no {missing[0]}"))

    @abstractmethod
    def owners(self) -> list[torch.Tensor]:
        """The tensors that the optimiser updates on this rank."""

    @abstractmethod
    def place(self, name: str, parameter: nn.Parameter, shape: tuple[int, ...], *, clip: bool) -> Place | None:
        """This rank's fragment of a parameter; None if it lies wholly on other ranks."""

    @abstractmethod
    def gradients(self, found: list[Place]) -> list[torch.Tensor]:
        """Of each place, averaged over ranks, shaped as the parameter or flat; writing to them changes the update."""

    @abstractmethod
    def discard(self) -> None:
        """Forget the gradients of a step, as if its batches had not been seen."""

    @abstractmethod
    def publish(self) -> None:
        """Make the network compute with master weights that were written from outside."""

    @contextmanager
    def whole(self, network: nn.Module) -> Iterator[bool]:  # noqa: ARG002
        """All weights lie whole on every rank inside; yields whether what is written to them is forgotten afterwards."""
        yield False

    def exchange(self, kind: str) -> None:
        """Let master weights and another state of the same size change places; twice is nothing, bit for bit."""
        for owner in self.owners():
            other = self.optimizer.state[owner].get(kind)
            if other is not None:  # a partition that holds padding only may have none
                kept = owner.detach().clone()
                owner.detach().copy_(other.view_as(owner))
                other.copy_(kept.view_as(other))
        self.publish()


class Whole(FragmentLayout):
    """Stage 0: every rank holds everything."""

    def owners(self) -> list[torch.Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def place(self, name: str, parameter: nn.Parameter, shape: tuple[int, ...], *, clip: bool) -> Place:
        return Place(Fragment(name, shape, 0, parameter.detach().view(-1), clip), parameter, parameter, 0, 0)

    def gradients(self, found: list[Place]) -> list[torch.Tensor]:
        missing = [p.fragment.name for p in found if p.parameter.grad is None]
        if missing:
            raise RuntimeError(f"no gradient reached {missing[0]} (and {len(missing) - 1} more parameters)")
        return [p.parameter.grad for p in found]  # type: ignore[misc]

    def discard(self) -> None:
        self.zero.zero_grad(set_to_none=True)

    def publish(self) -> None:
        pass


class Flat(FragmentLayout):
    """Stages 1 and 2: a rank holds a part of each flattened group."""

    needs = (
        "bit16_groups",
        "single_partition_of_fp32_groups",
        "averaged_gradients",
        "all_grad_tensors",
        "update_lp_params",
    )

    def __init__(self, engine: Any, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(engine, optimizer)
        self._group_of = {id(p): i for i, group in enumerate(self.zero.bit16_groups) for p in group}

    def owners(self) -> list[torch.Tensor]:
        return list(self.zero.single_partition_of_fp32_groups)

    def place(self, name: str, parameter: nn.Parameter, shape: tuple[int, ...], *, clip: bool) -> Place | None:
        if not hasattr(parameter, "_hp_mapping"):
            raise UserError(_unknown("its parameters have no _hp_mapping"))
        if parameter._hp_mapping is None:
            return None
        group, mapping = self._group_of[id(parameter)], parameter._hp_mapping
        owner, offset = self.zero.single_partition_of_fp32_groups[group], mapping.hp_fragment_address.start
        weight = owner.detach().view(-1)[offset : offset + mapping.hp_fragment_address.numel]
        return Place(
            Fragment(name, shape, mapping.lp_fragment_address.start, weight, clip), parameter, owner, offset, group
        )

    def gradients(self, found: list[Place]) -> list[torch.Tensor]:
        """Between the last backward and the step the library keeps, for each group, pieces whose concatenation is the
        partition: a piece is found by its offset, and one of another length is an error and not a guess."""
        by_offset: dict[int, dict[int, torch.Tensor]] = {}
        for group, pieces in self.zero.averaged_gradients.items():
            offset = 0
            for piece in pieces or ():
                by_offset.setdefault(group, {})[offset] = piece
                offset += piece.numel()
        out = []
        for place in found:
            if place.group not in by_offset:
                raise RuntimeError(f"no gradient reached {place.fragment.name}")
            held = by_offset[place.group].get(place.offset)
            if held is None or held.numel() != place.fragment.weight.numel():
                raise UserError(_unknown(f"its partition holds no gradient of {place.fragment.name}"))
            out.append(held)
        return out

    def discard(self) -> None:
        for group in self.zero.averaged_gradients:
            self.zero.averaged_gradients[group] = None
            self.zero.all_grad_tensors[group] = None
        self.zero.zero_grad(set_to_none=True)

    def publish(self) -> None:
        self.zero.update_lp_params()


class Cut(FragmentLayout):
    """Stage 3: a rank holds a part of each parameter, of weights as of everything else."""

    needs = (
        "fp16_groups",
        "fp16_partitioned_groups_flat",
        "fp32_partitioned_groups_flat",
        "grad_position",
        "get_param_id",
        "averaged_gradients",
        "checkpoint_event_prologue",
        "checkpoint_event_epilogue",
        "_get_norm_groups",
    )

    def __init__(self, engine: Any, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(engine, optimizer)
        # Norms that all ranks have agreed on already: the library's cost a collective, a pass over all gradients, and a wait
        # for the device, and no setting switches them off at this stage.
        self.zero._get_norm_groups = lambda: [torch.zeros(())]
        self._index = {id(p): i for group in self.zero.fp16_groups for i, p in enumerate(group)}

    def owners(self) -> list[torch.Tensor]:
        return list(self.zero.fp32_partitioned_groups_flat)

    def place(self, name: str, parameter: nn.Parameter, shape: tuple[int, ...], *, clip: bool) -> Place | None:
        group, offset, numel = self.zero.grad_position[self.zero.get_param_id(parameter)]
        size = math.prod(shape)
        if numel != -(-size // dist.get_world_size()):
            raise UserError(_unknown(f"it cut {name} of {size} elements into parts of {numel}"))
        start = dist.get_rank() * numel
        held = min(numel, size - start)
        if held <= 0:
            return None
        owner = self.zero.fp32_partitioned_groups_flat[group]
        fragment = Fragment(name, shape, start, owner.detach()[offset : offset + held], clip)
        return Place(fragment, parameter, owner, offset, group, self._index[id(parameter)])

    def gradients(self, found: list[Place]) -> list[torch.Tensor]:
        out = []
        for place in found:
            pieces = self.zero.averaged_gradients.get(place.group)
            if not pieces:
                raise RuntimeError(f"no gradient reached {place.fragment.name}")
            out.append(pieces[place.index].view(-1)[: place.fragment.weight.numel()])
        return out

    def discard(self) -> None:
        for pieces in self.zero.averaged_gradients.values():
            for piece in pieces or ():
                piece.zero_()  # the library's own buffer: a part that the next step does not write must not keep a NaN
        self.zero.averaged_gradients.clear()
        self.zero.zero_grad(set_to_none=True)

    def publish(self) -> None:
        """The network's partitions are those of the master weights (of which they are copies on some devices, on others the
        same memory); what was gathered from older ones goes: small parameters stay gathered between steps."""
        self.zero.checkpoint_event_prologue()
        for used, master in zip(
            self.zero.fp16_partitioned_groups_flat, self.zero.fp32_partitioned_groups_flat, strict=True
        ):
            used.detach().copy_(master.detach())
        self.zero.checkpoint_event_epilogue()

    @contextmanager
    def whole(self, network: nn.Module) -> Iterator[bool]:
        """Gathered once for all passes inside, at the price of whole fp32 weights on every rank for as long.

        The library releases a weight after each pass of its module, unless another module is using it: here one that does
        not exist uses all of them. The partitions stay what they are, so a rank may write to its own gathered copies.
        """
        import deepspeed

        weights: list[Any] = list(network.parameters())
        if not all(isinstance(getattr(w, "ds_active_sub_modules", None), set) for w in weights):
            raise UserError(_unknown("its parameters have no set ds_active_sub_modules"))
        self.zero.checkpoint_event_prologue()  # the gathering waits for nothing that is still under way
        with deepspeed.zero.GatheredParameters(weights):
            places = [w.data_ptr() for w in weights]
            for weight in weights:
                weight.ds_active_sub_modules.add(NOBODY)
            # One rank alone is given its partition itself, and no copy of it.
            parts = {w.ds_tensor.untyped_storage().data_ptr() for w in weights}
            try:
                yield parts.isdisjoint(w.untyped_storage().data_ptr() for w in weights)
            finally:
                moved = [
                    n for (n, w), place in zip(network.named_parameters(), places, strict=True) if w.data_ptr() != place
                ]
                for weight in weights:
                    weight.ds_active_sub_modules.discard(NOBODY)
        self.zero.checkpoint_event_epilogue()
        if moved:
            raise UserError(_unknown(f"it released {moved[0]} while that was in use"))


def layout(engine: Any, optimizer: torch.optim.Optimizer, stage: int) -> FragmentLayout:
    """For an engine that was just initialised."""
    if stage == 0:
        return Whole(engine, optimizer)
    return Cut(engine, optimizer) if stage == 3 else Flat(engine, optimizer)


def _unknown(what: str) -> str:
    version = importlib.metadata.version("deepspeed")
    return (
        f"deepspeed {version} keeps its partitions in a way that this engine does not know ({what}); "
        "install the version of constraints.txt, or set engine.zero_stage to 0"
    )
