"""What a launch over a whole list of tensors needs: a checked plan of the tensors, and tables of them on the device.

A plan is valid for the very tensor objects it was made of, at the addresses they had; gradients, which are allocated anew,
are looked at each time. So the host spends microseconds where checks cost milliseconds. Which program works on what
depends on shapes alone and is worked out once; a table of addresses is a pure function of them, so a cached one is never stale.
"""

import weakref
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

_TYPES = {torch.float32, torch.bfloat16, torch.float16}
_MOST = 64
"""Plans that are kept: two for each parameter group of each network."""
_plans: "dict[tuple[int, ...], Plan]" = {}


class Plan:
    """Parameters and their states, checked; raises ValueError for what the programs cannot work on."""

    def __init__(self, params: Sequence[torch.Tensor], states: Sequence[Sequence[torch.Tensor]]) -> None:
        if not params:
            raise ValueError("there is no parameter to update; leave empty groups out")
        if len({p.device for p in params}) > 1:
            raise ValueError("the parameters of a group lie on several devices; give one device's at a time")
        if any(p.dtype != torch.float32 for p in params):
            raise ValueError("the update works on fp32 parameters; keep others as fp32 master weights")
        for p in params:
            if not (p.is_contiguous() or (p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last))):
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} has strides {p.stride()}; make it contiguous or channels-last"
                )
        for kind, tensors in zip(("momentum", "average"), states, strict=False):
            _check_states(params, tensors, kind)
        self.device = params[0].device
        self.layout = layout(tuple(p.shape for p in params), self.device)
        # Shapes and strides that gradients have come with and that lie as their parameter does.
        self.known: list[set[tuple[torch.Size, tuple[int, ...]]]] = [{(p.shape, p.stride())} for p in params]
        tensors = [*params, *(s for kind in states for s in kind)]
        self.tensors = [weakref.ref(t) for t in tensors]
        self.addresses = [t.data_ptr() for t in tensors]

    def is_of(self, tensors: Sequence[torch.Tensor]) -> bool:
        return all(r() is t for r, t in zip(self.tensors, tensors, strict=True)) and self.addresses == [
            t.data_ptr() for t in tensors
        ]

    def gradients(self, params: Sequence[torch.Tensor], grads: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Each laid out as its parameter; what is not is copied."""
        if len(params) != len(grads):
            raise ValueError(f"there are {len(params)} parameters and {len(grads)} gradients; give as many")
        types = {g.dtype for g in grads}
        if len(types) > 1 or not types <= _TYPES:
            raise ValueError(f"the gradients are {sorted(map(str, types))}; give one of fp32, bf16 and fp16 for all")
        if {g.device for g in grads} != {self.device}:
            raise ValueError(f"the parameters lie on {self.device} and not all of their gradients do; move them there")
        found = list(grads)
        for i, (g, known) in enumerate(zip(grads, self.known, strict=True)):
            form = (g.shape, g.stride())
            if form in known:
                continue
            if g.shape != params[i].shape:
                raise ValueError(
                    f"a parameter {tuple(params[i].shape)} has a gradient {tuple(g.shape)}; pair them anew"
                )
            if same_layout(g, params[i]):
                known.add(form)
            else:
                found[i] = torch.empty_like(params[i], dtype=g.dtype).copy_(g)
        return found


def plan(params: Sequence[torch.Tensor], *states: Sequence[torch.Tensor]) -> Plan:
    """The plan of the last call with these tensors if it is still true of them, else a new one."""
    tensors = [*params, *(s for kind in states for s in kind)]
    key = tuple(map(id, tensors))
    found = _plans.get(key)
    if found is None or not found.is_of(tensors):
        _plans.pop(key, None)
        if len(_plans) >= _MOST:
            del _plans[next(iter(_plans))]
        found = _plans[key] = Plan(params, states)
    return found


def _check_states(params: Sequence[torch.Tensor], states: Sequence[torch.Tensor], kind: str) -> None:
    if kind == "average" and not states:
        return
    if len(params) != len(states):
        raise ValueError(f"there are {len(params)} parameters and {len(states)} {kind} tensors; give as many")
    for p, s in zip(params, states, strict=True):
        if s.dtype != torch.float32 or s.device != p.device or not same_layout(s, p):
            raise ValueError(
                f"the {kind} of a parameter {tuple(p.shape)} is {s.dtype} on {s.device} with strides {s.stride()}; "
                f"it must be fp32 on {p.device} and lie as the parameter does, with strides {p.stride()}"
            )


def same_layout(tensor: torch.Tensor, like: torch.Tensor) -> bool:
    """Do equal positions lie at equal offsets? (The stride of a dimension of one element means nothing.)"""
    strides = zip(tensor.shape, tensor.stride(), like.stride(), strict=True)
    return tensor.shape == like.shape and all(a == b for n, a, b in strides if n > 1)


SHORT = 128
"""Units up to this length share a program with others."""
TILES = ((16, 64), (2, 512))
"""(units, elements of each) that a program works on at a time, for short units and for the others."""
CHUNK = 8192
"""Elements of a unit after which the update starts another program; a multiple of both tiles' widths."""
MAX_LENGTH = 2**31 - 2 * CHUNK
"""Elements of a unit, and units of a list: the programs count both in int32, and look past the end by less than that."""


class Tile(NamedTuple):
    """One launch."""

    rows: int
    block: int
    length_align: int
    norm_items: torch.Tensor
    """(programs, 4) int32, see `update_programs`: whole units."""
    update_items: torch.Tensor
    """The same, with units cut into chunks."""


class ListLayout(NamedTuple):
    sizes: torch.Tensor
    """(2, tensors) int32: elements of a unit; number of the tensor's first unit."""
    tiles: tuple[Tile, ...]
    num_units: int


@lru_cache(maxsize=64)
def layout(shapes: tuple[torch.Size, ...], device: torch.device) -> ListLayout:
    """Raises ValueError as `check_counts` does."""
    units = torch.tensor([s[0] if len(s) > 1 else 1 for s in shapes])
    lengths = torch.tensor([s.numel() for s in shapes]) // units.clamp(min=1)
    check_counts(int(lengths.max()), int(units.sum()))
    tiles = []
    for (rows, block), chosen in zip(TILES, (lengths <= SHORT, lengths > SHORT), strict=True):
        tensors = torch.nonzero(chosen & (lengths > 0) & (units > 0)).flatten()
        if len(tensors):
            align = next(a for a in (16, 8, 4, 1) if not (lengths[tensors] % a).any())
            whole = _items(tensors, units, torch.ones_like(lengths), rows)
            parts = _items(tensors, units, -(-lengths // CHUNK), rows)
            tiles.append(Tile(rows, block, align, _upload(whole, device), _upload(parts, device)))
    sizes = torch.stack([lengths, units.cumsum(0) - units]).to(torch.int32)
    return ListLayout(_upload(sizes, device), tuple(tiles), int(units.sum()))


def check_counts(length: int, num_units: int) -> None:
    """ValueError for units of so many elements, or so many units, that the programs' int32 would overflow."""
    if max(length, num_units) > MAX_LENGTH:
        raise ValueError(
            f"the GPU's programs count to {MAX_LENGTH} elements of a unit, and as many units, and here are {length} and "
            f"{num_units}; spread the parameters over more processes"
        )


def _items(tensors: torch.Tensor, units: torch.Tensor, chunks: torch.Tensor, rows: int) -> torch.Tensor:
    """Every (tensor, group of `rows` units, chunk), the chunks of a group one after the other."""
    groups = -(-units[tensors] // rows)
    per_tensor = groups * chunks[tensors]
    tensor = tensors.repeat_interleave(per_tensor)
    number = torch.arange(len(tensor)) - (per_tensor.cumsum(0) - per_tensor).repeat_interleave(per_tensor)
    first = number // chunks[tensor] * rows
    count = (units[tensor] - first).clamp(max=rows)
    return torch.stack([tensor, first, count, number % chunks[tensor] * CHUNK], dim=1).to(torch.int32).contiguous()


class Pointers(NamedTuple):
    addresses: torch.Tensor
    """(4, tensors) int64: weights, gradients, momenta, averages; rows that a launch does not read may be missing."""
    align: int
    """Divides every address: 16 or 1."""


@lru_cache(maxsize=64)
def pointers(addresses: tuple[int, ...], device: torch.device) -> Pointers:
    align = 1 if any(a % 16 for a in addresses) else 16
    return Pointers(_upload(torch.tensor(addresses, dtype=torch.int64), device), align)


def _upload(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Without waiting for the device: from pinned memory, which torch keeps until the copy is done."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table.to(device)
