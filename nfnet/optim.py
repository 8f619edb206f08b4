"""SGD with Nesterov momentum, coupled weight decay and a moving average, in one update (Brock et al. 2021, A.1).

Element by element and nothing else, so it works unchanged on the flat partitions that ZeRO puts in the place of
parameters. AGC, which needs units, comes before it and works on gradients; this leaves gradients as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


class SGD(torch.optim.Optimizer):
    """g += decay * w;  m = momentum * m + g;  w -= lr * (g + momentum * m);  ema += (1 - d) * (w - ema)

    with d = min(ema_decay, (1 + t) / (10 + t)) after t earlier updates. The average starts as a copy of the weights
    before their first update. State per parameter: "momentum", "ema" (fp32); per group: "num_updates", a Python int.

    Args:
        ema_decay: None for no average.
        foreach: False takes the plain loop, the twin that tests compare with.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        ema_decay: float | None = None,
        foreach: bool = True,
    ) -> None:
        if lr < 0:
            raise ValueError(f"lr is {lr}; set it to 0 or more")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is {momentum}; set a number from 0 to below 1")
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "num_updates": 0}
        super().__init__(params, defaults)
        self.ema_decay, self.foreach = ema_decay, foreach

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if weights:
                self._update(group, weights)
            group["num_updates"] += 1
        return loss

    def _update(self, group: dict[str, Any], weights: list[torch.Tensor]) -> None:
        gradients = [p.grad for p in weights if p.grad is not None]
        momenta = [self._state(p, "momentum", torch.zeros_like) for p in weights]
        averages = [self._state(p, "ema", torch.clone) for p in weights] if self.ema_decay is not None else []
        t = group["num_updates"]
        keep = min(self.ema_decay or 0.0, (1 + t) / (10 + t))
        apply = self._foreach if self.foreach else self._plain
        apply(weights, gradients, momenta, averages, group["lr"], group["momentum"], group["weight_decay"], keep)

    def _state(self, weight: torch.Tensor, key: str, make: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        state = self.state[weight]
        if key not in state:
            state[key] = make(weight.detach().float())
        tensor: torch.Tensor = state[key]
        return tensor

    @staticmethod
    def _foreach(
        weights: list[torch.Tensor],
        gradients: list[torch.Tensor],
        momenta: list[torch.Tensor],
        averages: list[torch.Tensor],
        lr: float,
        momentum: float,
        decay: float,
        keep: float,
    ) -> None:
        torch._foreach_mul_(momenta, momentum)
        torch._foreach_add_(momenta, gradients)
        if decay:
            # The decay's share of the gradient, added to both sums in place: no copy of the gradients is made.
            torch._foreach_add_(momenta, weights, alpha=decay)
            torch._foreach_mul_(weights, 1 - lr * decay)
        torch._foreach_add_(weights, gradients, alpha=-lr)
        torch._foreach_add_(weights, momenta, alpha=-lr * momentum)
        if averages:
            torch._foreach_lerp_(averages, [w.float() for w in weights], 1 - keep)

    @staticmethod
    def _plain(
        weights: list[torch.Tensor],
        gradients: list[torch.Tensor],
        momenta: list[torch.Tensor],
        averages: list[torch.Tensor],
        lr: float,
        momentum: float,
        decay: float,
        keep: float,
    ) -> None:
        for i, (w, g, m) in enumerate(zip(weights, gradients, momenta, strict=True)):
            g = g + decay * w
            m.mul_(momentum).add_(g)
            w.sub_(lr * (g + momentum * m))
            if averages:
                averages[i].mul_(keep).add_((1 - keep) * w)
