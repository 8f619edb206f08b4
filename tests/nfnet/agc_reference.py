"""AGC as the paper writes it (Brock et al. 2021, equation 3), one unit after the other: what tests compare with."""

from collections.abc import Iterable

import torch
from torch import nn

from nfnet.optim.param_groups import assign


@torch.no_grad()
def factors(weight: torch.Tensor, gradient: torch.Tensor, clipping: float = 0.01, eps: float = 1e-3) -> torch.Tensor:
    """(units,) what a parameter's gradient is multiplied with."""
    found = []
    for w, g in zip(*(list(t.unbind(0)) if t.dim() > 1 else [t] for t in (weight, gradient)), strict=True):
        bound, norm = clipping * max(w.norm().item(), eps), g.norm().item()
        found.append(bound / max(norm, 1e-6) if norm > bound else 1.0)
    return torch.tensor(found)


@torch.no_grad()
def adaptive_clip_grad_(
    named_parameters: Iterable[tuple[str, nn.Parameter]], clipping: float = 0.01, eps: float = 1e-3
) -> None:
    named = list(named_parameters)
    rules = assign(named)
    for name, parameter in named:
        if parameter.grad is None or not rules[name].clip:
            continue
        scale = factors(parameter, parameter.grad, clipping, eps)
        parameter.grad.mul_(scale.view(-1, *[1] * (parameter.dim() - 1)) if parameter.dim() > 1 else scale.view([]))
