"""Compiled passes in the place of an engine's eager ones, and back.

    network     network and loss are one graph in training, the network one in evaluation
    blocks      each kind of block is one graph: blocks that differ in weights, in beta and in the rate of stochastic depth alone
                share it, since these are its inputs

A graph that breaks is no graph (`fullgraph`). Parameters and buffers keep their names, so a checkpoint cannot tell.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from nfnet.network import Network
from pipeline.errors import UserError

BACKEND = "inductor"
"""Of torch.compile."""
OPTIONS: dict[str, Any] = {
    "fallback_random": True,  # as eager passes draw them: a step is a function of its seed, compiled or not
    "force_layout_optimization": True,  # channels-last on a GPU too, where few channels would be turned to NCHW
}
GRAPHS = 64
"""Of one function, at most; torch's own limit of 8 is for functions that meet one network."""


class CompiledPasses:
    """Of one engine. Nothing is compiled before the first pass."""

    def __init__(self, *, cuda_graphs: bool) -> None:
        self._cuda_graphs = cuda_graphs
        self._replaced: list[tuple[Any, str, Any]] = []
        self._hooks: list[Any] = []

    def install(
        self, objective: nn.Module, network: nn.Module, *, by: str, gradients_add_up: bool, evaluation_batch: int
    ) -> None:
        """
        Args:
            objective: the network with its loss (`Objective`).
            by: "network" or "blocks".
            gradients_add_up: those of several passes, before they are used.
            evaluation_batch: images of each evaluating pass: fewer are filled up, more are cut.
        """
        wrap = functools.partial(
            torch.compile,
            fullgraph=True,
            dynamic=False,
            backend=BACKEND,
            options={**OPTIONS, "triton.cudagraphs": self._cuda_graphs} if BACKEND == "inductor" else None,
            recompile_limit=GRAPHS,
            isolate_recompiles=True,
        )
        parts: Any = objective
        logits = parts.logits
        if by == "network":
            logits = wrap(logits)
            self._replace(objective, "losses", wrap(parts.losses))
        else:
            self._compile_blocks(blocks_of(network), wrap)
        self._replace(objective, "logits", in_batches_of(evaluation_batch, logits))
        if self._cuda_graphs and gradients_add_up:
            # A recorded graph writes into the same memory each time, and gradients that wait there would be overwritten.
            self._hooks = [p.register_hook(torch.clone) for p in network.parameters() if p.requires_grad]

    def _compile_blocks(self, blocks: list[nn.Module], wrap: Callable[..., Any]) -> None:
        kinds: dict[Any, None] = dict.fromkeys(map(type, blocks))
        forwards = {kind: wrap(kind.forward) for kind in kinds}
        for block in blocks:
            device = next(block.parameters()).device
            for owner, name in getattr(block, "own_numbers", ()):
                number = getattr(owner, name)
                if number != 1.0:  # which is no operation
                    self._replace(owner, name, torch.tensor(number, device=device))
            self._replace(block, "forward", functools.partial(forwards[type(block)], block))

    def _replace(self, owner: Any, name: str, value: Any) -> None:
        self._replaced.append((owner, name, vars(owner).get(name)))
        setattr(owner, name, value)

    def remove(self) -> None:
        """Everything as it was."""
        for owner, name, before in reversed(self._replaced):
            if before is None:  # a method of its class
                delattr(owner, name)
            else:
                setattr(owner, name, before)
        for hook in self._hooks:
            hook.remove()
        self._replaced, self._hooks = [], []


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """UserError for a network that has no list of them."""
    if not isinstance(network, Network):
        raise UserError("engine.compile is blocks, and only our own networks say what theirs are; set it to network")
    return list(network.blocks)


def in_batches_of(size: int, logits: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """The same for any number of images, asked for `size` at a time: another number would be another graph. The last ones are
    filled up with copies, whose logits are thrown away."""

    def run(images: torch.Tensor) -> torch.Tensor:
        found = []
        for part in images.split(size):
            filled = torch.cat([part, part[:1].expand(size - len(part), -1, -1, -1)]) if len(part) < size else part
            # A copy, since a recorded graph writes its next output over this one.
            found.append(logits(filled.contiguous(memory_format=torch.channels_last))[: len(part)].clone())
        return torch.cat(found)

    return run
