"""The one description of the scorecard as a table: which columns it has, their titles, and what stands in a cell.

The terminal, the page and MLflow's notes draw these columns; the CSV file has the fields of `CSV_FIELDS`.
"""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline.display import csv_cell
from transfer.protocol.imagenet_labels import EXTRA_METRICS
from transfer.results.scorecard import METRIC_TITLES, Row, percent, shots_text, with_extra_metrics
from transfer.results.statistics import Estimate


@dataclass(frozen=True)
class Column:
    field: str
    """Of `Row`."""
    title: str
    is_number: bool = False


COLUMNS = (
    Column("task_title", "task"),
    Column("backbone", "source"),
    Column("method", "method"),
    Column("shots", "shots", is_number=True),
    Column("pretrained", "pretrained %", is_number=True),
    Column("scratch", "from scratch %", is_number=True),
    Column("gain", "gain, points", is_number=True),
    Column("n", "n", is_number=True),
    Column("verdict", "verdict"),
)
CSV_FIELDS = (
    *("task", "task_title", "method", "shots", "metric", "pretrained", "scratch", "gain", "verdict", "num_failed"),
    *("protocol_digest", "backbone", "pretrained_cell", "scratch_cell", "damage"),
)
"""Estimates (pretrained, scratch, gain) become four columns each."""


@dataclass(frozen=True)
class Line:
    """One row where it stands in the table."""

    row: Row
    first_words: str
    """The task where it begins, the metric where that is a further one of the row above, else ""."""
    is_extra: bool
    """By a further metric."""
    begins_task: bool

    def text(self, column: Column) -> str:
        """What stands in a cell, as plain text. It may hold anything that a name from outside holds."""
        if column.field == "task_title":
            return self.first_words
        value = getattr(self.row, column.field)
        if column.field in ("pretrained", "scratch", "gain"):
            return percent(value, sign=column.field == "gain")
        if column.field == "verdict":
            words = ["damaged"] if self.row.damage else [str(value)]
            return ", ".join(words + ([f"{self.row.num_failed} failed"] if self.row.num_failed else []))
        return shots_text(value) if column.field == "shots" else str(value)


def has_several_sources(rows: Iterable[Row]) -> bool:
    return len({row.backbone for row in rows}) > 1


def columns_of(rows: Sequence[Row]) -> list[Column]:
    """The source is named only where there are several."""
    return [column for column in COLUMNS if column.field != "backbone" or has_several_sources(rows)]


def lines_of(rows: Iterable[Row]) -> list[Line]:
    """Rows in their order, each followed by its further metrics."""
    lines: list[Line] = []
    for row in with_extra_metrics(rows):
        previous = lines[-1] if lines else None
        begins = previous is None or previous.row.task != row.task
        is_extra = row.metric in EXTRA_METRICS
        shows_task = begins or (previous is not None and previous.is_extra)
        words = METRIC_TITLES[row.metric] if is_extra else row.task_title if shows_task else ""
        lines.append(Line(row, words, is_extra, begins))
    return lines


def to_csv(rows: Sequence[Row]) -> str:
    """The scorecard as CSV, all values as shares; what a cell is measured by besides is a line of its own, with its metric."""
    estimates = ("pretrained", "scratch", "gain")
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    parts = {name: [f"{name}_{end}" for end in ("mean", "low", "high", "n")] for name in estimates}
    writer.writerow([head for name in CSV_FIELDS for head in parts.get(name, [name])])
    for row in with_extra_metrics(rows):
        cells: list[object] = []
        for name in CSV_FIELDS:
            value = getattr(row, name)
            if isinstance(value, Estimate):
                cells += [value.mean, value.low, value.high, value.n]
            else:
                cells += ["", "", "", 0] if name in estimates else [value]
        writer.writerow(map(csv_cell, cells))
    return out.getvalue()
