"""The plain torch twins: what each kernel must compute, written as the formula and not for speed.

Arithmetic is fp32 (fp64 for fp64 input, so that derivatives can be checked), whatever the tensors' own types.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F

MIN_GRADIENT_NORM = 1e-6
"""AGC's floor of a gradient's norm; the published code's."""
ACTIVATIONS = ("gelu", "gelu_erf", "silu", "relu")
"""What `scaled_activation` knows; "gelu" is the tanh form."""


class Standardised(NamedTuple):
    """What `standardise` returns and its derivative needs."""

    out: torch.Tensor
    """In the weight's shape."""
    mean: torch.Tensor
    """(O,) of each unit."""
    rstd: torch.Tensor
    """(O,) 1 / sqrt(variance * fan_in), floored or with eps, without the gain."""
    floored: torch.Tensor
    """(O,) bool: the floor was active, so the variance has no derivative."""


class UnitNorms(NamedTuple):
    """Sums of squares of a list of tensors, unit after unit: rows where a tensor has two dimensions or more, else one."""

    weight_squares: torch.Tensor
    """(units,) fp32."""
    gradient_squares: torch.Tensor
    """(units,) fp32."""
    num_nonfinite: torch.Tensor
    """() int32: units whose sum of squared gradients is not finite."""


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def standardise(
    weight: torch.Tensor,
    gain: torch.Tensor,
    floor: float = 1e-4,
    added_eps: float | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.preserve_format,
) -> Standardised:
    """gain * (w - mean) * rsqrt(max(var * N, floor)) for each unit (O, ...) over its fan-in N, biased variance.

    Args:
        weight: (O, I, kh, kw), contiguous or channels-last.
        gain: (O,).
        added_eps: a number takes the floor's place: rsqrt((var + added_eps) * N).
        out_dtype: of `out`; None: the weight's.
        memory_format: of `out`: preserve_format, contiguous_format or channels_last.
    """
    fan_in = weight[0].numel()
    var, mean = torch.var_mean(_wide(weight).flatten(1), dim=1, correction=0)
    if added_eps is None:
        floored = var * fan_in < floor
        scaled = (var * fan_in).clamp(min=floor)
    else:
        floored = torch.zeros_like(var, dtype=torch.bool)
        scaled = (var + added_eps) * fan_in
    rstd = scaled.rsqrt()
    out = (_wide(weight) - _per_unit(mean)) * _per_unit(rstd * gain.flatten())
    return Standardised(out.to(out_dtype or weight.dtype, memory_format=memory_format), mean, rstd, floored)


def standardise_backward(
    grad_out: torch.Tensor,
    weight: torch.Tensor,
    gain: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    floored: torch.Tensor,
    *,
    in_place: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Derivatives of a loss by weight (its type and layout) and gain, from that by `standardise(...).out`.

    With x = (w - mean) * rstd, whose squares sum to 1 (or less, with eps):
        grad_gain = sum(g * x)
        grad_weight = gain * rstd * (g - mean(g) - x * sum(g * x)), without the last term where the floor was active.

    `in_place`: `grad_out` is the caller's own and may become the result; nothing here makes use of that.
    """
    grad = _wide(grad_out)
    x = (_wide(weight) - _per_unit(mean)) * _per_unit(rstd)
    along = (grad * x).flatten(1).sum(1)
    removed = x * _per_unit(along.masked_fill(floored, 0.0))
    grad_weight = _per_unit(gain.flatten() * rstd) * (grad - _per_unit(grad.flatten(1).mean(1)) - removed)
    return torch.empty_like(weight).copy_(grad_weight), along.to(gain.dtype).view_as(gain)


def _per_unit(values: torch.Tensor) -> torch.Tensor:
    return values.view(-1, 1, 1, 1)


def scaled_activation(x: torch.Tensor, name: str, factor: float, before: float = 1.0) -> torch.Tensor:
    """f(x * before) * factor in x's type and layout, rounded once. Raises ValueError for a name not in ACTIVATIONS."""
    u = _wide(x) * before
    if name == "gelu":
        y = F.gelu(u, approximate="tanh")
    elif name == "gelu_erf":
        y = F.gelu(u)
    elif name == "silu":
        y = F.silu(u)
    elif name == "relu":
        y = F.relu(u)
    else:
        raise ValueError(f"no fused activation {name!r}; choose one of {', '.join(ACTIVATIONS)}")
    return (y * factor).to(x.dtype)


def scaled_activation_backward(
    grad: torch.Tensor, x: torch.Tensor, name: str, factor: float, before: float = 1.0
) -> torch.Tensor:
    """grad * f'(x * before) * before * factor, in x's type and layout."""
    u = _wide(x) * before
    if name == "gelu":
        # tanh(v) = 2 sigmoid(2 v) - 1 turns 0.5 u (1 + tanh v) into u sigmoid(2 v).
        v = 2 * math.sqrt(2 / math.pi) * (u + 0.044715 * u.pow(3))
        s = torch.sigmoid(v)
        slope = s + u * s * (1 - s) * 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * u.square())
    elif name == "gelu_erf":
        slope = 0.5 * (1 + torch.erf(u * math.sqrt(0.5))) + u * torch.exp(-0.5 * u.square()) / math.sqrt(2 * math.pi)
    elif name == "silu":
        s = torch.sigmoid(u)
        slope = s * (1 + u * (1 - s))
    elif name == "relu":
        slope = (u > 0).to(u.dtype)
    else:
        raise ValueError(f"no fused activation {name!r}; choose one of {', '.join(ACTIVATIONS)}")
    return torch.empty_like(x).copy_(_wide(grad) * slope * (before * factor))


