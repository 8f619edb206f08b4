"""Behind each number of the report's page: its trials, where it comes from, and what it gets wrong."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipeline.data.format.manifest import Manifest
from pipeline.errors import UserError
from pipeline.storage import objects
from transfer.measurement.predictions import url_of
from transfer.metric_facts import MetricFacts, facts_of
from transfer.protocol.sealed_splits import Opening
from transfer.report.html_template import fill
from transfer.results.error_analysis import confusion
from transfer.results.scorecard import Row
from transfer.results.statistics import Estimate, estimate
from transfer.results.sweep_results import Findings, Folder
from transfer.sweep.entry import LedgerEntry

MAX_MATRIX_CLASSES = 16
MAX_LISTED_CLASSES = 24
NUM_PAIRS = 12
MAX_SHARDS = 200


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A cell with its trials, as `cells.html.j2` shows it."""

    name: str
    entries: list[LedgerEntry]
    begins_task: bool
    mean: Estimate | None
    home: Folder
    selection: dict[str, Any]
    confusion: dict[str, Any] | None

    @property
    def metrics(self) -> list[str]:
        first = self.entries[0]
        names = list(dict.fromkeys((first.metric, *(name for entry in self.entries for name in entry.metrics))))
        if "mean_per_class" in names and first.metric != "balanced_accuracy":  # one number under two names
            names = [name for name in names if name != "balanced_accuracy"]
        return names

    @property
    def metric_titles(self) -> list[str]:
        return [facts_of(name).label for name in self.metrics]

    @property
    def facts(self) -> MetricFacts:
        return facts_of(self.entries[0].metric)

    def text(self, metric: str, value: float | None) -> str:
        return "–" if value is None else replace(facts_of(metric), decimals=facts_of(metric).decimals + 1).text(value)

    @property
    def source(self) -> str:
        return self.entries[0].checkpoint_digest or self.entries[0].backbone_digest

    @property
    def opened(self) -> list[tuple[Opening, LedgerEntry]]:
        return [(opening, entry) for entry in self.entries for opening in self.home.openings.get(entry.digest, [])]

    @property
    def num_opened_again(self) -> int:
        return len(self.opened) - len({(opening.what, entry.digest) for opening, entry in self.opened})

    def num_opened(self, entry: LedgerEntry) -> int:
        return sum(opening.what == "test" for opening in self.home.openings.get(entry.digest, []))

    @property
    def trial_files(self) -> list[str]:
        return [objects.join(self.home.url, "trials", f"{entry.digest}.json") for entry in self.entries]

    @property
    def prediction_files(self) -> list[str]:
        return [url_of(self.home.url, e.digest) for e in self.entries if e.digest in self.home.predicted]


def cells_section(findings: Findings) -> str:
    """All cells with a number, by task."""
    cells: list[Cell] = []
    for name, entries in findings.by_cell().items():
        first = entries[0]
        cells.append(
            Cell(
                name=name,
                entries=entries,
                begins_task=not cells or cells[-1].entries[0].task != first.task,
                mean=estimate([float(entry.value or 0.0) for entry in entries], within=facts_of(first.metric).within),
                home=findings.home[first.digest],
                selection=findings.selection(first),
                confusion=_confusion(findings, entries),
            )
        )
    return fill("cells.html.j2", cells=cells)


def _confusion(findings: Findings, entries: list[LedgerEntry]) -> dict[str, Any] | None:
    """What `confusion.html.j2` shows: a matrix where classes are few, the worst classes and pairs where they are many."""
    predicted = [found for entry in entries if (found := findings.predicted_classes(entry)) is not None]
    if not predicted:
        return None
    data = findings.datasets[entries[0].task]
    classes: Sequence[str] = () if isinstance(data, str) else data.classes
    counted = confusion(predicted, len(classes))
    names = [classes[i] if i < len(classes) else str(i) for i in range(len(counted.counts))]
    num_images = counted.counts.sum(1) / counted.num_seeds
    shown: dict[str, Any] = {
        "seeds": "" if counted.num_seeds == 1 else f", the {counted.num_seeds} seeds summed",
        "names": names,
        "num_images": num_images.tolist(),
        "shares": [],
    }
    if len(names) <= MAX_MATRIX_CLASSES:
        shares = counted.counts / np.maximum(1, counted.counts.sum(1, keepdims=True))
        return shown | {"shares": shares.tolist()}
    recalls = counted.recalls
    order = [int(i) for i in np.argsort(recalls, kind="stable") if not np.isnan(recalls[i])]
    others = order[MAX_LISTED_CLASSES:]
    return shown | {
        "worst": [(names[i], recalls[i], num_images[i]) for i in order[:MAX_LISTED_CLASSES]],
        "num_others": len(others),
        "others": [recalls[i] for i in (others[0], others[-1])] if others else [],
        "pairs": [(names[a], names[b], share) for a, b, share in counted.worst_pairs(NUM_PAIRS)],
    }


def provenance(findings: Findings, rows: Sequence[Row]) -> str:
    """Sources with their digests, data down to shards, sweeps with their commands."""
    sources: dict[str, tuple[str, str, str]] = {}
    for cell in findings.finals:
        name = cell.backbone or cell.model or str(findings.home[cell.digest].sweep.get("model") or "")
        url = cell.checkpoint_url if cell.init == "pretrained" else "fresh weights, a function of the seed"
        if digest := cell.checkpoint_digest or cell.backbone_digest:
            sources.setdefault(digest, (name, cell.model, url))
    by_data = sorted({cell.data_digest: cell for cell in findings.finals}.items(), key=lambda item: item[1].task)
    return fill(
        "provenance.html.j2",
        sources=sorted(sources.items(), key=lambda item: item[1]),
        data=[(digest, cell, *_shards(findings.datasets[cell.task])) for digest, cell in by_data],
        folders=findings.folders,
        num_shared=findings.num_shared,
        protocols=sorted({row.protocol_digest for row in rows}),
    )


def _shards(data: Manifest | str) -> tuple[str, str, list[Any], int]:
    """Why a dataset is not readable, or its URL, (split, shard) of its first shards, and how many there are."""
    if isinstance(data, str):
        return data, "", [], 0
    shards = ((name, shard) for name in data.splits for shard in data.split(name).shards)
    try:
        return "", data.url, list(itertools.islice(shards, MAX_SHARDS)), sum(s.num_shards for s in data.splits.values())
    except UserError as error:
        return str(error), "", [], 0
