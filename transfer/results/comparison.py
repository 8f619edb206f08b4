"""Sources against each other over tasks: what a table of many numbers says about which backbone is better.

Within a task the difference is that of the means over seeds; over tasks it has an interval, counts, and an exact sign-flip
permutation test (`transfer.results.statistics.compare`). The tasks of a suite are taken for a draw from the tasks that
matter: with few of them the test cannot settle anything, and says so.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from transfer.results.scorecard import Row, shots_order
from transfer.results.statistics import Comparison, compare

SCRATCH = "from scratch"


@dataclass(frozen=True)
class Versus:
    """A against B with one method at one number of images a class, over the tasks that both have."""

    a: str
    b: str
    method: str
    method_title: str
    shots: int
    tasks: tuple[str, ...]
    result: Comparison


def comparisons(rows: Sequence[Row]) -> list[Versus]:
    """Each source against each other one, and against its from-scratch baseline, by number of images and method."""
    groups: dict[tuple[int, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.shots, row.method].append(row)
    found = []
    for (shots, method), group in sorted(groups.items(), key=lambda item: shots_order(item[0][0])):
        sources = list(dict.fromkeys(row.backbone for row in group))
        means = {(r.backbone, r.task): r.pretrained.mean for r in group if r.pretrained is not None}
        baselines = {(r.backbone, r.task): r.scratch.mean for r in group if r.scratch is not None}
        sides = [(a, b, means, means) for a, b in combinations(sources, 2)]
        sides += [(a, SCRATCH, means, {(SCRATCH, t): v for (s, t), v in baselines.items() if s == a}) for a in sources]
        for a, b, ours, theirs in sides:
            tasks = tuple(dict.fromkeys(r.task for r in group if (a, r.task) in ours and (b, r.task) in theirs))
            result = compare([ours[a, task] - theirs[b, task] for task in tasks])
            if result is not None:
                found.append(Versus(a, b, method, group[0].method_title, shots, tasks, result))
    return found
