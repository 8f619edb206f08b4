"""Plain torch references: what each kernel must compute, written as the formula and not for speed.

Arithmetic is fp32 (fp64 for fp64 input, so that derivatives can be checked), whatever the tensors' own types.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F

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
    in_place: bool = False,  # noqa: ARG001
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


Tensors = list[torch.Tensor]


class Rates(NamedTuple):
    """Of one update of a parameter group."""

    lr: float
    momentum: float
    weight_decay: float
    keep: float
    """Share of the average that stays."""


def num_units(tensor: torch.Tensor) -> int:
    """Rows where a tensor has two dimensions or more, else one."""
    return tensor.shape[0] if tensor.dim() > 1 else 1


def square_sums(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """(all units,) fp32: the sum of squares of each unit of each tensor, in their order. No host synchronisation."""
    return torch.cat([t.float().reshape(num_units(t), -1).square().sum(1) for t in tensors])


@torch.no_grad()
def update_(
    params: Tensors,
    grads: Tensors,
    momenta: Tensors,
    averages: Tensors,
    rates: Rates,
    factors: torch.Tensor | None = None,
) -> None:
    """One parameter group's update: coupled decay, Nesterov momentum, average; gradients are left as they are.

        g = factor * grad + weight_decay * w     by unit
        m = momentum * m + g;  w -= lr * (g + momentum * m);  average += (1 - keep) * (w - average)

    Args:
        averages: empty for none.
        factors: (all units,) fp32, what the clip scales each unit's gradient with (`nfnet.optim.agc.coefficients`); None: 1.
    """
    of_each = [1.0] * len(params) if factors is None else factors.split([num_units(p) for p in params])
    for i, (w, g, factor) in enumerate(zip(params, grads, of_each, strict=True)):
        if isinstance(factor, torch.Tensor):
            factor = factor.view(-1, *[1] * (w.dim() - 1)) if w.dim() > 1 else factor.view([])
        g = g.float() * factor + rates.weight_decay * w
        momenta[i].copy_(rates.momentum * momenta[i] + g)
        w.sub_(rates.lr * (g + rates.momentum * momenta[i]))
        if averages:
            averages[i].lerp_(w, 1 - rates.keep)
