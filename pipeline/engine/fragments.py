"""What one update does to the weights: rates, clipping and averaging as numbers.

The arithmetic lives in `nfnet` (AGC, SGD, schedule); here are its settings, and AGC over *fragments*: the contiguous parts
of parameters that this rank updates. Without ZeRO a fragment is a whole parameter; with it, a rank owns a cut of each
flattened group (stages 1 and 2) or of each parameter (stage 3), and a unit (a row of a convolution or linear weight) may lie
on several ranks. Products of norms add up, so one sum over ranks of a few numbers a unit makes the clip, and what is said of
the update, exact wherever the cuts fall.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

import nfnet.optim.agc as agc


@dataclass(frozen=True)
class Fragment:
    """A contiguous part of one parameter that this rank updates."""

    name: str
    shape: tuple[int, ...]
    """Shape of the whole parameter."""
    start: int
    """First element of the part in the flattened parameter."""
    weight: torch.Tensor
    """(numel,) fp32 master weights, a view that the optimiser updates."""
    clip: bool
    """False where AGC leaves the gradient alone (the classifier's weight)."""

    @property
    def num_units(self) -> int:
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def is_whole(self) -> bool:
        return self.weight.numel() == math.prod(self.shape)

    def cuts(self) -> list[tuple[int, int, int, int]]:
        """(first unit, units, start, stop) of the part's pieces: the end of a unit, whole units, the beginning of one."""
        size, stop = math.prod(self.shape) // self.num_units, self.start + self.weight.numel()
        first, last = -(-self.start // size), stop // size
        if first > last:  # within one unit, touching neither of its ends
            return [(last, 1, 0, stop - self.start)]
        pieces = [(first - 1, 1, self.start, first * size), (first, last - first, first * size, last * size)]
        pieces.append((last, 1, last * size, stop))
        return [(u, n, a - self.start, b - self.start) for u, n, a, b in pieces if b > a]

    def split(self, values: torch.Tensor) -> list[torch.Tensor]:
        """Views of the part, or of numbers that lie as it does: one dimension for one unit, else the first is the units."""
        if self.num_units == 1:
            return [values.view(-1)]
        if self.is_whole:
            return [values.view(self.shape) if values.dim() == 1 else values]
        flat = values.view(-1)
        return [flat[a:b].view(n, -1) if n > 1 else flat[a:b] for _, n, a, b in self.cuts()]


class Units:
    """All units of a network, numbered in the order of its parameters, and where this rank's fragments lie among them."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], fragments: Sequence[Fragment], device: torch.device) -> None:
        self.starts: dict[str, int] = {}
        self.count = 0
        for name, shape in shapes.items():
            self.starts[name] = self.count
            self.count += shape[0] if len(shape) > 1 else 1
        self.fragments = list(fragments)
        indices = []
        for f in self.fragments:
            spans = [(0, f.num_units)] if f.is_whole else [(u, n) for u, n, _, _ in f.cuts()]
            indices += [torch.arange(u, u + n) + self.starts[f.name] for u, n in spans]
        self.index = torch.cat(indices).to(device) if indices else torch.zeros(0, dtype=torch.int64, device=device)
        """(rows,) of each row of this rank's pieces, its unit."""

    def of_each(self, values: dict[str, float]) -> torch.Tensor:
        """(units,) from one number a parameter; it is moved to the device once, at the start."""
        ends = [*list(self.starts.values())[1:], self.count]
        parts = [torch.full((b - a,), values[n]) for (n, a), b in zip(self.starts.items(), ends, strict=True)]
        return torch.cat(parts).to(self.index.device)

    def of_parameters(self, names: Sequence[str]) -> torch.Tensor:
        """(units of these parameters,) int64: their units' numbers."""
        ends = dict(zip(self.starts, [*list(self.starts.values())[1:], self.count], strict=True))
        return torch.cat([torch.arange(self.starts[n], ends[n]) for n in names]).to(self.index.device)

    def split(self, tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        return [piece for f, t in zip(self.fragments, tensors, strict=True) for piece in f.split(t)]

    def add_up(self, rows: torch.Tensor) -> torch.Tensor:
        """(units,) from one number for each row of this rank's pieces; units that lie elsewhere get 0."""
        device = self.index.device
        return torch.zeros(self.count, device=device).index_add_(0, self.index, rows.to(device))

    def scale(self, pieces: list[torch.Tensor], factors: torch.Tensor) -> None:
        """Multiply in place each unit's part of the pieces by its factor, (units,)."""
        if pieces:
            torch._foreach_mul_(pieces, agc.per_unit(factors[self.index], pieces))


def products(left: list[torch.Tensor], right: list[torch.Tensor]) -> torch.Tensor:
    """(rows,) fp32: for each row of the pieces the sum of products."""
    if not left:
        return torch.zeros(0)
    if left is right:
        return agc.square_sums(left)
    rows = [(a * b).reshape(agc.num_units(a), -1).sum(1) for a, b in zip(left, right, strict=True)]
    return torch.cat(rows)
