"""What is alive at each moment of a training pass, and what it computes: counted on fake tensors, nothing is allocated.

Forward and backward run once, and every operation is seen. The batch is a prime number of images, so what its size divides
grows with the batch (maps) and what it does not is there for any (standardised weights, gradients on their way): the peak
for any batch is the largest of the sums over all moments.
"""

import sys
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import conv_flop_count, flop_registry

from nfnet.analysis.activation_memory import fake_copy
from nfnet.model import NFNet
from nfnet.optim.losses import label_smoothing_cross_entropy

_KERNELS = "nfnet.kernels.reference"
_IMAGES = 1009
"""A prime that divides no weight's size; nothing is allocated, so it may be large."""


@dataclass(frozen=True)
class StepProfile:
    """Of one micro-batch; parameters are left out, and so is a gradient once it is handed over."""

    constant: tuple[int, ...]
    """Bytes that are alive after each operation, whatever the batch."""
    per_image: tuple[int, ...]
    """And for each image."""
    gradients: tuple[int, ...]
    """Bytes of gradients that the backward pass has handed over by then."""
    multiply_adds: float
    """Of an image, forward and backward pass, what is computed again included."""

    def fullest(self, batch: int, *, weight_of_gradients: float = 0.0) -> tuple[int, int]:
        """(bytes alive, bytes of gradients handed over) at the moment when most is held.

        Args:
            weight_of_gradients: what a byte of a gradient that was handed over counts: 1 where it stays.
        """
        rows = zip(self.constant, self.per_image, self.gradients, strict=True)
        return max(((c + batch * p, g) for c, p, g in rows), key=lambda row: row[0] + weight_of_gradients * row[1])

    def fullest_forward(self, batch: int) -> int:
        """Bytes alive at the fullest moment before any gradient was handed over."""
        rows = zip(self.constant, self.per_image, self.gradients, strict=True)
        return max(c + batch * p for c, p, g in rows if not g)


