"""Rules: which parameters are decayed, which are clipped, at what share of the rate. By name and shape only.

As the paper and its code have it (Brock et al. 2021, A.1; `experiment_nfnets.py`): no decay on gains, biases and
SkipInit gains; AGC on everything but the classifier's weight (its bias is clipped).
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

HEAD = "head."
"""Prefix of the classifier's parameters in every network of this package."""


@dataclass(frozen=True)
class Rule:
    name: str
    decay: bool
    clip: bool
    is_head: bool
    matches: Callable[[str, torch.Tensor], bool]


def _is_vector(name: str, parameter: torch.Tensor) -> bool:
    """Gains, biases, SkipInit gains; also the affine vectors of normalisers in networks to compare with.

    By name too: some networks (timm's) keep gains as (C, 1, 1, 1).
    """
    return parameter.dim() <= 1 or name.rpartition(".")[2] in ("gain", "bias", "skip_gain")


RULES = (
    Rule("head weight", True, False, True, lambda n, p: n.startswith(HEAD) and not _is_vector(n, p)),
    Rule("head bias", False, True, True, lambda n, p: n.startswith(HEAD) and _is_vector(n, p)),
    Rule("weights", True, True, False, lambda n, p: not n.startswith(HEAD) and not _is_vector(n, p)),
    Rule("vectors", False, True, False, lambda n, p: not n.startswith(HEAD) and _is_vector(n, p)),
)


def assign(named_parameters: Iterable[tuple[str, torch.Tensor]]) -> dict[str, Rule]:
    """The one rule of each parameter. Raises ValueError if one has none, or two."""
    found = {}
    for name, parameter in named_parameters:
        matching = [r for r in RULES if r.matches(name, parameter)]
        if len(matching) != 1:
            names = ", ".join(r.name for r in matching) or "none"
            raise ValueError(f"parameter {name} matches {len(matching)} rules ({names}); each must match exactly one")
        found[name] = matching[0]
    return found


@dataclass(frozen=True)
class Setting:
    """How one parameter is updated."""

    rule: Rule
    scale: float
    """Times the learning rate."""
    decay: bool
    clip: bool


def settings(
    named_parameters: Iterable[tuple[str, torch.Tensor]],
    *,
    head_lr_scale: float = 1.0,
    scales: Mapping[str, float] | None = None,
    undecayed: Collection[str] = (),
    unclipped: Collection[str] = (),
    clip_head: bool = False,
) -> dict[str, Setting]:
    """What the rules say of each parameter, and where a run says otherwise: names whose rate is scaled, that are not decayed or
    not clipped. `clip_head`: the classifier is clipped whole."""
    return {
        name: Setting(
            rule,
            (head_lr_scale if rule.is_head else 1.0) * (scales or {}).get(name, 1.0),
            rule.decay and name not in undecayed,
            (rule.clip or (clip_head and rule.is_head)) and name not in unclipped,
        )
        for name, rule in assign(named_parameters).items()
    }


def param_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.0,
    head_lr_scale: float = 1.0,
    frozen: Iterable[str] = (),
    chosen: Mapping[str, Setting] | None = None,
) -> list[dict[str, Any]]:
    """Groups for an optimiser: `params`, `param_names`, `name`, `lr`, `lr_scale`, `weight_decay`, `clip`.

    Args:
        frozen: prefixes of names ("stem.", "blocks.0.") to leave out, besides what does not require a gradient.
        chosen: of each parameter, in place of what the rules and `head_lr_scale` say.
    Raises:
        ValueError: a prefix that no parameter has, or nothing is left to train.
    """
    prefixes = tuple(frozen)
    unused = [f for f in prefixes if not any(n.startswith(f) for n, _ in model.named_parameters())]
    if unused:
        raise ValueError(f"frozen has {unused[0]!r}, and no parameter's name starts so; take it out or correct it")
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad and not n.startswith(prefixes)]
    if not named:
        raise ValueError("every parameter is frozen; leave at least the head to be trained")
    found = settings(named, head_lr_scale=head_lr_scale) if chosen is None else chosen
    order = [rule.name for rule in RULES]
    groups = []
    for setting in sorted(
        {found[n] for n, _ in named}, key=lambda s: (order.index(s.rule.name), s.scale, s.decay, s.clip)
    ):
        members = [(n, p) for n, p in named if found[n] == setting]
        groups.append(
            {
                "name": setting.rule.name,
                "params": [p for _, p in members],
                "param_names": [n for n, _ in members],
                "lr": lr * setting.scale,
                "lr_scale": setting.scale,
                "weight_decay": weight_decay if setting.decay else 0.0,
                "clip": setting.clip,
            }
        )
    return groups
