"""What a model card says besides the run's own record: a licence that the user names, and results on other tasks."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.display import markdown
from pipeline.errors import UserError

_LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """One number of a transfer sweep, of this checkpoint."""

    task: str
    """A name without blanks;"""
    task_title: str
    """and one for people."""
    method: str
    shots: str
    """Images of each class, in words."""
    metric: str
    """As the sweep calls it: top1."""
    metric_title: str
    value: float
    """In `unit`."""
    unit: str
    texts: tuple[str, str, str]
    """For people, with intervals: this checkpoint, its baseline from scratch, the gain."""
    verdict: str


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    license: str = ""
    """An identifier as Hugging Face lists them."""
    results: tuple[TaskResult, ...] = ()
    notes: tuple[str, ...] = ()
    """Rules by which the results are to be read."""

    def __post_init__(self) -> None:
        if self.license and not _LICENCE.fullmatch(self.license):
            raise UserError(
                f"--license is {self.license!r}; give an identifier as Hugging Face lists them: apache-2.0, cc-by-nc-4.0, other"
            )


def results_table(facts: CardFacts) -> str:
    """Markdown; "" without results."""
    if not facts.results:
        return ""
    lines = ["| task | metric | method | shots | pretrained | from scratch | gain | verdict |", "|---" * 8 + "|"]
    for one in facts.results:
        cells = (
            one.task_title,
            f"{one.metric_title}, {one.unit}".removesuffix(", "),
            one.method,
            one.shots,
            *one.texts,
        )
        lines.append("| " + " | ".join(markdown(cell) for cell in (*cells, one.verdict)) + " |")
    return "\n".join(["## Transfer", "", *lines, "", *(f"- {markdown(note)}" for note in facts.notes)])


def model_index(
    name: str, facts: CardFacts, dataset: str, split: str, evaluation: dict[str, float]
) -> list[dict[str, Any]]:
    """Results as hubs read them (`model-index` of a card's head): of the run's own evaluation, then of the sweep."""
    results = []
    shares = [(k, v) for k, v in evaluation.items() if k in ("top1", "top5")]
    if shares:
        metrics = [_metric(k, 100 * v, {"top1": "top-1", "top5": "top-5"}[k] + ", %") for k, v in shares]
        results.append(_result({"name": dataset, "type": dataset, "split": split}, metrics))
    for one in facts.results:
        title = f"{one.metric_title}, {one.unit}".removesuffix(", ") + f" ({one.method}, {one.shots})"
        results.append(_result({"name": one.task_title, "type": one.task}, [_metric(one.metric, one.value, title)]))
    return [{"name": name, "results": results}] if results else []


def _result(dataset: dict[str, str], metrics: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {"task": {"type": "image-classification"}, "dataset": dataset, "metrics": list(metrics)}


def _metric(name: str, value: float, title: str) -> dict[str, Any]:
    return {"type": "accuracy" if name == "top1" else name, "value": round(value, 4), "name": title}
