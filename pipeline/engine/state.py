"""The state behind training by name: what is saved, restored, averaged and added up, however it is cut over ranks."""

import math
from collections.abc import Callable, Collection, Iterator

import torch
import torch.distributed as dist

from pipeline.checkpoint.load import Piece
from pipeline.checkpoint.snapshot import DTYPES
from pipeline.distributed import World, gather
from pipeline.engine.buffers import Buffers
from pipeline.engine.fragments import Fragment
from pipeline.engine.optim_config import OptimConfig
from pipeline.engine.optimisers import restored
from pipeline.engine.zero_layout import FragmentLayout, Place

OF_BUFFERS = ("weights", "ema")
"""Kinds of state that buffers have too."""


class NamedState:
    """One rank's part of parameters, their states, and buffers. Every rank calls the same methods."""

    world: World
    optim: OptimConfig
    _optimizer: torch.optim.Optimizer
    _layout: FragmentLayout
    _places: list[Place]
    _shapes: dict[str, tuple[int, ...]]
    """Of parameters."""
    _buffers: Buffers
    _is_sharded: bool

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of state: weights, what the optimiser keeps of them, averages."""
        return ("weights", *self.optim.moments, "ema")

    @property
    def num_updates(self) -> int:
        return int(self._optimizer.param_groups[0].get("num_updates", 0))

    @property
    def has_ema(self) -> bool:
        return self.optim.ema_decay is not None and self.num_updates > 0

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of parameters and buffers."""
        return self._shapes | {name: tuple(tensor.shape) for name, tensor in self._buffers.kept("weights").items()}

    @property
    def buffer_types(self) -> dict[str, str]:
        """Name -> type as safetensors calls it."""
        return {name: DTYPES[tensor.dtype] for name, tensor in self._buffers.kept("weights").items()}

    def _views(self, kind: str, *, create: bool = False) -> Iterator[tuple[Fragment, torch.Tensor]]:
        for place in self._places:
            # Muon keeps other states of matrices than of vectors; in a checkpoint each has all, the others being 0.
            is_empty = self.optim.name == "muon" and kind in self.optim.moments and self.num_updates > 0
            view = place.state_view(self._optimizer, kind, create=create or is_empty)
            if view is not None:
                yield place.fragment, view

    def _buffers_of(self, kind: str) -> dict[str, torch.Tensor]:
        return self._buffers.kept(kind) if kind == "weights" or (kind == "ema" and self.has_ema) else {}

    def local_fragments(self) -> dict[str, torch.Tensor]:
        """This rank's part of the state, "kind/name@start" -> flat tensor, fp32 but for buffers; each element on exactly one
        rank, buffers on the main one."""
        found = {}
        if self._is_sharded or self.world.is_main:
            found = {f"{k}/{f.name}@{f.start}": v.detach() for k in self.kinds for f, v in self._views(k)}
        if self.world.is_main:
            found |= {f"{k}/{n}@0": t.view(-1) for k in OF_BUFFERS for n, t in self._buffers_of(k).items()}
        return found

    def state_sums(self) -> dict[str, float]:
        """By kind: the sum of squares over all ranks, each parameter's times its place in 1..2, so that no two of them can be
        exchanged unnoticed; fp64. A collective."""
        names = list(self.shapes)
        shares = {name: 1 + i / len(names) for i, name in enumerate(names)}
        sums = torch.zeros(2, len(self.kinds), dtype=torch.float64, device=self.world.device)
        for key, fragment in self.local_fragments().items():
            kind, name = key.rpartition("@")[0].split("/", 1)
            values = fragment if fragment.is_floating_point() else fragment.double()
            norm = torch.linalg.vector_norm(values, dtype=torch.float64)
            sums[:, self.kinds.index(kind)] += torch.stack([shares[name] * norm.square(), torch.ones_like(norm)])
        if self.world.size > 1:
            dist.all_reduce(sums)
        return {kind: total for kind, total, num in zip(self.kinds, *sums.tolist(), strict=True) if num}

    def whole_state(self) -> dict[str, torch.Tensor]:
        """All of the state on rank 0, in host memory, as `local_fragments` names it; nothing on the others. A collective."""
        mine = {key.partition("/")[0] for key in self.local_fragments()}
        kinds = set[str]().union(*gather(self.world, mine))
        found = {}
        for kind in (k for k in self.kinds if k in kinds):
            whole = self.gather(kind)
            found.update({f"{kind}/{name}@0": t.cpu() for name, t in whole.items()} if self.world.is_main else {})
        return found

    def restore(self, kinds: Collection[str], fill: Callable[[list[Piece]], None], num_updates: int) -> None:
        """The state of a checkpoint of any number of ranks and any stage.

        Args:
            kinds: what was saved of them; before the first update that is the weights alone.
            fill: writes what was saved to these pieces.
        """
        views = ((k, f, v) for k in self.kinds if k in kinds for f, v in self._views(k, create=True))
        pieces = [Piece(kind, fragment.name, fragment.start, view) for kind, fragment, view in views]
        buffers = ((k, self._buffers.kept(k)) for k in OF_BUFFERS if k in kinds)
        pieces += [Piece(k, name, 0, t.view(-1)) for k, some in buffers for name, t in some.items()]
        fill(pieces)
        for kind in (k for k in self.kinds if k not in kinds):  # what a going back finds is of later updates
            for fragment, view in self._views(kind):
                view.copy_(fragment.weight.view_as(view) if kind == "ema" else torch.zeros_like(view))
        self._buffers.restored(with_averages="ema" in kinds)
        restored(self._optimizer, num_updates)
        self._layout.publish()

    def gather(self, kind: str) -> dict[str, torch.Tensor]:
        """Whole tensors on every rank, copied; buffers too."""
        numels = [math.prod(shape) for shape in self._shapes.values()]
        flat = torch.zeros(sum(numels), device=self.world.device)
        parts = dict(zip(self._shapes, flat.split(numels), strict=True))
        for fragment, view in self._views(kind):
            parts[fragment.name][fragment.start : fragment.start + view.numel()] = view.reshape(-1)
        if self._is_sharded and self.world.size > 1:
            dist.all_reduce(flat)
        whole = {n: parts[n].view(shape) for n, shape in self._shapes.items()}
        return whole | {name: tensor.clone() for name, tensor in self._buffers_of(kind).items()}
