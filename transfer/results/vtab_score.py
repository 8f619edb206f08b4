"""The VTAB score of a scorecard: the mean of top-1 over the 19 tasks and over each group, a seed at a time."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from transfer.protocol.method_settings import VTAB_IMAGES
from transfer.protocol.vtab import TASKS, score
from transfer.results.scorecard import Row
from transfer.results.statistics import Estimate, estimate

GROUPS = ("all", "natural", "specialized", "structured")


@dataclass(frozen=True, kw_only=True)
class VtabScore:
    """Of one source, or of an architecture with fresh weights, by one method."""

    method: str
    start: str
    groups: dict[str, Estimate]
    """Over the seeds that all 19 tasks have; empty where tasks are missing, because a mean over fewer is not the score."""
    num_tasks: int


def vtab_scores(rows: Sequence[Row]) -> list[VtabScore]:
    """One for each method and start that was measured on a task of VTAB-1k by its split, in the order of rows."""
    found: dict[tuple[str, str], dict[str, dict[int, float]]] = defaultdict(dict)
    for row in rows:
        if row.shots == VTAB_IMAGES and row.task in TASKS and row.metric == "top1":
            for start, values in zip((row.backbone or "pretrained", _scratch(row)), row.values, strict=True):
                if values:
                    found[row.method, start][row.task] = values
    return [
        VtabScore(method=method, start=start, groups=_groups(by_task), num_tasks=len(by_task))
        for (method, start), by_task in found.items()
    ]


def _scratch(row: Row) -> str:
    return f"from scratch, as {row.backbone}" if row.backbone else "from scratch"


def _groups(by_task: dict[str, dict[int, float]]) -> dict[str, Estimate]:
    if len(by_task) < len(TASKS):
        return {}
    seeds = sorted(set.intersection(*(set(values) for values in by_task.values())))
    scores = [score({task: values[seed] for task, values in by_task.items()}) for seed in seeds]
    found = {group: estimate([one[group] for one in scores], within=(0.0, 1.0)) for group in GROUPS}
    return {group: value for group, value in found.items() if value is not None}
