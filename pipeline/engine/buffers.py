"""What a network keeps besides the parameters that are trained, as part of the state: running statistics, counters, tables,
and parameters that are frozen.

Between two updates these tensors are the same on every rank. A step changes each rank's own; with the update, floating-point
ones move by the mean of what they moved on the ranks, so running statistics are those of the whole batch's micro-batches. A step
that is skipped leaves no trace in them: the statistics of a batch that is not finite would never be finite again. Averaged
weights have averaged statistics; integers (numbers of batches) are copied.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from pipeline.checkpoint.snapshot import DTYPES
from pipeline.errors import UserError


class Buffers:
    """The persistent buffers of a network, and its frozen parameters, on this rank; after its last move to another device."""

    def __init__(self, network: nn.Module, device: torch.device, *, averages: bool) -> None:
        """`averages`: keep their moving average too."""
        self._device = device
        self._frozen = {n: p.detach() for n, p in network.named_parameters() if not p.requires_grad}
        self._owners = _owners(network)
        now = self.now()
        for name, tensor in now.items():
            if tensor.dtype not in DTYPES:
                raise UserError(f"the network keeps {name} as {tensor.dtype}, which is not saved; use another network")
        self._floating = [name for name, tensor in now.items() if tensor.is_floating_point()]
        self._kept = self.copy()
        self.averages = self.copy() if averages else {}

    def kept(self, kind: str) -> dict[str, torch.Tensor]:
        """What a checkpoint holds of "weights" and "ema", to be read and written; frozen parameters are their own average."""
        return self._frozen | (self.now() if kind == "weights" else self.averages)

    def now(self) -> dict[str, torch.Tensor]:
        """By name; looked up each time, since a module may put another tensor in a buffer's place."""
        return {name: getattr(module, key) for name, (module, key) in self._owners.items()}

    def copy(self) -> dict[str, torch.Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.now().items()}

    def put(self, values: dict[str, torch.Tensor]) -> None:
        if values:
            with torch.no_grad():
                torch._foreach_copy_(list(self.now().values()), list(values.values()))

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """What runs inside changes none: a pass that is made for its gradient only, or once more."""
        before = self.copy()
        yield
        self.put(before)

    def moves(self) -> torch.Tensor:
        """(floating-point elements,) fp32: how far this rank's own have moved since the last update."""
        now = self.now()
        parts = [(now[name] - self._kept[name]).flatten().float() for name in self._floating]
        return torch.cat(parts) if parts else torch.zeros(0, device=self._device)

    def applied(self, moves: torch.Tensor | None, keep: float) -> None:
        """The update was applied.

        Args:
            moves: the mean of all ranks' `moves`; None where this rank is alone.
            keep: how much of the averages stays.
        """
        now = self.now()
        if moves is not None:
            sizes = [self._kept[name].numel() for name in self._floating]
            for name, move in zip(self._floating, moves.split(sizes), strict=True):
                now[name].copy_(self._kept[name] + move.view(now[name].shape).to(now[name].dtype))
        if self.averages:
            if self._floating:
                averages, values = ([kind[name] for name in self._floating] for kind in (self.averages, now))
                torch._foreach_lerp_(averages, values, 1 - keep)
            for name in self.averages.keys() - set(self._floating):
                self.averages[name].copy_(now[name])
        if now:
            torch._foreach_copy_(list(self._kept.values()), list(now.values()))

    def skipped(self) -> None:
        """The update was not applied: as if the step had not been."""
        self.put(self._kept)

    def restored(self, *, with_averages: bool) -> None:
        """`now` and `averages` were written from outside; without averages these begin anew."""
        self._kept = self.copy()
        if self.averages and not with_averages:
            self.averages = self.copy()

    def exchange(self) -> None:
        """Let buffers and their averages change places; twice is nothing, bit for bit."""
        if self.averages:
            kept = self.copy()
            self.put(self.averages)
            self.averages = kept


def _owners(network: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Of each persistent buffer its module and its name there. UserError for what else a network would keep."""
    found: dict[str, tuple[nn.Module, str]] = {}
    state = network.state_dict(keep_vars=True)
    parameters = dict(network.named_parameters())
    for prefix, module in network.named_modules():
        for key, tensor in module._buffers.items():
            name = f"{prefix}.{key}" if prefix else key
            if tensor is not None and name in state:
                found[name] = module, key
    others = [name for name in state if name not in found and name not in parameters]
    if others:
        same = next((n for n, p in parameters.items() if p is state[others[0]]), None)
        what = f"is the same tensor as {same}" if same else "is neither a parameter nor a buffer"
        raise UserError(f"the network's {others[0]} {what}, which is not saved and restored here; use another network")
    return found
