"""SGD with Nesterov momentum, coupled weight decay and a moving average, in one pass over memory (Brock et al. 2021, A.1).

It works element by element, so it serves unchanged on the flat partitions that ZeRO puts in the place of parameters. AGC
comes before it (`nfnet.optim.agc`): as gradients that are scaled already, or as a factor for each unit, which this update
applies in the same pass.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from nfnet.kernels import dispatch
from nfnet.kernels.reference import Rates, Tensors
from nfnet.optim.agc import per_unit


def average_keep(ema_decay: float | None, num_updates: int) -> float:
    """How much of a moving average the update after so many keeps; more and more at the beginning."""
    return min(ema_decay or 0.0, (1 + num_updates) / (10 + num_updates))


class SGD(torch.optim.Optimizer):
    """g = factor * g + decay * w;  m = momentum * m + g;  w -= lr * (g + momentum * m);  ema += (1 - d) * (w - ema)

    with d = min(ema_decay, (1 + t) / (10 + t)) after t earlier updates. The average starts as a copy of the weights
    before their first update. State per parameter: "momentum", "ema" (fp32); per group: "num_updates", a Python int,
    since ZeRO stage 3 steps one group after the other.

    Args:
        ema_decay: None for no average.
    """

    factors: Sequence[torch.Tensor] | None = None
    """For the next step: of each parameter group (units of its parameters,) fp32, what the gradient of a unit is multiplied
    with (`nfnet.optim.agc.coefficients`). None: 1."""

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        ema_decay: float | None = None,
    ) -> None:
        if lr < 0:
            raise ValueError(f"lr is {lr}; set it to 0 or more")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is {momentum}; set a number from 0 to below 1")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "num_updates": 0})
        self.ema_decay = ema_decay

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        factors, self.factors = self.factors, None
        for i, group in enumerate(self.param_groups):
            self._update(group, None if factors is None else factors[i])
        return loss

    def _update(self, group: dict[str, Any], factors: torch.Tensor | None) -> None:
        weights = [p for p in group["params"] if p.grad is not None]
        if not weights:  # ZeRO stage 3 calls once a group, the others being empty then
            return
        if factors is not None and len(weights) != len(group["params"]):
            raise ValueError("factors were given for all units of a group, and some of its parameters have no gradient")
        t = group["num_updates"]
        lists = (
            weights,
            [p.grad for p in weights],
            [self._state(p, "momentum", torch.zeros_like) for p in weights],
            [self._state(p, "ema", torch.clone) for p in weights] if self.ema_decay is not None else [],
        )
        fused = dispatch.for_update(*lists)
        update_ = _foreach if fused is None else fused.update_
        update_(
            *lists,
            Rates(group["lr"], group["momentum"], group["weight_decay"], average_keep(self.ema_decay, t)),
            factors,
        )
        group["num_updates"] += 1

    def _state(self, weight: torch.Tensor, key: str, make: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        state = self.state[weight]
        if key not in state:
            state[key] = make(weight.detach().float())
        tensor: torch.Tensor = state[key]
        return tensor


def _foreach(
    weights: Tensors,
    gradients: Tensors,
    momenta: Tensors,
    averages: Tensors,
    rates: Rates,
    factors: torch.Tensor | None = None,
) -> None:
    """As `reference.update_`, many tensors a call: where no kernel serves."""
    lr, momentum, weight_decay, keep = rates
    if factors is not None:
        gradients = list(torch._foreach_mul(gradients, per_unit(factors, gradients)))
    torch._foreach_mul_(momenta, momentum)
    torch._foreach_add_(momenta, gradients)
    if weight_decay:
        # The decay's share of the gradient, added to both sums in place: no copy of the gradients is made.
        torch._foreach_add_(momenta, weights, alpha=weight_decay)
        torch._foreach_mul_(weights, 1 - lr * weight_decay)
    torch._foreach_add_(weights, gradients, alpha=-lr)
    torch._foreach_add_(weights, momenta, alpha=-lr * momentum)
    if averages:
        torch._foreach_lerp_(averages, [w.float() for w in weights], 1 - keep)
