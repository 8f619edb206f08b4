"""What one update does to the weights: rates, clipping and averaging as numbers.

The arithmetic lives in `nfnet` (AGC, SGD, schedule); here are its settings, and AGC over *fragments*: the contiguous parts
of parameters that this rank updates. Without ZeRO a fragment is a whole parameter; with it, a rank owns a cut of each
flattened group (stages 1 and 2) or of each parameter (stage 3), and a unit (a row of a convolution or linear weight) may lie
on several ranks. Products of norms add up, so one sum over ranks of a few numbers a unit makes the clip, and what is said of
the update, exact wherever the cuts fall.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

import nfnet.agc as agc
from nfnet.schedule import learning_rate, step_rate
from pipeline.duration import Duration
from pipeline.errors import UserError


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """SGD with Nesterov momentum, AGC, linear warm-up and cosine decay, EMA (Brock et al. 2021, section 4 and A.1)."""

    learning_rate: float
    """Peak rate, as it is used: the papers' 0.1 * global_batch / 256 is `nfnet.schedule.linear_scaling`."""
    warmup: Duration = field(default_factory=lambda: Duration(0, "steps"))
    final_learning_rate: float = 0.0
    schedule: Literal["cosine", "steps"] = "cosine"
    """After the warm-up: half a cosine to final_learning_rate; or a tenth of the rate after each of decay_steps (BiT)."""
    decay_steps: tuple[int, ...] = ()
    """Rising numbers of updates, for steps."""
    momentum: float = 0.9
    weight_decay: float = 0.0
    """Coupled: added to the gradient after clipping; not applied to gains, biases and SkipInit gains."""
    clipping: float = 0.01
    """AGC's lambda; 0 switches AGC off."""
    clipping_eps: float = 1e-3
    ema_decay: float | None = None
    """None = no averaged weights; evaluation then uses the raw ones."""
    label_smoothing: float = 0.0
    head_learning_rate_scale: float = 1.0
    sam_rho: float = 0.0
    """SAM's radius, each rank's micro-batch perturbing with its own gradient; 0 = no SAM. The fine-tuned NFNet-F4+: 0.05."""
    sam_share: float = 0.2
    """Of a micro-batch, that the ascent reads (Brock et al. 2021, A.4)."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise UserError(f"optim.learning_rate is {self.learning_rate}; set a positive number")
        if list(self.decay_steps) != sorted(set(self.decay_steps)) or (self.schedule == "steps") != bool(
            self.decay_steps
        ):
            raise UserError(
                f"optim.decay_steps is {list(self.decay_steps)} with optim.schedule {self.schedule}; give rising numbers of "
                "updates for the schedule steps, and none for cosine"
            )
        if self.clipping < 0:
            raise UserError(f"optim.clipping is {self.clipping}; set AGC's lambda (0.01 in the paper), or 0 for none")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise UserError(f"optim.ema_decay is {self.ema_decay}; set a number from 0 to below 1, or none")
        if not (math.isfinite(self.sam_rho) and self.sam_rho >= 0):
            raise UserError(f"optim.sam_rho is {self.sam_rho}; set SAM's radius (0.05 in the papers), or 0 for no SAM")
        if not 0 < self.sam_share <= 1:
            raise UserError(
                f"optim.sam_share is {self.sam_share}; set a share of the micro-batch above 0 and at most 1"
            )

    def rate(self, step: int, *, total_steps: int, warmup_steps: int) -> float:
        if self.schedule == "steps":
            return step_rate(step, warmup_steps=warmup_steps, peak=self.learning_rate, decay_steps=self.decay_steps)
        return learning_rate(
            step,
            total_steps=total_steps,
            warmup_steps=warmup_steps,
            peak=self.learning_rate,
            final=self.final_learning_rate,
        )


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
