"""The report's page on hyper-parameters: what was tried for each cell, how far scores lay apart, and what made them differ."""

from __future__ import annotations

import itertools
import statistics as stdlib_statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from transfer.protocol.search_space import Axis
from transfer.report import plots
from transfer.report.html_curves import key as colors_key
from transfer.report.html_elements import esc, fold, link, plural, settings, table, table_row
from transfer.results.scorecard import cell_name, column_order, shots_phrase, shots_text, start_of
from transfer.results.sweep_results import Findings
from transfer.search.optuna_search import generation_url, read_generation
from transfer.sweep.ledger import Entry

MIN_FOR_THIRDS = 6
"""Candidates, for a range to be cut into thirds: fewer say nothing of what mattered."""


def search_table(findings: Findings, sources: Sequence[str] = ()) -> str:
    cells: dict[str, Entry] = {cell_name(cell): cell for cell in findings.cells}
    final = set(findings.by_cell())
    several = len({cell.backbone for cell in cells.values() if cell.init == "pretrained"}) > 1
    spaces = {name: _axes(findings, cell) for name, cell in cells.items()}
    body, previous, num_cells = "", None, 0
    for name in sorted(cells, key=lambda n: (*column_order(cells[n]), cells[n].init)):
        cell = cells[name]
        record = findings.selection(cell)
        candidates, scores = whole_candidates(record)
        if len(scores) < 1 or candidates < 2:  # nothing was searched: ridge has one fixed setting
            continue
        num_cells += 1
        values = [score for _, score in scores]
        middle = stdlib_statistics.median(values)
        effects = range_effects(scores, spaces[name]) if spaces[name] else main_effects(scores)
        start = start_of(cell) if several else plots.INITS.get(cell.init, cell.init)
        body += table_row(
            [
                esc(cell.task_title) if cell.task != previous else "",
                esc(cell.method),
                link(esc(start), "cell", name if name in final else ""),
                esc(shots_text(cell.shots)),
                f"{len(scores)} of {candidates}",
                *(f"{100 * v:.1f}" for v in (min(values), middle, max(values), max(values) - min(values))),
                esc(", ".join(f"{key} {100 * spread:.1f}" for key, spread in effects.items())) or "–",
                f"<code>{esc(settings(record.get('hyperparameters')))}</code>",
            ],
            numbers={3, 4, 5, 6, 7, 8},
            style="first" if cell.task != previous else "",
        )
        previous = cell.task
    if not body:
        return ""
    head = ["task", "method", "start", "shots", "run out", "worst", "median", "best", "spread", "moved by", "chosen"]
    of_ranges = " Of a range that a model searched: over its lower, middle and upper third of the candidates."
    return (
        "<h2>What was searched, and what it mattered</h2><p class=note>Scores on the held-out part of the training images, per "
        "cent, of the candidates that ran to their end; the others were stopped early, or failed. Moved by: points between the "
        "best and the worst mean score over the values of one hyper-parameter, the others averaged."
        f"{of_ranges if any(spaces.values()) else ''} Settings were chosen on these and "
        f"written down for {num_cells} cells before a test split was opened; each start picks its own.</p>"
        + table(head, body, numbers={3, 4, 5, 6, 7, 8})
        + _figures(findings, cells, spaces, sources)
        + _played(findings)
    )


def _axes(findings: Findings, cell: Entry) -> tuple[Axis, ...]:
    """The ranges that a model searched in a cell; () where it was no model."""
    if "search" not in _stated(findings, cell):
        return ()
    first = read_generation(generation_url(findings.home[cell.digest].url, cell_name(cell), 0))
    return first.space.axes if first is not None else ()


def _stated(findings: Findings, cell: Entry) -> dict[str, Any]:
    """The method of a cell, as the plan of its sweep states it."""
    plan = findings.home[cell.digest].sweep.get("plan") or {}
    return dict(((plan.get("suite") or {}).get("methods") or {}).get(cell.method) or {})


def _figures(
    findings: Findings, cells: dict[str, Entry], spaces: dict[str, tuple[Axis, ...]], sources: Sequence[str]
) -> str:
    """A figure for each task, method and number of images that a model searched, its starts together."""
    groups: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for name in sorted(cells, key=lambda n: (*column_order(cells[n]), cells[n].init)):
        if spaces[name] and findings.selection(cells[name]):
            groups[cells[name].task, cells[name].method, cells[name].shots].append(name)
    out = ""
    for names in groups.values():
        first = cells[names[0]]
        starts = []
        for name in names:
            record = findings.selection(cells[name])
            color = "scratch" if cells[name].init == "scratch" else plots.color_of(cells[name].backbone, sources)
            starts.append((color, _tried(record), record["hyperparameters"]))
        axes = [(axis.name, axis.low, axis.high, axis.scale) for axis in spaces[names[0]]]
        title = f"{esc(first.method_title or first.method)}, {esc(shots_phrase(first.shots))}"
        out += (
            f"<figure class=wide><figcaption>{esc(first.task_title)} <span>{title}</span></figcaption>"
            f"{plots.searched(starts, axes)}</figure>"
        )
    if not out:
        return ""
    note = (
        "Held-out scores of the candidates in the order in which they were asked for, with the best so far, and over each range; "
        "a ring marks the chosen one, crosses those that failed."
    )
    return fold(
        "searches by a model, trial by trial",
        f"<p class=note>{note}</p>{colors_key(sources)}{out}",
        is_open=len(groups) == 1,
    )


def _tried(record: dict[str, Any]) -> list[tuple[dict[str, Any], float | None]]:
    rows = record.get("candidates") or []
    return [(row["hyperparameters"], row["score"] if row["status"] == "ok" else None) for row in rows]


def _played(findings: Findings) -> str:
    """Whether the sweeps' decisions hold."""
    num, wrong = sum(one.num for one in findings.played), [line for one in findings.played for line in one.wrong]
    others = [line for one in findings.played for line in one.not_played]
    said = ""
    if num:
        hold = f"{num - len(wrong)} hold" if wrong else "all hold" if num > 1 else "it holds"
        text = f"{plural(num, 'decision')} on candidates played again from what is written down: {hold}."
        said = f"<p class='note below'>{text}</p>"
    said += "".join(f"<p class='failed note'>{esc(line)}</p>" for line in wrong)
    return said + "".join(f"<p class=note>{esc(line)}</p>" for line in others)


def whole_candidates(record: dict[str, Any]) -> tuple[int, list[tuple[dict[str, Any], float]]]:
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


def main_effects(scores: list[tuple[dict[str, Any], float]]) -> dict[str, float]:
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


def range_effects(scores: list[tuple[dict[str, Any], float]], axes: Sequence[Axis]) -> dict[str, float]:
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