class _Alive(TorchDispatchMode):
    """Bytes of the storages that operations have made and nobody has dropped yet; operations of arithmetic."""

    def __init__(self, own: set[int]) -> None:
        super().__init__()
        self._own = own
        self._seen: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.now = [0, 0]
        """Whatever the batch, and of its images."""
        self.handed_over = 0
        self.flops = 0.0
        self.rows: list[tuple[int, int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        self.flops += _flops(func, args, kwargs, found)
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                self._enter(tensor.untyped_storage())
        # The fused loops keep nothing on the way; the formulas that stand for them here do.
        if not _in_kernel():
            self.rows.append((self.now[0], self.now[1], self.handed_over))
        return found

    def _enter(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._own or key in self._seen:
            return

        kind = int(size % _IMAGES == 0)

        def drop(_: Any) -> None:
            del self._seen[key]
            self.now[kind] -= size

        self._seen[key] = weakref.ref(storage, drop)
        self.now[kind] += size


@dataclass(frozen=True)
class _Mark:
    """Where a block begins or ends."""

    row: int
    constant: int
    of_images: int
    flops: float


@dataclass
class _Marks:
    forward: list[_Mark] = field(default_factory=list)
    backward: list[_Mark] = field(default_factory=list)


def _flops(func: Any, args: Any, kwargs: Any, found: Any) -> float:
    """Two for each multiply-add."""
    if func._overloadpacket is torch.ops.aten.convolution_backward:
        # torch's own count takes a grouped convolution's weight gradient for that of an ungrouped one.
        grad, x, weight, mask = args[0], args[1], args[2], args[-1]
        return float(conv_flop_count(x.shape, weight.shape, grad.shape) * (mask[0] + mask[1]))
    count = flop_registry.get(func._overloadpacket)
    return 0.0 if count is None else float(count(*args, **kwargs, out_val=found))


def _in_kernel() -> bool:
    frame = sys._getframe(2)
    for _ in range(8):
        if frame.f_globals.get("__name__") == _KERNELS:
            return True
        if frame.f_back is None:
            return False
        frame = frame.f_back
    return False


def step_profile(
    model: nn.Module, px: int, *, precision: str = "fp32", checkpointing: float = 0.0, every: int = 1, in_chans: int = 3
) -> StepProfile:
    """Of a training pass over images (N, in_chans, px, px), with softmax cross-entropy.

    Args:
        model: on any device, the meta device included; it is not touched.
        precision: fp32, or bf16 for autocast over fp32 weights.
        checkpointing: share of the blocks, the first ones, that are computed again in the backward pass.
        every: of these the first, and each that is so many blocks after one.
    Raises:
        ValueError: the network cannot recompute its blocks, or not a part of them.
    """
    is_part = checkpointing < 1 or every > 1
    with FakeTensorMode():
        network: Any = fake_copy(model).train()
        if checkpointing:
            try:
                network.set_grad_checkpointing(True, *([checkpointing, every] if is_part else []))
            except (AttributeError, AssertionError, TypeError):
                part = " a part of" if is_part else ""
                raise ValueError(f"this network cannot recompute{part} its blocks") from None
        repeated = _without_repeats(network)
        alive = _Alive({t.untyped_storage()._cdata for t in (*network.parameters(), *network.buffers())})
        marks = [_mark(alive, block) for block, _ in repeated]

        def hand_over(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            alive.handed_over += parameter.grad.nbytes
            parameter.grad = None

        for parameter in network.parameters():
            parameter.register_post_accumulate_grad_hook(hand_over)
        with alive:
            images = torch.empty(_IMAGES, in_chans, px, px).to(memory_format=torch.channels_last)
            labels = torch.zeros(_IMAGES, dtype=torch.long)
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                logits = network(images)
            label_smoothing_cross_entropy(logits.float(), labels, 0.0).backward()
        alive.rows.append((alive.now[0], alive.now[1], alive.handed_over))
    return _profile(alive, [(block, extra, mark) for (block, extra), mark in zip(repeated, marks, strict=True)])


def _profile(alive: _Alive, repeated: list[tuple[nn.Module, int, _Marks]]) -> StepProfile:
    """With the blocks that were taken out, as if each had run as the one did that was left in: (block, how many, where)."""
    constant, of_images, gradients = ([row[i] for row in alive.rows] for i in range(3))
    flops = alive.flops
    # The first block comes last in the backward pass: what is put in there moves nothing that is still to be repeated.
    for block, extra, marks in repeated:
        (begin, after), (back, end) = marks.forward[:2], marks.backward[:2]
        held = extra * sum(p.nbytes for p in block.parameters())
        flops += extra * (after.flops - begin.flops + end.flops - back.flops)
        again = slice(back.row, end.row)
        alone = constant[again], of_images[again], [g + held for g in gradients[again]]
        for i in range(begin.row, end.row):
            constant[i] += extra * (after.constant - begin.constant)
            of_images[i] += extra * (after.of_images - begin.of_images)
        for i in range(end.row, len(gradients)):
            gradients[i] += held
        for column, rows in zip((constant, of_images, gradients), alone, strict=True):
            column[end.row : end.row] = rows
    return StepProfile(
        constant=tuple(constant),
        per_image=tuple(n // _IMAGES for n in of_images),
        gradients=tuple(gradients),
        multiply_adds=flops / 2 / _IMAGES,
    )


def _without_repeats(network: Any) -> list[tuple[nn.Module, int]]:
    """Of successive blocks alike all but the last become nothing; (block, how many were taken out before it)."""
    blocks: Any = network.blocks if isinstance(network, NFNet) else []
    found: list[tuple[nn.Module, int]] = []
    for i, block in enumerate(blocks):
        after = blocks[i + 1] if i + 1 < len(blocks) else None
        # A block that is computed again is not as one that is not.
        is_again, is_next_again = (n in network.checkpointed for n in (i, i + 1))
        if after is not None and _form(block) == _form(after) and is_again == is_next_again:
            blocks[i] = nn.Identity()
        elif i and isinstance(blocks[i - 1], nn.Identity):
            first = i - 1
            while first and isinstance(blocks[first - 1], nn.Identity):
                first -= 1
            found.append((block, i - first))
    return found


def _form(block: nn.Module) -> list[torch.Size]:
    return [p.shape for p in block.parameters()]


def _mark(alive: _Alive, block: nn.Module) -> _Marks:
    marks = _Marks()

    def note(into: list[_Mark]) -> None:
        into.append(_Mark(len(alive.rows), alive.now[0], alive.now[1], alive.flops))

    def begin(_: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        if len(marks.forward) < 2:
            note(marks.forward)
            inputs[0].register_hook(lambda _: note(marks.backward))

    def end(_: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:  # noqa: ARG001
        if len(marks.forward) < 2:
            note(marks.forward)
            output.register_hook(lambda _: note(marks.backward))

    block.register_forward_pre_hook(begin)
    block.register_forward_hook(end)
    return marks