@torch.no_grad()
def unit_norms(params: Sequence[torch.Tensor], grads: Sequence[torch.Tensor]) -> UnitNorms:
    """Of raw weights and gradients, each read once. No host synchronisation."""
    weight_squares, gradient_squares = (
        torch.cat([t.float().reshape(num_units(t), -1).square().sum(1) for t in tensors]) for tensors in (params, grads)
    )
    return UnitNorms(weight_squares, gradient_squares, (~gradient_squares.isfinite()).sum(dtype=torch.int32))


def num_units(tensor: torch.Tensor) -> int:
    return tensor.shape[0] if tensor.dim() > 1 else 1


def all_finite(norms: Sequence[UnitNorms]) -> torch.Tensor:
    """() bool over all groups: what `update_` asks before it changes anything. No host synchronisation."""
    return torch.stack([n.num_nonfinite for n in norms]).sum() == 0


@torch.no_grad()
def update_(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    momenta: Sequence[torch.Tensor],
    averages: Sequence[torch.Tensor],
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    clipping: float | None,
    eps: float,
    keep: float,
    norms: UnitNorms | None = None,
    finite: torch.Tensor | None = None,
) -> torch.Tensor:
    """One parameter group's update: AGC, coupled decay, Nesterov momentum, average; gradients are left as they are.

        g = grad * min(1, clipping * max(|w|, eps) / max(|g|, 1e-6)) + weight_decay * w     by unit
        m = momentum * m + g;  w -= lr * (g + momentum * m);  average += (1 - keep) * (w - average)

    Args:
        averages: empty for none.
        clipping: AGC's lambda; None or 0 leaves gradients unclipped, and needs no norms.
        norms: `unit_norms(params, grads)`.
        finite: () bool; where False, nothing is changed. None: no such question.
    Returns:
        () int32: units clipped, 0 where nothing was changed. No host synchronisation.
    Raises:
        ValueError: clipping without norms.
    """
    go = torch.ones((), dtype=torch.bool, device=params[0].device) if finite is None else finite
    if clipping:
        if norms is None:
            raise ValueError("clipping needs the units' norms; pass norms=unit_norms(params, grads)")
        bound = clipping * norms.weight_squares.sqrt().clamp(min=eps)
        norm = norms.gradient_squares.sqrt()
        clipped = norm > bound
        factors = torch.where(clipped, bound / norm.clamp(min=MIN_GRADIENT_NORM), 1.0)
    else:
        clipped = torch.zeros(1, dtype=torch.bool, device=params[0].device)
        factors = torch.ones(sum(num_units(p) for p in params), device=params[0].device)
    for i, (w, g, factor) in enumerate(zip(params, grads, factors.split([num_units(p) for p in params]), strict=True)):
        g = g.float() * (factor.view(-1, *[1] * (w.dim() - 1)) if w.dim() > 1 else factor.view([]))
        g = g + weight_decay * w
        m = momentum * momenta[i] + g
        new = w - lr * (g + momentum * m)
        momenta[i].copy_(torch.where(go, m, momenta[i]))
        if averages:
            averages[i].copy_(torch.where(go, averages[i] + (1 - keep) * (new - averages[i]), averages[i]))
        w.copy_(torch.where(go, new, w))
    return (clipped & go).sum(dtype=torch.int32)


def clip_and_update_(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    momenta: Sequence[torch.Tensor],
    averages: Sequence[torch.Tensor],
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    clipping: float | None,
    eps: float,
    keep: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`unit_norms`, `all_finite` and `update_` of a single group: (num_clipped, num_units, num_nonfinite), each ()."""
    norms = unit_norms(params, grads)
    num_clipped = update_(
        params,
        grads,
        momenta,
        averages,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        clipping=clipping,
        eps=eps,
        keep=keep,
        norms=norms,
        finite=all_finite([norms]),
    )
    total = torch.full_like(norms.num_nonfinite, len(norms.weight_squares))
    return num_clipped, total, norms.num_nonfinite
