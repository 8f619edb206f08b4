"""The report's page on hyper-parameters: what was tried for each cell, how far scores lay apart, and what made them differ."""

from __future__ import annotations

import statistics as stdlib_statistics
from collections import defaultdict
from typing import Any

from transfer import plots
from transfer.findings import Findings
from transfer.ledger import Entry
from transfer.page_parts import esc, link, settings, table, table_row
from transfer.scorecard import cell_name, column_order, shots_text, start_of


def search_table(findings: Findings) -> str:
    cells: dict[str, Entry] = {cell_name(cell): cell for cell in findings.cells}
    final = set(findings.by_cell())
    several = len({cell.backbone for cell in cells.values() if cell.init == "pretrained"}) > 1
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
        effects = main_effects(scores)
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
    return (
        "<h2>What was searched, and what it mattered</h2><p class=note>Scores on the held-out part of the training images, per "
        "cent, of the candidates that ran to their end; the others were stopped early. Moved by: points between the best and "
        "the worst mean score over the values of one hyper-parameter, the others averaged. Settings were chosen on these and "
        f"written down for {num_cells} cells before a test split was opened; each start picks its own.</p>"
        + table(head, body, numbers={3, 4, 5, 6, 7, 8})
    )


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
