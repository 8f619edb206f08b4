"""What one update did, as numbers: of the whole network, and of each part of it (stem, stage 0, ..., head).

All of it comes from sums of products a unit, which ranks add up in the step's one collective (`pipeline.engine.engine`), so
nothing is read twice for it but where the update's own size is asked for.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

import torch
from torch import nn

import nfnet.optim.agc as agc
from nfnet.optim.param_groups import Setting
from pipeline.engine.fragments import Units
from pipeline.engine.optim_config import OptimConfig


@dataclass(frozen=True, kw_only=True)
class PartStats:
    """What one update did to one part of the network (or to the whole of it), over all ranks."""

    clipped_share: float
    """Units whose gradient clipping scaled down, of the units that it looked at."""
    gradient_norm: float
    """After clipping."""
    weight_norm: float
    """Before the update."""
    update_ratio: float | None
    """Norm of the change of the weights over their norm; None where it was not asked for, or the optimiser is not ours."""


@dataclass(frozen=True, kw_only=True)
class UpdateStats:
    """What all ranks know about one update, after they agreed on it."""

    applied: bool
    loss: float
    accuracy: float
    clipped_share: float
    gradient_norm: float
    stop_requested: bool
    """Some rank was asked to stop."""
    num_samples: int
    """Images that the step saw, on all ranks."""
    num_lost: float
    """Samples that could not be read, on all ranks; infinite where a whole micro-batch could not. Above what was allowed,
    the update is skipped."""
    parts: dict[str, PartStats] = field(default_factory=dict)
    """The same of each part of the network: stem, stage 0, stage 1, ..., final, head."""


def over_updates(updates: list[dict[str, PartStats]]) -> dict[str, dict[str, float | None]]:
    """For a report of at least one update: of each part the mean clipped share, and what the last update did."""
    return {
        name: {
            **asdict(last),
            "clipped_share": sum(u[name].clipped_share for u in updates) / len(updates),
        }
        for name, last in updates[-1].items()
    }


def part_names(network: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Parameter -> "stem", "stage 0", ..., "final" or "head"; a network of another make has its outermost modules."""
    depths = getattr(network, "depths", None) or getattr(getattr(network, "variant", None), "depths", None)
    found = {}
    for name in names:
        first, _, rest = name.removeprefix("trunk.").partition(".")
        if first == "blocks" and depths is not None:
            stage, block = 0, int(rest.partition(".")[0])
            while block >= depths[stage]:
                block, stage = block - depths[stage], stage + 1
            first = f"stage {stage}"
        found[name] = "final" if first == "final_conv" else first
    return found


@dataclass(frozen=True, kw_only=True)
class Sums:
    """From sums of products a unit to numbers of an update, a part of the network at a time.

    The rows of (2, units): weight * weight, gradient * gradient; of (6, units) also gradient * weight, gradient * momentum,
    weight * momentum, momentum * momentum: with the factors c of the clip they give the norm of the coming update

        u = (1 + m) (c g + decay w) + m^2 v        (`nfnet.optim.sgd.SGD`; momentum m, its buffer v)

    before it is made, so nothing waits for it.
    """

    names: list[str]
    part: torch.Tensor
    """(units,) int64: the part of each unit."""
    clip: torch.Tensor
    """(units,) bool: units that clipping looks at."""
    tensor: torch.Tensor
    """(units,) int64: the parameter of each unit."""
    decay: torch.Tensor
    """(units,) weight decay."""
    rate: torch.Tensor
    """(units,) share of the learning rate."""
    momentum: float

    @classmethod
    def of_network(cls, network: nn.Module, chosen: dict[str, Setting], units: Units, optim: OptimConfig) -> "Sums":
        """`chosen`: how each parameter is updated (`pipeline.engine.optimisers.settings`)."""
        parts = part_names(network, list(chosen))
        is_clipped = {n: s.clip if optim.clip.startswith("agc") else optim.clip == "norm" for n, s in chosen.items()}
        names, order = list(dict.fromkeys(parts.values())), {n: float(i) for i, n in enumerate(chosen)}
        return cls(
            names=names,
            part=units.of_each({n: float(names.index(p)) for n, p in parts.items()}).long(),
            clip=units.of_each({n: float(is_clipped[n]) for n in chosen}) > 0,
            tensor=units.of_each(order).long(),
            decay=units.of_each({n: optim.weight_decay * s.decay for n, s in chosen.items()}),
            rate=units.of_each({n: s.scale for n, s in chosen.items()}),
            momentum=optim.momentum,
        )

    def _by_tensor(self, values: torch.Tensor) -> torch.Tensor:
        """(units,) -> (units,): of each unit its parameter's sum."""
        return torch.zeros_like(values).index_add_(0, self.tensor, values)[self.tensor]

    def factors(self, units: torch.Tensor, optim: OptimConfig) -> torch.Tensor:
        """(units,) what the gradient of each is multiplied with."""
        weights, gradients = units[0], units[1]
        ones = torch.ones_like(gradients)
        if optim.clip == "norm":  # as torch.nn.utils.clip_grad_norm_ has it
            return ones * (optim.clip_norm / (gradients.sum().sqrt() + 1e-6)).clamp(max=1.0)
        if not optim.uses_agc:
            return ones
        if optim.clip == "agc_layer":
            weights, gradients = self._by_tensor(weights), self._by_tensor(gradients)
        return torch.where(self.clip, agc.coefficients(weights, gradients, optim.clipping, optim.clipping_eps), ones)

    def of_parts(self, units: torch.Tensor, factors: torch.Tensor, rate: float) -> torch.Tensor:
        """(5, parts): units clipped, units looked at, squares of gradients after clipping, of weights, of the update."""
        ww, gg = units[0], factors.square() * units[1]
        moved = torch.zeros_like(ww)
        if len(units) == 6:
            of_g, of_w, of_v = (1 + self.momentum) * factors, (1 + self.momentum) * self.decay, self.momentum**2
            gw, gv, wv, vv = units[2:].unbind()
            moved = of_g.square() * units[1] + of_w.square() * ww + of_v**2 * vv
            moved = (moved + 2 * (of_g * of_w * gw + of_g * of_v * gv + of_w * of_v * wv)).clamp(min=0.0)
            moved = moved * (rate * self.rate).square()
        rows = torch.stack([(factors < 1).float(), self.clip.float(), gg, ww, moved])
        return torch.zeros(5, len(self.names), device=units.device).index_add_(1, self.part, rows)

    def read(self, numbers: list[float], *, measured: bool) -> tuple[PartStats, dict[str, PartStats]]:
        """Of the whole network and of each part, from `of_parts` on the host."""
        count = len(self.names)
        rows = [numbers[i * count : (i + 1) * count] for i in range(5)]
        parts = {n: _stats([r[i] for r in rows], measured) for i, n in enumerate(self.names)}
        return _stats([sum(r) for r in rows], measured), parts


def _stats(sums: list[float], measured: bool) -> PartStats:
    clipped, units, gradient, weight, moved = sums
    return PartStats(
        clipped_share=clipped / units if units else 0.0,
        gradient_norm=math.sqrt(gradient),
        weight_norm=math.sqrt(weight),
        update_ratio=(math.sqrt(moved / weight) if weight else 0.0) if measured else None,
    )
