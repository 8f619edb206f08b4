"""The scorecard as CSV, and back, and the measures besides its metric: what programs read, with every number as it is stored."""

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

from pipeline.display import csv_cell
from transfer.results.error_analysis import CellMeasures
from transfer.results.scorecard import Row, start_of, with_extra_metrics
from transfer.results.scorecard_table import BASELINES
from transfer.results.statistics import Estimate

CSV_FIELDS = (
    *("task", "task_title", "method", "shots", "metric", "pretrained", "scratch", "gain", "verdict", "num_failed"),
    *("protocol_digest", "backbone", "pretrained_cell", "scratch_cell", "damage", "p_holm", "verdict_uncorrected"),
    "baselines",
)
"""Estimates (pretrained, scratch, gain) become six columns each, baselines one each."""
ESTIMATES, ENDS = ("pretrained", "scratch", "gain"), ("mean", "low", "high", "n", "rule", "p")


def to_csv(rows: Sequence[Row]) -> str:
    """The scorecard as CSV, all values as stored; what a cell is measured by besides is a line of its own, with its metric."""
    parts = {name: [f"{name}_{end}" for end in ENDS] for name in ESTIMATES} | {"baselines": list(BASELINES)}
    lines: list[list[object]] = [[head for name in CSV_FIELDS for head in parts.get(name, [name])]]
    for row in with_extra_metrics(rows):
        cells: list[object] = []
        for name in CSV_FIELDS:
            value = getattr(row, name)
            if name in ESTIMATES:
                cells += ["", "", "", 0, "", ""] if value is None else [getattr(value, end) for end in ENDS]
            else:
                cells += [value.get(b, "") for b in BASELINES] if name == "baselines" else [value]
        lines.append(cells)
    return csv_text(lines)


def measures_to_csv(rows: Sequence[CellMeasures]) -> str:
    """A line for each cell and measure (`transfer.measurement.prediction_measures`), as stored."""
    ends = ENDS[:-1]
    lines: list[list[object]] = [["cell", "task", "method", "start", "shots", "protocol_digest", "measure", *ends]]
    for row in rows:
        first = row.entry
        head = [row.cell, first.task, first.method, start_of(first), first.shots, first.protocol_digest]
        for name, value in row.estimates.items():
            lines.append([*head, name, *(getattr(value, end) for end in ends)])
    return csv_text(lines)


def csv_text(lines: Iterable[Iterable[object]]) -> str:
    """Lines of cells as CSV; None is an empty cell."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([csv_cell(cell) for cell in line] for line in lines)
    return out.getvalue()


def from_csv(text: str) -> list[Row]:
    """The rows of `to_csv`, each metric a row of its own; without the values of single seeds."""
    found = []
    for line in csv.DictReader(io.StringIO(text)):
        sides: dict[str, Any] = {name: _estimate({end: line[f"{name}_{end}"] for end in ENDS}) for name in ESTIMATES}
        fields: dict[str, Any] = {k: line[k] for k in CSV_FIELDS if k not in (*ESTIMATES, "baselines")}
        fields |= {"shots": int(line["shots"]), "num_failed": int(line["num_failed"])}
        fields |= {"p_holm": float(line["p_holm"]) if line["p_holm"] else None}
        fields |= {"baselines": {name: float(line[name]) for name in BASELINES if line.get(name)}}
        found.append(Row(**fields, **sides))
    return found


def _estimate(ends: dict[str, str]) -> Estimate | None:
    if not ends["mean"]:
        return None
    numbers = {name: float(ends[name]) for name in ("mean", "low", "high", "p") if ends[name]}
    return Estimate(**numbers, n=int(ends["n"]), rule=ends["rule"])
