"""Tables on the device that let one launch work on a whole list of tensors.

Which program works on what depends on shapes alone and is worked out once. Addresses change when gradients are allocated
anew; a table is a pure function of the addresses it holds, so a cached one is never stale.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

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


class Layout(NamedTuple):
    sizes: torch.Tensor
    """(2, tensors) int32: elements of a unit; number of the tensor's first unit."""
    tiles: tuple[Tile, ...]
    num_units: int


@lru_cache(maxsize=64)
def layout(shapes: tuple[torch.Size, ...], device: torch.device) -> Layout:
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
    return Layout(_upload(sizes, device), tuple(tiles), int(units.sum()))


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
