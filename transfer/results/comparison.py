"""Sources against each other over tasks: what a table of many numbers says about which backbone is better.

Within a task the difference is that of the means over seeds; over tasks it has an interval, counts, and an exact sign-flip
permutation test (`transfer.results.statistics.compare`). The tasks of a suite are taken for a draw from the tasks that
matter: with few of them the test cannot settle anything, and says so.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from transfer.metric_facts import MetricFacts
from transfer.results.scorecard import Row, shots_order
from transfer.results.statistics import Comparison, compare, holm

SCRATCH = "from scratch"


@dataclass(frozen=True)
class Versus:
    """A against B with one method at one number of images a class, over the tasks that both have in metrics of one family."""

    a: str
    b: str
    method: str
    method_title: str
    shots: int
    tasks: tuple[str, ...]
    result: Comparison
    facts: MetricFacts
    """Of one of the metrics: all of its family have its unit."""

    @property
    def family(self) -> str:
        return self.facts.family


def comparisons(rows: Sequence[Row]) -> list[Versus]:
    """Each source against each other one, and against its from-scratch baseline, by number of images, method and kind of metric.

    Points of accuracy are never averaged with points of another metric. p-values are corrected over all that is found (Holm).
    """
    groups: dict[tuple[int, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.shots, row.method, row.facts.family].append(row)
    found = []
    for (shots, method, _), group in sorted(groups.items(), key=lambda item: shots_order(item[0][0])):
        sources = list(dict.fromkeys(row.backbone for row in group))
        means = {(r.backbone, r.task): r.pretrained.mean for r in group if r.pretrained is not None}
        baselines = {(r.backbone, r.task): r.scratch.mean for r in group if r.scratch is not None}
        sides = [(a, b, means, means) for a, b in combinations(sources, 2)]
        sides += [(a, SCRATCH, means, {(SCRATCH, t): v for (s, t), v in baselines.items() if s == a}) for a in sources]
        for a, b, ours, theirs in sides:
            tasks = tuple(dict.fromkeys(r.task for r in group if (a, r.task) in ours and (b, r.task) in theirs))
            facts = group[0].facts
            differences = [ours[a, task] - theirs[b, task] for task in tasks]
            result = compare(differences if facts.larger_is_better else [-d for d in differences])
            if result is not None:
                found.append(Versus(a, b, method, group[0].method_title, shots, tasks, result, facts))
    adjusted = holm([one.result.p_value for one in found])
    return [replace(v, result=replace(v.result, p_holm=p)) for v, p in zip(found, adjusted, strict=True)]
