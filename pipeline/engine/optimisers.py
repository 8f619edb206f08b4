"""The optimiser of a run by name, of torch or timm, with what this engine adds to each: an average and a count of updates.

    sgd        ours (`nfnet.optim.sgd`)         "momentum"
    momentum   torch's SGD, without Nesterov    "momentum_buffer"
    adamw      torch's                          "exp_avg", "exp_avg_sq"
    lion       timm's                           "exp_avg"
    lamb       timm's                           "exp_avg", "exp_avg_sq"
    muon       timm's; AdamW for vectors        "momentum_buffer", "exp_avg", "exp_avg_sq"

Their states have the names by which checkpoints know them. What works element by element serves on ZeRO's flat partitions
unchanged; LAMB and Muon need whole parameters, so they run without ZeRO.
"""

import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from nfnet.optim.param_groups import Setting, param_groups
from nfnet.optim.param_groups import settings as choose
from nfnet.optim.sgd import SGD, average_keep
from pipeline.engine.optim_config import OptimConfig
from pipeline.engine.update_stats import part_names
from pipeline.errors import UserError


def freeze(network: nn.Module, optim: OptimConfig) -> None:
    """Before anything else sees the network."""
    parameters = dict(network.named_parameters())
    for name in _named(network, list(parameters), optim.frozen, "optim.frozen"):
        parameters[name].requires_grad_(False)
    if not any(p.requires_grad for p in parameters.values()):
        raise UserError("optim.frozen names all of the network; leave at least the head to be trained")


def settings(network: nn.Module, optim: OptimConfig) -> dict[str, Setting]:
    """Of each parameter that is trained, by its part, its layer and its name. UserError for a pattern that fits none."""
    named = [(n, p) for n, p in network.named_parameters() if p.requires_grad]
    names = [n for n, _ in named]
    scales = dict.fromkeys(names, 1.0)
    if optim.layer_decay < 1:
        numbers = layer_numbers(network)
        last = max(numbers[n] for n in names)
        scales = {n: optim.layer_decay ** (last - numbers[n]) for n in names}
    for text in optim.rate_scales:
        pattern, _, number = text.rpartition("=")
        for name in _named(network, names, (pattern.strip(),), "optim.rate_scales"):
            scales[name] *= float(number)
    undecayed = network.no_weight_decay() if hasattr(network, "no_weight_decay") else ()  # type: ignore[operator]
    return choose(
        named,
        head_lr_scale=optim.head_learning_rate_scale,
        scales=scales,
        undecayed=undecayed,
        unclipped=_named(network, names, optim.unclipped, "optim.unclipped"),
        clip_head=optim.clip_head,
    )


def layer_numbers(network: nn.Module) -> dict[str, int]:
    """Parameter -> its layer: 0 for the stem, one more for each block, and the head last. A network of another make says so
    itself (`layer_numbers`)."""
    if hasattr(network, "layer_numbers"):
        found: dict[str, int] = network.layer_numbers()  # type: ignore[operator]
        return found
    numbers = {}
    for name, _ in network.named_parameters():
        block = re.match(r"blocks\.(\d+)\.", name)
        numbers[name] = int(block[1]) + 1 if block else 0 if name.startswith("stem") else -1
    deepest = max(numbers.values())
    ends = {"final_conv": deepest + 1, "head": deepest + 2}
    return {n: number if number >= 0 else ends.get(n.partition(".")[0], deepest + 1) for n, number in numbers.items()}


def _named(network: nn.Module, names: list[str], words: Sequence[str], field: str) -> set[str]:
    """The parameters that parts of the network or patterns name."""
    parts = part_names(network, names)
    found = set()
    for word in words:
        fitting = {n for n in names if parts[n] == word or fnmatchcase(n, word)}
        if not fitting:
            known = ", ".join(dict.fromkeys(parts.values()))
            raise UserError(
                f"{field} has {word!r}, which is no part of the network ({known}) and fits no parameter's name"
            )
        found |= fitting
    return found


def make(network: nn.Module, chosen: dict[str, Setting], optim: OptimConfig) -> torch.optim.Optimizer:
    """For the parameters that are trained; with `ema_decay`, and "num_updates" in each group."""
    groups = param_groups(network, lr=optim.learning_rate, weight_decay=optim.weight_decay, chosen=chosen)
    if optim.name == "sgd":
        return SGD(groups, lr=optim.learning_rate, momentum=optim.momentum, ema_decay=optim.ema_decay)
    kind, arguments = _kind(optim)
    made: Any = _averaged(kind)
    made = made(groups, lr=optim.learning_rate, **arguments)
    made.ema_decay = optim.ema_decay
    for group in made.param_groups:
        group["num_updates"] = 0
    found: torch.optim.Optimizer = made
    return found


def _kind(optim: OptimConfig) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    betas = {"betas": (optim.momentum, optim.second_momentum)}
    if optim.name == "momentum":
        return torch.optim.SGD, {"momentum": optim.momentum}
    if optim.name == "adamw":
        return torch.optim.AdamW, {**betas, "eps": optim.epsilon}
    try:
        from timm.optim import Lamb, Lion, Muon
    except ImportError:
        raise UserError(
            f"optim.name is {optim.name}, which is timm's, and timm is not installed; pip install timm"
        ) from None
    if optim.name == "lion":
        return Lion, betas
    if optim.name == "lamb":  # clipping is ours to do
        return Lamb, {**betas, "eps": optim.epsilon, "max_grad_norm": None}
    return Muon, {"momentum": optim.momentum, "betas": (0.9, optim.second_momentum)}


def _averaged(kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    class Averaged(kind):  # type: ignore[misc, valid-type]
        """With the moving average of `nfnet.optim.sgd.SGD`."""

        @torch.no_grad()
        def step(self, closure: Callable[[], float] | None = None) -> float | None:
            updated = [(g, [p for p in g["params"] if p.grad is not None]) for g in self.param_groups]
            if self.ema_decay is not None:
                for p in (p for _, some in updated for p in some if "ema" not in self.state[p]):
                    # The library makes its own states where there is none at all, so this one must wait.
                    self._first[p] = p.detach().clone()
            loss: float | None = super().step(closure)
            for group, weights in ((g, some) for g, some in updated if some):
                if self.ema_decay is not None:
                    for p in weights:
                        if p in self._first:
                            self.state[p]["ema"] = self._first.pop(p)
                    averages = [self.state[p]["ema"] for p in weights]
                    torch._foreach_lerp_(averages, weights, 1 - average_keep(self.ema_decay, group["num_updates"]))
                group["num_updates"] += 1
            return loss

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._first: dict[torch.Tensor, torch.Tensor] = {}
            super().__init__(*args, **kwargs)

    return Averaged


def restored(optimizer: torch.optim.Optimizer, num_updates: int) -> None:
    """After the states were written from outside: the counts that libraries keep next to them."""
    for group in optimizer.param_groups:
        group["num_updates"] = num_updates
        if "grad_averaging" in group:  # LAMB's
            group["step"] = torch.tensor(float(num_updates))
    for state in optimizer.state.values():
        if "exp_avg_sq" in state:
            state["step"] = torch.tensor(float(num_updates))
