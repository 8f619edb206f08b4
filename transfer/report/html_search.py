"""The report's page on hyper-parameters: what was tried for each cell, how far scores lay apart, and what made them differ."""

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from transfer.protocol.search_space import Axis
from transfer.report import plots
from transfer.report.html_curves import colors_of
from transfer.report.html_template import INITS, fill
from transfer.results.scorecard import cell_name, column_order, start_of
from transfer.results.search_effects import Scores, main_effects, range_effects, whole_candidates
from transfer.results.sweep_results import Findings
from transfer.search.optuna_search import generation_url, read_generation
from transfer.sweep.entry import LedgerEntry


@dataclass(frozen=True, kw_only=True)
class SearchedCell:
    """A cell whose hyper-parameters were searched, as `search.html.j2` shows it."""

    first: LedgerEntry
    """Any of its trials."""
    link: str
    """Name of the cell; "" where it has no final trial."""
    start: str
    num_candidates: int
    scores: Scores
    axes: tuple[Axis, ...]
    """The ranges that a model searched; () where it was no model."""
    chosen: dict[str, Any]
    begins_task: bool

    @property
    def summary(self) -> list[float]:
        """Worst, median and best score, and the spread."""
        values = [score for _, score in self.scores]
        return [min(values), statistics.median(values), max(values), max(values) - min(values)]

    @property
    def effects(self) -> dict[str, float]:
        return range_effects(self.scores, self.axes) if self.axes else main_effects(self.scores)


def search_table(findings: Findings, sources: Sequence[str] = ()) -> str:
    trials: dict[str, LedgerEntry] = {cell_name(cell): cell for cell in findings.cells}
    names = sorted(trials, key=lambda name: (*column_order(trials[name]), trials[name].init))
    final = set(findings.by_cell())
    several = len({cell.backbone for cell in trials.values() if cell.init == "pretrained"}) > 1
    axes = {name: _axes(findings, trials[name]) for name in names}
    cells: list[SearchedCell] = []
    for name in names:
        first = trials[name]
        record = findings.selection(first)
        num_candidates, scores = whole_candidates(record)
        if len(scores) < 1 or num_candidates < 2:  # nothing was searched: ridge has one fixed setting
            continue
        cells.append(
            SearchedCell(
                first=first,
                link=name if name in final else "",
                start=start_of(first) if several else INITS.get(first.init, first.init),
                num_candidates=num_candidates,
                scores=scores,
                axes=axes[name],
                chosen=record.get("hyperparameters") or {},
                begins_task=not cells or cells[-1].first.task != first.task,
            )
        )
    if not cells:
        return ""
    return fill(
        "search.html.j2",
        cells=cells,
        has_ranges=any(axes.values()),
        figures=_figures(findings, [trials[name] for name in names if axes[name]], axes, sources),
        colors=colors_of(sources),
        num_played=sum(one.num for one in findings.played),
        wrong=[line for one in findings.played for line in one.wrong],
        not_played=[line for one in findings.played for line in one.not_played],
    )


def _axes(findings: Findings, cell: LedgerEntry) -> tuple[Axis, ...]:
    """The ranges that a model searched in a cell; () where it was no model."""
    home = findings.home[cell.digest]
    if "search" not in home.method(cell.method):
        return ()
    first = read_generation(generation_url(home.url, cell_name(cell), 0))
    return first.space.axes if first is not None else ()


def _figures(
    findings: Findings, searched: Sequence[LedgerEntry], axes: dict[str, tuple[Axis, ...]], sources: Sequence[str]
) -> list[tuple[LedgerEntry, Markup]]:
    """A figure for each task, method and number of images that a model searched, its starts together."""
    groups: dict[tuple[Any, ...], list[LedgerEntry]] = defaultdict(list)
    for cell in searched:
        if findings.selection(cell):
            groups[cell.task, cell.method, cell.shots].append(cell)
    figures = []
    for cells in groups.values():
        starts = []
        for cell in cells:
            record = findings.selection(cell)
            starts.append((plots.color_of_start(cell, sources), _tried(record), record["hyperparameters"]))
        ranges = [(axis.name, axis.low, axis.high, axis.scale) for axis in axes[cell_name(cells[0])]]
        figures.append((cells[0], plots.searched(starts, ranges)))
    return figures


def _tried(record: dict[str, Any]) -> list[tuple[dict[str, Any], float | None]]:
    rows = record.get("candidates") or []
    return [(row["hyperparameters"], row["score"] if row["status"] == "ok" else None) for row in rows]
