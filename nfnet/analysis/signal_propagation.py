"""Signal propagation: how activations' statistics travel through the residual blocks (Brock et al. 2021a, section 3).

Works on this package's networks and on others that build residual networks the common way (torchvision, timm). Blocks are
modules whose class is called `...Block`, `...Bottleneck` or `...Basic`, else those that the network names itself (timm's
`group_matcher`: EfficientNet, MobileNet). Looked for in them are a child `conv_shortcut`, `downsample` or `shortcut` (the
shortcut's own layers; its presence makes the block a transition) and a child `drop_path` (what it reads is the end of the
branch; without one, the end is what the last other child returns, an activation after the sum excepted). A block must hold its
layers as direct children. This package's blocks tell by themselves (`Block.watch`).
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from nfnet.block import Block

BLOCK = re.compile(r"(Block|Bottleneck|Basic)$")
SHORTCUTS = ("conv_shortcut", "downsample", "shortcut")
DROPPER = "drop_path"


@dataclass(frozen=True)
class SignalPropagation:
    """Index 0 is before the first block, i after block i; `residual_variance` has one entry a block."""

    squared_mean: list[float]
    """mean_c( mean_nhw(x)^2 )"""
    variance: list[float]
    """mean_c( var_nhw(x) )"""
    residual_variance: list[float]
    """mean_c( var_nhw(f) ) at the end of the branch, before stochastic depth, SkipInit gain and alpha."""
    transitions: list[bool] = field(default_factory=list)
    """Which blocks have layers on their shortcut: each begins a stage."""


def residual_blocks(model: nn.Module) -> list[nn.Module]:
    """In order of registration; blocks within blocks are skipped. Raises ValueError if there is none."""
    found: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        if BLOCK.search(type(module).__name__) and any(
            getattr(m, "weight", None) is not None for m in module.modules()
        ):
            found.append(module)
            return
        for child in module.children():
            visit(child)

    visit(model)
    found = found or _named_blocks(model)
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no residual blocks: no module's class is called ...Block, ...Bottleneck or ...Basic, "
            "and the network names none itself"
        )
    return found


def _named_blocks(model: nn.Module) -> list[nn.Module]:
    """What timm's networks say of themselves: patterns of the names of their blocks. Single layers (VGG's) are none."""
    matcher = getattr(model, "group_matcher", None)
    declared = matcher(coarse=False).get("blocks", ()) if callable(matcher) else ()
    patterns = [declared] if isinstance(declared, str) else [pattern for pattern, order in declared if order is None]
    return [
        module
        for name, module in model.named_modules()
        if any(re.fullmatch(pattern, name) for pattern in patterns)
        and sum(getattr(m, "weight", None) is not None for m in module.modules()) > 1
    ]


def channels_last(shape: torch.Size) -> bool:
    """Whether a block gives tokens (N, tokens, C) or (N, H, W, C), as transformers do."""
    return len(shape) != 4 or (shape[1] == shape[2] != shape[3])


def shortcut_of(block: nn.Module) -> nn.Module | None:
    """The layers on a block's shortcut, if it has any."""
    found = (getattr(block, name, None) for name in SHORTCUTS)
    return next((m for m in found if isinstance(m, nn.Module) and not isinstance(m, nn.Identity)), None)


@torch.no_grad()
def signal_propagation(model: nn.Module, images: torch.Tensor) -> SignalPropagation:
    """Statistics of one forward pass, after the sum of each block (and before an activation that follows it).

    In evaluation mode, but batch normalisation takes the statistics of this batch, as it does in training; its running
    ones are neither used nor changed.

    Args:
        images: (N, in_chans, H, W), unit-variance noise or real ones. `open_branches` first, to see the branches.
    Raises:
        ValueError: no residual blocks are found.
    """
    blocks = residual_blocks(model)
    watches = [_Watch(block) for block in blocks]
    before: list[tuple[torch.Tensor, torch.Tensor]] = []
    hooks = [blocks[0].register_forward_pre_hook(lambda _, inputs: before.append(_statistics(inputs[0])))]
    with _measuring(model):
        try:
            model(images)
        finally:
            for hook in hooks:
                hook.remove()
            for watch in watches:
                watch.remove()
    sums = [*before, *(w.sum for w in watches)]
    return SignalPropagation(
        [s.item() for s, _ in sums],
        [v.item() for _, v in sums],
        [w.branch[1].item() for w in watches],
        [shortcut_of(b) is not None for b in blocks],
    )


class _Watch:
    """Reads the end of a block's branch and its sum as they pass; at once, since timm models go on in place."""

    def __init__(self, block: nn.Module) -> None:
        self.sum: Any = None
        self.branch: Any = None
        self._before_activation: Any = None
        shortcut = shortcut_of(block)
        self._hooks = [block.register_forward_hook(self._block)]
        self._own = block if isinstance(block, Block) else None
        if self._own is not None:
            self._own.watch = self._end
            return
        for name, child in block.named_children():
            if child is shortcut:
                continue
            if name == DROPPER:
                self._hooks.append(child.register_forward_pre_hook(self._dropper))
            elif _is_activation(child):
                self._hooks.append(child.register_forward_pre_hook(self._activation))
                self._hooks.append(child.register_forward_hook(self._activated))
            else:
                self._hooks.append(child.register_forward_hook(self._layer))

    def _end(self, branch: torch.Tensor) -> None:
        self.branch = _statistics(branch)

    def _dropper(self, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self.branch = _statistics(inputs[0])

    def _layer(self, module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        self.branch = _statistics(output)

    def _activation(self, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self._before_activation = (_statistics(inputs[0]), None)

    def _activated(self, module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        self._before_activation = (self._before_activation[0], output)

    def _block(self, module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        # Conv-BN-ReLU networks: the block's output is its last activation's; the sum is what that one read.
        ends_in_activation = self._before_activation is not None and self._before_activation[1] is output
        self.sum = self._before_activation[0] if ends_in_activation else _statistics(output)
        self._before_activation = None

    def remove(self) -> None:
        if self._own is not None:
            self._own.watch = None
        for hook in self._hooks:
            hook.remove()


def _is_activation(module: nn.Module) -> bool:
    return type(module).__module__ == "torch.nn.modules.activation"


def _statistics(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Average channel squared mean and average channel variance of (N, C, H, W)."""
    if channels_last(x.shape):
        raise ValueError(
            f"signal propagation is defined for maps of channels, not for {tuple(x.shape)}: tokens or channels last"
        )
    var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
    return mean.square().mean(), var.mean()


@contextmanager
def _measuring(model: nn.Module) -> Iterator[None]:
    """Evaluation mode with this batch's statistics in batch normalisation; every flag as it was afterwards."""
    training = {m: m.training for m in model.modules()}
    tracking = {m: m.track_running_stats for m in model.modules() if isinstance(m, _BatchNorm)}
    model.eval()
    for norm in tracking:
        norm.training, norm.track_running_stats = True, False
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag
        for norm, flag in tracking.items():
            norm.track_running_stats = flag


@torch.no_grad()
def open_branches(model: nn.Module, gain: float = 1.0) -> None:
    """Set SkipInit gains to `gain`, and so each gain inside a block that starts at zero in its place (timm, torchvision)."""
    for block in residual_blocks(model):
        for name, parameter in block.named_parameters():
            last = name.rpartition(".")[2]
            is_closed = last in ("weight", "gain") and not bool(parameter.any())
            if last in ("skip_gain", "skipinit_gain") or is_closed:
                parameter.fill_(gain)
