"""The curves of the report's page: a metric over images a class, training losses and held-out metrics over steps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from transfer.protocol.methods import PROBES
from transfer.report import plots
from transfer.report.html_elements import esc, fold
from transfer.results.scorecard import Row, shots_order, shots_phrase
from transfer.results.sweep_results import Findings
from transfer.sweep.ledger import Entry

Group = tuple[int, str, str]
"""Number of images a class, task, method."""


def curves(rows: Sequence[Row], sources: Sequence[str]) -> str:
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row.pretrained or row.scratch:
            groups[row.task, row.method].append(row)
    figures = "".join(
        f"<figure><figcaption>{esc(group[0].task_title)} <span>{esc(group[0].method_title)}</span></figcaption>"
        f"{plots.few_shot(group, sources)}</figure>"
        for group in groups.values()
        if len({row.shots for row in group}) > 1
    )
    if not figures:
        return ""
    several = len({row.twin for row in rows if row.scratch}) > 1
    dotted = " From scratch: solid with the first source's architecture, dotted with another." if several else ""
    return (
        "<h2>Few-shot curves</h2><p class=note>Mean over seeds with its interval as a band, on a logarithmic scale of images; "
        "each pale dot is one seed. The vertical scales differ from plot to plot."
        f"{dotted}</p>"
        f"{key(sources)}<div class=plots>{figures}</div>"
    )


def learning(findings: Findings, sources: Sequence[str]) -> str:
    """Of each fine-tuning the training loss of its final trials, and the held-out metric of its search."""
    finals: dict[Group, list[Entry]] = defaultdict(list)
    searched: dict[Group, list[Entry]] = defaultdict(list)
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
    out = ""
    for shots in sorted(numbers, key=lambda s: (s != first, shots_order(s))):
        figures = ""
        for group in sorted({g for g in (*finals, *searched) if g[0] == shots}):
            if group in finals:
                figures += _figure(finals[group][0], "training loss", plots.learning(finals[group], sources))
            if group in searched:
                pairs = [(cell, _is_chosen(findings, cell)) for cell in searched[group]]
                figures += _figure(searched[group][0], "search, held-out part", plots.held_out(pairs, sources))
        out += fold(esc(shots_phrase(shots)), f"<div class=plots>{figures}</div>", is_open=shots == first)
    note = "Training loss of the final trials, a line a seed, on a logarithmic scale."
    if searched:
        note += (
            " Of the searches the metric on the held-out part of the training images, wherever it was measured: a line for each "
            "candidate, strong for the one that was chosen; a line that ends early was stopped."
        )
    return f"<h2>Learning curves of the fine-tunings</h2><p class=note>{note}</p>{key(sources)}{out}"


def _figure(cell: Entry, what: str, plot: str) -> str:
    said = f"{esc(cell.method_title or cell.method)}, {esc(shots_phrase(cell.shots))}: {what}"
    return f"<figure><figcaption>{esc(cell.task_title)} <span>{said}</span></figcaption>{plot}</figure>"


def _is_chosen(findings: Findings, cell: Entry) -> bool:
    return findings.selection(cell).get("hyperparameters") == cell.hyperparameters


def key(sources: Sequence[str]) -> str:
    """What the colours stand for."""
    names = [(plots.color_of(s, sources), s if len(sources) > 1 else plots.INITS["pretrained"]) for s in sources]
    names.append(("scratch", plots.INITS["scratch"]))
    spans = "".join(f'<span><i style="background:var(--{color})"></i>{esc(text)}</span>' for color, text in names)
    return f"<div class=key>{spans}</div>"
