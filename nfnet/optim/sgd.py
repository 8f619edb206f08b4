"""SGD with Nesterov momentum, AGC, coupled weight decay and a moving average, in one update (Brock et al. 2021, A.1).

Without `clipping` it works element by element, so it serves unchanged on the flat partitions that ZeRO puts in the place
of parameters; AGC, which needs units, then comes before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from nfnet.kernels import dispatch, reference
from nfnet.kernels.reference import UnitNorms
from nfnet.optim.agc import ClipCounts, coefficients, per_unit, square_sums


@dataclass
class _Work:
    """One parameter group's tensors, in its order."""

    group: dict[str, Any]
    weights: list[torch.Tensor]
    gradients: list[torch.Tensor]
    momenta: list[torch.Tensor]
    averages: list[torch.Tensor]
    fused: ModuleType | None = None
    """The kernels that take these tensors."""
    norms: UnitNorms | None = None

    @property
    def lists(self) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        return self.weights, self.gradients, self.momenta, self.averages


class SGD(torch.optim.Optimizer):
    """g = AGC(g) + decay * w;  m = momentum * m + g;  w -= lr * (g + momentum * m);  ema += (1 - d) * (w - ema)

    with d = min(ema_decay, (1 + t) / (10 + t)) after t earlier updates. The average starts as a copy of the weights
    before their first update. State per parameter: "momentum", "ema" (fp32); per group: "num_updates", a Python int.

    Args:
        ema_decay: None for no average.
        clipping: AGC's lambda, applied to the groups whose "clip" is true (`nfnet.optim.param_groups` sets it); None:
            gradients are taken as they are. If any gradient is not finite, nothing is changed.
        foreach: False takes the plain formulas, the twin that tests compare with.
    """

    counts: ClipCounts | None = None
    """What AGC did in the last step: reading it is the caller's host synchronisation."""

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        ema_decay: float | None = None,
        clipping: float | None = None,
        clipping_eps: float = 1e-3,
        foreach: bool = True,
    ) -> None:
        if lr < 0:
            raise ValueError(f"lr is {lr}; set it to 0 or more")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is {momentum}; set a number from 0 to below 1")
        if clipping is not None and not clipping > 0:
            raise ValueError(f"clipping is {clipping}; set AGC's lambda (0.01 in the paper), or None for no clipping")
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "num_updates": 0, "clip": True}
        super().__init__(params, defaults)
        self.ema_decay, self.clipping, self.clipping_eps, self.foreach = ema_decay, clipping, clipping_eps, foreach

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [self._gather(group) for group in self.param_groups]
        work = [w for w in work if w.weights]
        finite = self._measure(work) if self.clipping else None
        clipped = {id(w): self._apply(w, finite) for w in work}
        if finite is not None:
            self.counts = _counts(work, clipped)
        for w in work:  # ZeRO stage 3 calls once a group, the others being empty then
            w.group["num_updates"] += 1
        return loss

    def _gather(self, group: dict[str, Any]) -> _Work:
        weights = [p for p in group["params"] if p.grad is not None]
        work = _Work(
            group,
            weights,
            [p.grad for p in weights],
            [self._state(p, "momentum", torch.zeros_like) for p in weights],
            [self._state(p, "ema", torch.clone) for p in weights] if self.ema_decay is not None else [],
        )
        if weights and self.foreach:
            work.fused = dispatch.for_update(*work.lists)
        return work

    def _state(self, weight: torch.Tensor, key: str, make: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        state = self.state[weight]
        if key not in state:
            state[key] = make(weight.detach().float())
        tensor: torch.Tensor = state[key]
        return tensor

    def _measure(self, work: list[_Work]) -> torch.Tensor:
        """Norms of every group's units; whether all gradients are finite, (): asked before anything changes."""
        for w in work:
            if w.fused is not None:
                w.norms = w.fused.unit_norms(w.weights, w.gradients)
            elif self.foreach:
                sums = square_sums(w.gradients)
                weights = square_sums(w.weights) if w.group["clip"] else torch.empty(0)
                w.norms = UnitNorms(weights, sums, (~sums.isfinite()).sum(dtype=torch.int32))
            else:
                w.norms = reference.unit_norms(w.weights, w.gradients)
        return reference.all_finite([w.norms for w in work if w.norms is not None])

    def _apply(self, work: _Work, finite: torch.Tensor | None) -> torch.Tensor:
        """The update of a group; how many units were clipped, ()."""
        group, t = work.group, work.group["num_updates"]
        clipping = self.clipping if group["clip"] else None
        numbers = {
            "lr": group["lr"],
            "momentum": group["momentum"],
            "weight_decay": group["weight_decay"],
            "clipping": clipping,
            "eps": self.clipping_eps,
            "keep": min(self.ema_decay or 0.0, (1 + t) / (10 + t)),
            "norms": work.norms,
            "finite": finite,
        }
        if work.fused is None and self.foreach:
            return _foreach(work, **numbers)
        clipped: torch.Tensor = (work.fused or reference).update_(*work.lists, **numbers)
        return clipped


def _foreach(
    work: _Work,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    clipping: float | None,
    eps: float,
    keep: float,
    norms: UnitNorms | None,
    finite: torch.Tensor | None,
) -> torch.Tensor:
    """Many tensors a call; a tensor that tells "not finite" makes every change zero instead of waiting for the host."""
    weights, gradients, momenta, averages = work.lists
    go: float | torch.Tensor = 1.0
    num_clipped = torch.zeros((), dtype=torch.int32, device=weights[0].device)
    if clipping and norms is not None:
        factors = coefficients(norms.weight_squares, norms.gradient_squares, clipping, eps)
        num_clipped = (factors < 1).sum(dtype=torch.int32)
        gradients = list(torch._foreach_mul(gradients, per_unit(factors, gradients)))
    if finite is not None:
        go = finite.float()
        num_clipped = num_clipped * finite
        # 0 * inf is NaN, so what is not finite is taken out and not multiplied away.
        gradients = [torch.where(finite, g, 0.0) for g in gradients]
    torch._foreach_mul_(momenta, momentum if finite is None else 1 - (1 - momentum) * go)
    torch._foreach_add_(momenta, gradients)
    if weight_decay:
        # The decay's share of the gradient, added to both sums in place: no copy of the gradients is made.
        torch._foreach_add_(momenta, weights if finite is None else torch._foreach_mul(weights, go), alpha=weight_decay)
        torch._foreach_mul_(weights, 1 - lr * weight_decay * go)
    torch._foreach_add_(weights, gradients, alpha=-lr)
    moved = momenta if finite is None else torch._foreach_mul(momenta, go)
    torch._foreach_add_(weights, moved, alpha=-lr * momentum)
    if averages:
        wide = [w.float() for w in weights]
        if finite is None:
            torch._foreach_lerp_(averages, wide, 1 - keep)
        else:
            steps = torch._foreach_sub(wide, averages)
            torch._foreach_mul_(steps, (1 - keep) * go)
            torch._foreach_add_(averages, steps)
    return num_clipped


def _counts(work: list[_Work], clipped: dict[int, torch.Tensor]) -> ClipCounts:
    groups, nonfinite = {}, []
    for i, w in enumerate(work):
        assert w.norms is not None
        nonfinite.append(w.norms.num_nonfinite)
        if w.group["clip"]:
            groups[w.group.get("name", str(i))] = (clipped[id(w)], len(w.norms.gradient_squares))
    return ClipCounts.of(groups, torch.stack(nonfinite).sum())
