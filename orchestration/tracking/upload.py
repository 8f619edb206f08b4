"""What lines of a spool mean to a tracking server: points, parameters, tags, datasets, an ending."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pipeline.secrets import public

EXIT_NOT_UPLOADED = 3
"""Of an uploader or an import that could not send all."""
TAG_CHARACTERS = 4000  # MLflow refuses tags beyond 8,000 and cuts parameters at 6,000 with only a warning


class Point(NamedTuple):
    """One value of one metric."""

    key: str
    value: float
    time_ms: int
    step: int


class DatasetUsed(NamedTuple):
    """A dataset that a run reads, by what it holds and where it lies."""

    name: str
    digest: str
    url: str
    use: str
    """training or evaluation."""


class Ending(NamedTuple):
    """How a run ended, in MLflow's word and in ours."""

    status: str
    cause: str


@dataclass
class Upload:
    """What some lines of a spool mean to the tracking server."""

    points: list[Point] = field(default_factory=list)
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    """The resolved configuration, when these lines bring one that is new."""
    datasets: list[DatasetUsed] = field(default_factory=list)
    traces: list[str] = field(default_factory=list)
    """Names of files in the run's folder `profiles`."""

    def merge(self, other: "Upload") -> None:
        self.points += other.points
        self.params |= other.params
        self.tags |= other.tags
        self.config = other.config or self.config
        self.datasets += other.datasets
        self.traces += other.traces


def source_tags(facts: Mapping[str, str]) -> dict[str, str]:
    """What fills MLflow's own column and line "Source": the command without its arguments, and the revision of the code."""
    if "environment.command" not in facts:
        return {}
    words = [word.rpartition("/")[2] for word in facts["environment.command"].split()]
    ours = [i for i, word in enumerate(words) if word in ("normfree", "orchestration.cli")]
    name = " ".join(["normfree", *words[ours[0] + 1 : ours[0] + 2]] if ours else words[:2])
    tags = {"mlflow.source.type": "LOCAL", "mlflow.source.name": name}
    return tags | ({"mlflow.source.git.commit": facts["code.revision"]} if facts.get("code.revision") else {})


def cause(error: BaseException) -> str:
    """An exception of the way to the server in one short line, without passwords."""
    text = public(" ".join(str(error).split()))
    if re.search("Max retries exceeded|Connection refused|timed out|Failed to resolve", text):
        return "no answer from the server"
    return f"{type(error).__name__}: {text[:200]}"


def points_of(record: dict[str, Any], values: dict[str, float]) -> list[Point]:
    """Points at the record's step and time. What is not finite becomes a flag: SQLite turns inf into 1.8e308 (M7)."""
    time_ms, step = round(record["time_s"] * 1000), int(record["step"])
    return [
        Point(key, float(value), time_ms, step)
        if math.isfinite(value)
        else Point(f"{key}_not_finite", 1.0, time_ms, step)
        for key, value in values.items()
        if value is not None
    ]


def value_at(config: dict[str, Any], path: str) -> Any:
    value: Any = config
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def shorten(text: str) -> str:
    return text if len(text) <= TAG_CHARACTERS else text[: TAG_CHARACTERS - 3] + "..."
