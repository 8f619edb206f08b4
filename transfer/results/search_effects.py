"""What a search of hyper-parameters says: which candidates ran to their end, and what made their scores differ."""

import itertools
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from transfer.protocol.search_space import Axis

MIN_FOR_THIRDS = 6
"""Candidates, for a range to be cut into thirds: fewer say nothing of what mattered."""

Scores = list[tuple[dict[str, Any], float]]
"""Hyper-parameters and score of the candidates that ran to their end."""


def whole_candidates(record: dict[str, Any]) -> tuple[int, Scores]:
    """Of a selection record: how many candidates were tried, and (hyper-parameters, score) of those that ran to their end."""
    candidates = [c for c in record.get("candidates") or [] if isinstance(c, dict)]
    scores = []
    for one in candidates:
        point = one.get("hyperparameters") or {}
        end = point.get("num_steps")
        is_probe = not one.get("step")  # one fit, not a schedule
        is_whole = one.get("status", "ok") == "ok" and (end is None or is_probe or one["step"] == end)
        if is_whole and isinstance(one.get("score"), int | float):
            scores.append((point, float(one["score"])))
    return len(candidates), scores


def main_effects(scores: Scores) -> dict[str, float]:
    """How far the mean score over each value of a hyper-parameter lies from that over its other values: the range, as a share.

    Only hyper-parameters with several values, the one that mattered most first.
    """
    effects = {}
    for key in dict.fromkeys(k for point, _ in scores for k in point):
        groups: dict[str, list[float]] = defaultdict(list)
        for point, score in scores:
            groups[str(point.get(key))].append(score)
        means = [sum(values) / len(values) for values in groups.values()]
        if len(means) > 1:
            effects[key] = max(means) - min(means)
    return dict(sorted(effects.items(), key=lambda item: -item[1]))


def range_effects(scores: Scores, axes: Sequence[Axis]) -> dict[str, float]:
    """The same of ranges, where hardly a value comes twice: over the lower, middle and upper third of the candidates by value.

    A model looks closer where scores are good, so a range that mattered can move less here than it would on a grid.
    """
    if len(scores) < MIN_FOR_THIRDS:
        return {}
    effects = {}
    for axis in axes:
        ordered = [score for _, score in sorted(scores, key=lambda one: one[0][axis.name])]
        cuts = [round(len(ordered) * k / 3) for k in range(4)]
        means = [sum(part) / len(part) for a, b in itertools.pairwise(cuts) if (part := ordered[a:b])]
        effects[axis.name] = max(means) - min(means)
    return dict(sorted(effects.items(), key=lambda item: -item[1]))
