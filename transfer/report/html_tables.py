"""The tables of the report's page: scorecard, sources side by side, failures, costs."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from transfer.metric_facts import METRIC_FACTS
from transfer.report.html_template import fill
from transfer.results.scorecard import Row, start_of
from transfer.results.scorecard_table import Line, columns_of, has_several_sources, lines_of, notes
from transfer.results.sweep_results import Findings
from transfer.results.vtab_score import GROUPS, vtab_scores
from transfer.sweep.entry import LedgerEntry


def scorecard_table(rows: Sequence[Row]) -> str:
    return fill(
        "scorecard.html.j2",
        columns=columns_of(rows),
        lines=lines_of(rows),
        several=has_several_sources(rows),
        notes=notes(rows),
        top1=METRIC_FACTS["top1"],
        vtab=vtab_scores(rows),
        vtab_groups=GROUPS,
    )


def side_by_side(rows: Sequence[Row], sources: Sequence[str]) -> str:
    """A column for each source and for each from-scratch baseline; nothing where there is one source."""
    if len(sources) < 2:
        return ""
    baselines = list(dict.fromkeys(row.baseline for row in rows if row.scratch))
    groups: dict[tuple[Any, ...], list[Line]] = defaultdict(list)
    for line in lines_of(rows):
        groups[*line.row.column, line.row.metric if line.is_extra else ""].append(line)
    lines = []
    for group in groups.values():
        of_source = {line.row.backbone: (line.row.pretrained, line.row.pretrained_cell) for line in group}
        of_baseline = {
            line.row.baseline: (line.row.scratch, line.row.scratch_cell) for line in group if line.row.scratch
        }
        cells = [of_source.get(name, (None, "")) for name in sources]
        cells += [of_baseline.get(digest, (None, "")) for digest in baselines]
        lines.append((group[0], cells))
    usual = Counter(side.n for row in rows for side in (row.pretrained, row.scratch) if side).most_common(1)
    of = {row.baseline: row.backbone for row in reversed(rows)}
    names = ["from scratch"] if len(baselines) == 1 else [f"scratch, as {of[digest]}" for digest in baselines]
    return fill("side_by_side.html.j2", lines=lines, names=[*sources, *names], usual_n=usual[0][0] if usual else 0)


def failures(findings: Findings) -> str:
    failed = [cell for cell in findings.cells if not cell.is_ok]
    not_run = [item for folder in findings.folders for item in folder.sweep.get("not_run") or []]
    return fill("failures.html.j2", failed=failed, not_run=not_run) if failed or not_run else ""


def costs(findings: Findings) -> str:
    groups: dict[tuple[str, str, str], list[LedgerEntry]] = defaultdict(list)
    for cell in findings.cells:
        groups[cell.method, cell.kind, start_of(cell)].append(cell)
    return fill(
        "costs.html.j2",
        measured=any(cell.watts for cell in findings.cells),
        groups=[
            (kind, start, cells, sum(cell.seconds_s for cell in cells), _watts(cells))
            for (_, kind, start), cells in sorted(groups.items())
        ],
    )


def _watts(cells: Sequence[LedgerEntry]) -> dict[str, float]:
    """Of each part that was measured the mean over time."""
    means = {}
    for part in sorted({part for cell in cells for part in cell.watts}):
        known = [cell for cell in cells if part in cell.watts]
        seconds_s = sum(cell.seconds_s for cell in known)
        if seconds_s > 0:
            means[part] = sum(cell.watts[part] * cell.seconds_s for cell in known) / seconds_s
    return means
