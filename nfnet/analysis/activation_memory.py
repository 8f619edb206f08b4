"""Memory of activations in training: what autograd keeps between the forward and the backward pass.

Counted, not estimated: the network runs on fake tensors, which have sizes but no contents, and every tensor that is saved
for the backward pass is seen. Nothing is allocated.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from nfnet.analysis.signal_propagation import residual_blocks


@dataclass(frozen=True)
class ActivationMemory:
    """Bytes that a training step keeps, without parameters and buffers."""

    kept: int
    """Between the forward and the backward pass."""
    checkpointed: int | None
    """The same with activation checkpointing; None: the network cannot."""
    largest_block: int
    """With checkpointing this comes on top while the block that keeps most is computed again; 0 where no block is found."""


class SavedBytes:
    """Distinct storages that autograd saved while it was listening; views of one storage are one."""

    def __init__(self, model: nn.Module) -> None:
        tensors = [*model.parameters(), *model.buffers()]
        self._own = {t.untyped_storage()._cdata for t in tensors}
        self._seen: dict[int, torch.UntypedStorage] = {}  # holding a storage keeps its address from being used again
        self.total = 0

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._own and storage._cdata not in self._seen:
            self._seen[storage._cdata] = storage
            self.total += storage.nbytes()
        # A node that keeps its own output would never be freed: no garbage collector sees through it.
        return tensor.detach()


@contextmanager
def saved_bytes(model: nn.Module) -> Iterator[SavedBytes]:
    """Counts what a forward pass of `model` inside the block saves."""
    counter = SavedBytes(model)
    with torch.autograd.graph.saved_tensors_hooks(counter.add, lambda saved: saved):
        yield counter


def activation_memory(
    model: nn.Module, px: int, *, batch: int = 1, in_chans: int = 3, precision: str = "fp32"
) -> ActivationMemory:
    """Of one training forward pass of (batch, in_chans, px, px), without the loss.

    Args:
        model: on any device, the meta device included; it is not touched.
        precision: fp32, or bf16 for autocast over fp32 weights.
    Raises:
        ValueError: an unknown precision.
    """
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"precision is {precision!r}; choose fp32 or bf16")
    images = (batch, in_chans, px, px)
    kept, largest = _forward(model, images, precision, checkpointing=False)
    try:
        checkpointed = _forward(model, images, precision, checkpointing=True)[0]
    except (AttributeError, AssertionError):  # it has no `set_grad_checkpointing`, or one that says so (VGG's)
        return ActivationMemory(kept, None, largest)
    return ActivationMemory(kept, checkpointed, largest)


def _forward(model: nn.Module, shape: tuple[int, ...], precision: str, *, checkpointing: bool) -> tuple[int, int]:
    """Bytes kept of the whole network, and of the block that keeps most."""
    with FakeTensorMode():
        fake: Any = fake_copy(model).train()
        if checkpointing:
            fake.set_grad_checkpointing(True)
        images = torch.empty(shape).to(memory_format=torch.channels_last)
        starts: list[int] = []
        shares: list[int] = []
        with saved_bytes(fake) as counter:
            for block in _blocks(fake):
                block.register_forward_pre_hook(lambda *_: starts.append(counter.total))
                block.register_forward_hook(lambda *_: shares.append(counter.total - starts[-1]))
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                output = fake(images)
        del output  # until here, so that nothing saved was given back before it was counted
    return counter.total, max(shares, default=0)


def _blocks(model: nn.Module) -> list[nn.Module]:
    try:
        return residual_blocks(model)
    except ValueError:
        return []


def fake_copy(model: nn.Module) -> nn.Module:
    """A copy without contents, whatever device the model is on."""

    def empty(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype)

    memo: dict[int, torch.Tensor] = {id(b): empty(b) for b in model.buffers()}
    memo |= {id(p): nn.Parameter(empty(p), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo)
