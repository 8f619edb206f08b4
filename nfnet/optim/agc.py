"""Adaptive gradient clipping as pure functions (Brock et al. 2021, section 4, equation 3; code `nfnets/optim.py`).

For each unit i (a row of a convolution or linear weight; a vector or scalar is one unit)

    G_i <- G_i * clipping * max(|W_i|, eps) / max(|G_i|, 1e-6)    where |G_i| > clipping * max(|W_i|, eps)

with norms of the raw weights, not of the standardised ones. `nfnet.optim.param_groups` decides which parameters are clipped.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from nfnet.kernels import dispatch
from nfnet.kernels.reference import num_units
from nfnet.optim.param_groups import assign

MIN_GRADIENT_NORM = 1e-6


class ClipCounts(NamedTuple):
    """Zero-dimensional tensors on the gradients' device; reading them is the caller's host synchronisation."""

    num_clipped: torch.Tensor
    num_units: torch.Tensor
    num_nonfinite: torch.Tensor
    """Units whose gradient is not finite; if there is one, nothing was changed."""
    groups: dict[str, tuple[torch.Tensor, int]]
    """(units clipped, units seen) of each group of parameters, by the name of its rule."""

    @classmethod
    def of(cls, groups: dict[str, tuple[torch.Tensor, int]], num_nonfinite: torch.Tensor) -> "ClipCounts":
        clipped = torch.stack([c for c, _ in groups.values()]).sum() if groups else torch.zeros_like(num_nonfinite)
        # torch.full and not torch.tensor: the latter copies from the host and waits for the copy.
        total = torch.full((), sum(n for _, n in groups.values()), device=num_nonfinite.device)
        return cls(clipped, total, num_nonfinite, groups)


def coefficients(
    weight_squares: torch.Tensor, gradient_squares: torch.Tensor, clipping: float, eps: float = 1e-3
) -> torch.Tensor:
    """(units,) factors in (0, 1] for the gradients, from the units' sums of squares.

    The core: sums of squares add up over the parts of a unit, so ZeRO's fragments reach it through one reduction.
    A gradient that is not finite gets a factor that is not finite or 1; callers look at the sums first.
    """
    bound = clipping * weight_squares.sqrt().clamp(min=eps)
    norm = gradient_squares.sqrt()
    return torch.where(norm > bound, bound / norm.clamp(min=MIN_GRADIENT_NORM), torch.ones_like(norm))


@torch.no_grad()
def adaptive_clip_grad_(
    named_parameters: Iterable[tuple[str, nn.Parameter]], clipping: float = 0.01, eps: float = 1e-3
) -> ClipCounts:
    """Clip gradients in place, unit by unit; the classifier's weight is left alone (by name: `nfnet.optim.param_groups`).

    Costs no host synchronisation. If any gradient is not finite (the classifier's included), all are left as they are.

    Raises:
        ValueError: no parameter to be clipped has a gradient: silence here would mean training without AGC.
    """
    named = [(n, p) for n, p in named_parameters if p.grad is not None]
    rules = assign(named)
    chosen: dict[str, list[nn.Parameter]] = {}
    for n, p in named:
        if rules[n].clip:
            chosen.setdefault(rules[n].name, []).append(p)
    if not chosen:
        raise ValueError("no gradient to clip; call this after backward, on parameters that still hold their .grad")
    clipped = [p for group in chosen.values() for p in group]
    gradients = [p.grad for p in clipped if p.grad is not None]
    spared = [p.grad for n, p in named if not rules[n].clip and p.grad is not None]
    squares = square_sums(gradients + spared)
    finite = torch.isfinite(squares)
    weights = square_sums(clipped)
    factors = coefficients(weights, squares[: len(weights)], clipping, eps)
    factors = torch.where(finite.all(), factors, torch.ones_like(factors))
    torch._foreach_mul_(gradients, per_unit(factors, gradients))
    units = [sum(num_units(p) for p in group) for group in chosen.values()]
    counts = [(part < 1).sum() for part in factors.split(units)]
    return ClipCounts.of(dict(zip(chosen, zip(counts, units, strict=True), strict=True)), (~finite).sum())


def per_unit(factors: torch.Tensor, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """(all units,) -> for each tensor its units' factors, in its type, shaped to be multiplied with it."""
    parts = factors.split([num_units(t) for t in tensors])
    return [
        f.to(t.dtype).view(-1, *[1] * (t.dim() - 1)) if t.dim() > 1 else f.to(t.dtype).view([])
        for f, t in zip(parts, tensors, strict=True)
    ]


def square_sums(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """(all units,) fp32 sums of squares in the tensors' order."""
    fused = dispatch.for_square_sums(tensors)
    if fused is not None:
        sums: torch.Tensor = fused.square_sums(tensors)
        return sums
    # Most are gains, biases and scalars: one call serves all of them. A norm reads a tensor once and keeps no squared copy.
    vectors = [i for i, t in enumerate(tensors) if t.dim() <= 1]
    of_vectors = torch._foreach_norm([tensors[i] for i in vectors], 2, dtype=torch.float32) if vectors else []
    found = dict(zip(vectors, (n.view(1) for n in of_vectors), strict=True))
    norms = [
        found[i] if i in found else torch.linalg.vector_norm(t.reshape(len(t), -1), dim=1, dtype=torch.float32)
        for i, t in enumerate(tensors)
    ]
    return torch.cat(norms).square()
