"""Averages of weights: over checkpoints of a run, over runs that were fine-tuned from one start, and between two.

    uniform   the mean of all (Izmailov et al. 2018, without a cycle of rates; Wortsman et al. 2022, "Model soups", section 2)
    greedy    from the best on held-out data on, each is kept whose joining does not lower that accuracy (the same, Recipe 1)
    wise      (1 - alpha) first + alpha second, alpha chosen on held-out data (Wortsman et al. 2022, WiSE-FT, equation 1)

What the members have in common is compared before anything is computed. Sums are taken in float64.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from pipeline.errors import UserError
from pipeline.export.source import ExportSource, preprocessing
from pipeline.models.backbone import make

Method = Literal["uniform", "greedy", "wise"]
ALPHAS = tuple(n / 10 for n in range(11))
_STATISTICS = re.compile(r"(?:^|\.)running_(?:mean|var)$")


@dataclass(frozen=True, kw_only=True)
class Score:
    """On held-out data."""

    top1: float
    loss: float

    @property
    def order(self) -> tuple[float, float]:
        """Larger is better: accuracy, and of equals the lower cross-entropy."""
        return self.top1, -self.loss


Measure = Callable[[nn.Module], Score]


@dataclass(frozen=True, kw_only=True)
class Average:
    source: ExportSource
    """The first member's, with the averaged weights; no evaluation of a member stays with it."""
    facts: dict[str, Any]
    """For `export.json`: method, members with their shares and scores, curve."""
    score: Score | None


def average(
    members: Sequence[ExportSource], method: Method, measure: Measure | None = None, *, alpha: float | None = None
) -> Average:
    """The average of the members by a method.

    Args:
        measure: of a network on held-out data; uniform, and wise with `alpha`, do without.
    Raises:
        UserError: members that do not fit together, or networks whose averages need more than weights.
    """
    _check(members, method)
    states = [member.model.state_dict() for member in members]
    scores = [measure(member.model) if measure else None for member in members]
    shares = [1 / len(states)] * len(states)
    curve: list[dict[str, float]] = []
    if method == "wise":
        chosen, curve = (alpha, []) if alpha is not None else _chosen_alpha(members[0], states, measure)
        shares = [1 - chosen, chosen]
    elif method == "greedy":
        shares = _greedy(members[0], states, scores, measure)
    made = with_state(members[0], mean(states, shares))
    score = measure(made.model) if measure else None
    rows = [
        {
            "url": member.commit.url,
            "digest": member.commit.digest,
            "weights": member.weights,
            "step": member.commit.step,
            "share": share,
            "top1": one.top1 if one else None,
            "loss": one.loss if one else None,
        }
        for member, share, one in zip(members, shares, scores, strict=True)
    ]
    facts: dict[str, Any] = {"method": method, "members": rows, "curve": curve, "data": None}
    facts |= {"top1": score.top1 if score else None, "loss": score.loss if score else None}
    return Average(source=made, facts=facts, score=score)


def mean(states: Sequence[dict[str, torch.Tensor]], shares: Sequence[float]) -> dict[str, torch.Tensor]:
    """The weighted mean, by name, in the tensors' own types; what is no floating-point number is the first one's.

    A share of 0 leaves a state out altogether, so that what it holds does not matter.
    """
    used = [(state, share) for state, share in zip(states, shares, strict=True) if share]
    found = {}
    for name, first in states[0].items():
        if not first.is_floating_point():
            found[name] = first.clone()
            continue
        total = torch.zeros(first.shape, dtype=torch.float64)
        for state, share in used:
            total += share * state[name].double()
        found[name] = total.to(first.dtype)
    return found


def with_state(like: ExportSource, state: dict[str, torch.Tensor]) -> ExportSource:
    """A network of the same make with other weights."""
    with torch.random.fork_rng(devices=[]):
        model = make(like.name, len(like.commit.classes), like.options)
    model.load_state_dict(state)
    return replace(like, model=model.eval(), commit=replace(like.commit, evaluation={}))


def _chosen_alpha(
    like: ExportSource, states: Sequence[dict[str, torch.Tensor]], measure: Measure | None
) -> tuple[float, list[dict[str, float]]]:
    """The best alpha and the curve; of equals the one nearest the fine-tuned end."""
    assert measure is not None
    scores = {a: measure(with_state(like, mean(states, [1 - a, a])).model) for a in ALPHAS}
    best = max(ALPHAS, key=lambda a: (scores[a].order, a))
    return best, [{"alpha": a, **asdict(score)} for a, score in scores.items()]


def _greedy(
    like: ExportSource,
    states: Sequence[dict[str, torch.Tensor]],
    scores: Sequence[Score | None],
    measure: Measure | None,
) -> list[float]:
    """Shares of the members: equal ones of those that stay, 0 of the others."""
    assert measure is not None
    known = [score for score in scores if score is not None]
    order = sorted(range(len(states)), key=lambda i: known[i].order, reverse=True)
    kept, best = order[:1], known[order[0]]
    for i in order[1:]:
        tried = [*kept, i]
        score = measure(with_state(like, mean([states[k] for k in tried], [1 / len(tried)] * len(tried))).model)
        if score.top1 >= best.top1:
            kept, best = tried, score
    return [1 / len(kept) if i in kept else 0.0 for i in range(len(states))]


def _check(members: Sequence[ExportSource], method: Method) -> None:
    if method == "wise" and len(members) != 2:
        raise UserError(
            f"wise goes between two checkpoints, and {len(members)} are given: give the start, then the fine-tuned one"
        )
    if len(members) < 2:
        raise UserError("an average of one checkpoint is that checkpoint; give two or more, or --last N of one run")
    first = members[0]
    for other in members[1:]:
        pair = f"{first.commit.url} and {other.commit.url}"
        if other.commit.digest == first.commit.digest and other.weights == first.weights:
            raise UserError(f"{pair} are the same weights; give each checkpoint once")
        if (other.name, _shapes(other)) != (
            first.name,
            _shapes(first),
        ) and other.commit.classes == first.commit.classes:
            raise UserError(
                f"{pair} are different networks ({first.name} and {other.name}, or of other sizes); average alike ones"
            )
        if other.commit.classes != first.commit.classes:
            raise UserError(
                f"{pair} have heads of different classes ({len(first.commit.classes)} and {len(other.commit.classes)}); average "
                "checkpoints that were trained on the same classes, in the same order"
            )
        if preprocessing(other.augment) != preprocessing(first.augment):
            raise UserError(
                f"{pair} were evaluated with different preprocessing; average checkpoints of one preprocessing"
            )
    if any(_STATISTICS.search(name) for name in first.model.state_dict()):
        raise UserError(
            f"{first.name} has batch normalisation, whose running statistics are not those of an average; average networks "
            "without it"
        )


def _shapes(source: ExportSource) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in source.model.state_dict().items()}
