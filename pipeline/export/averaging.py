"""Averages of weights: over checkpoints of a run, over runs that were fine-tuned from one start, and between two.

    uniform   the mean of all (Izmailov et al. 2018, without a cycle of rates; Wortsman et al. 2022, "Model soups", section 2)
    greedy    from the best on held-out data on, each is kept whose joining does not lower that accuracy (the same, Recipe 1)
    wise      (1 - alpha) first + alpha second, alpha chosen on held-out data (Wortsman et al. 2022, WiSE-FT, equation 1)

What the members have in common is compared before anything is computed. Sums are taken in float64.
"""

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from pipeline.errors import UserError
from pipeline.export.source import ExportSource, preprocessing

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
Shares = tuple[float, ...]
"""Of the members, in their order; together 1."""


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

    @functools.cache  # a member, the best of a curve and the average are asked for again
    def score_of(shares: Shares) -> Score:
        assert measure is not None
        return measure(with_state(members[0], mean(states, shares)).model)

    num = len(states)
    shares, curve = (1 / num,) * num, list[dict[str, float]]()
    if method == "wise":
        chosen, curve = (alpha, []) if alpha is not None else _chosen_alpha(score_of)
        shares = _between(chosen)
    elif method == "greedy":
        shares = _greedy(num, score_of)
    score = score_of(shares) if measure else None
    scores = [score_of(_only([i], num)) if measure else None for i in range(num)]
    rows = [
        {
            "url": member.commit.url,
            "digest": member.commit.digest,
            "weights": member.weights,
            "step": member.commit.step,
            "share": share,
            **_numbers(one),
        }
        for member, share, one in zip(members, shares, scores, strict=True)
    ]
    facts = {"method": method, "members": rows, "curve": curve, "data": None, **_numbers(score)}
    return Average(source=with_state(members[0], mean(states, shares)), facts=facts, score=score)


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
    return replace(like, model=like.made_with(state), commit=replace(like.commit, evaluation={}))


def _numbers(score: Score | None) -> dict[str, float | None]:
    return {"top1": None, "loss": None} if score is None else asdict(score)


def _between(alpha: float) -> Shares:
    return 1 - alpha, alpha


def _only(kept: Sequence[int], num: int) -> Shares:
    """Equal shares of those that are kept among `num`, 0 of the others."""
    return tuple(1 / len(kept) if i in kept else 0.0 for i in range(num))


def _chosen_alpha(score_of: Callable[[Shares], Score]) -> tuple[float, list[dict[str, float]]]:
    """The best alpha and the curve; of equals the one nearest the fine-tuned end."""
    scores = {a: score_of(_between(a)) for a in ALPHAS}
    best = max(ALPHAS, key=lambda a: (scores[a].order, a))
    return best, [{"alpha": a, **asdict(score)} for a, score in scores.items()]


def _greedy(num: int, score_of: Callable[[Shares], Score]) -> Shares:
    order = sorted(range(num), key=lambda i: score_of(_only([i], num)).order, reverse=True)
    kept = order[:1]
    for i in order[1:]:
        if score_of(_only([*kept, i], num)).top1 >= score_of(_only(kept, num)).top1:
            kept = [*kept, i]
    return _only(kept, num)


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
        if other.commit.classes != first.commit.classes:
            raise UserError(
                f"{pair} have heads of different classes ({len(first.commit.classes)} and {len(other.commit.classes)}); average "
                "checkpoints that were trained on the same classes, in the same order"
            )
        if (other.name, _shapes(other)) != (first.name, _shapes(first)):
            raise UserError(
                f"{pair} are different networks ({first.name} and {other.name}, or of other sizes); average alike ones"
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
