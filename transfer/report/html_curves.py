"""The curves of the report's page: a metric over images a class, training losses and held-out metrics over steps."""

from collections import defaultdict
from collections.abc import Sequence

from transfer.protocol.methods import PROBES
from transfer.report import plots
from transfer.report.html_template import INITS, fill
from transfer.report.plot_style import color_of
from transfer.results.scorecard import Row, shots_order
from transfer.results.sweep_results import Findings
from transfer.sweep.entry import LedgerEntry

Group = tuple[int, str, str]
"""Number of images a class, task, method."""


def colors_of(sources: Sequence[str]) -> list[tuple[str, str]]:
    """(name of the colour, what it stands for) of each source, and of what was trained from scratch."""
    several = len(sources) > 1
    named = [(color_of(s, sources), s if several else INITS["pretrained"]) for s in sources]
    return [*named, ("scratch", INITS["scratch"])]


def curves(rows: Sequence[Row], sources: Sequence[str]) -> str:
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row.pretrained or row.scratch:
            groups[row.task, row.method].append(row)
    groups = {key: group for key, group in groups.items() if len({row.shots for row in group}) > 1}
    if not groups:
        return ""
    return fill(
        "curves.html.j2",
        colors=colors_of(sources),
        several_baselines=len({row.baseline for row in rows if row.scratch}) > 1,
        figures=[(group[0], plots.few_shot(group, sources)) for group in groups.values()],
    )


def learning(findings: Findings, sources: Sequence[str]) -> str:
    """Of each fine-tuning the training loss of its final trials, and the held-out metric of its search."""
    finals: dict[Group, list[LedgerEntry]] = defaultdict(list)
    searched: dict[Group, list[LedgerEntry]] = defaultdict(list)
    for cell in findings.cells:
        if cell.is_ok and cell.method_kind not in PROBES:
            group = cell.shots, cell.task, cell.method
            if cell.kind == "final" and len(cell.history) > 1:
                finals[group].append(cell)
            elif cell.kind == "search" and cell.history:
                searched[group].append(cell)
    # One evaluation of each candidate, all at one step, is no curve.
    searched = {g: cells for g, cells in searched.items() if len({r["step"] for c in cells for r in c.history}) > 1}
    numbers = {shots for shots, *_ in (*finals, *searched)}
    if not numbers:
        return ""
    first = min(numbers, key=lambda s: (abs(shots_order(s) - plots.HEADLINE_SHOTS), s))
    figures: dict[int, list[tuple[LedgerEntry, str, str]]] = defaultdict(list)
    for group in sorted({*finals, *searched}):
        if group in finals:
            figures[group[0]].append((finals[group][0], "training loss", plots.learning(finals[group], sources)))
        if group in searched:
            pairs = [(cell, _is_chosen(findings, cell)) for cell in searched[group]]
            figures[group[0]].append((searched[group][0], "search, held-out part", plots.held_out(pairs, sources)))
    return fill(
        "learning.html.j2",
        colors=colors_of(sources),
        has_searches=bool(searched),
        groups=sorted(figures.items(), key=lambda item: (item[0] != first, shots_order(item[0]))),
    )


def _is_chosen(findings: Findings, cell: LedgerEntry) -> bool:
    return findings.selection(cell).get("hyperparameters") == cell.hyperparameters
