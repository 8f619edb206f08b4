"""The curves of the report's page: a metric over images a class, and training losses over steps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from transfer import plots
from transfer.findings import Findings
from transfer.ledger import Entry
from transfer.page_parts import esc, fold
from transfer.protocols import PROBES
from transfer.scorecard import Row, shots_order, shots_phrase


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
    groups: dict[int, dict[tuple[str, str], list[Entry]]] = defaultdict(lambda: defaultdict(list))
    for cell in findings.finals:
        if cell.method_kind not in PROBES and len(cell.history) > 1:
            groups[cell.shots][cell.task, cell.method].append(cell)
    if not groups:
        return ""
    first = min(groups, key=lambda s: (abs(shots_order(s) - plots.HEADLINE_SHOTS), s))
    out = ""
    for shots in sorted(groups, key=lambda s: (s != first, shots_order(s))):
        figures = "".join(
            f"<figure><figcaption>{esc(cells[0].task_title)} <span>{esc(cells[0].method_title or cells[0].method)}, "
            f"{esc(shots_phrase(shots))}</span></figcaption>{plots.learning(cells, sources)}</figure>"
            for _, cells in sorted(groups[shots].items())
        )
        out += fold(esc(shots_phrase(shots)), f"<div class=plots>{figures}</div>", is_open=shots == first)
    note = "Training loss of the final trials, a line a seed, on a logarithmic scale."
    return f"<h2>Learning curves of the fine-tunings</h2><p class=note>{note}</p>{key(sources)}{out}"


def key(sources: Sequence[str]) -> str:
    """What the colours stand for."""
    names = [(plots.color_of(s, sources), s if len(sources) > 1 else plots.INITS["pretrained"]) for s in sources]
    names.append(("scratch", plots.INITS["scratch"]))
    spans = "".join(f'<span><i style="background:var(--{color})"></i>{esc(text)}</span>' for color, text in names)
    return f"<div class=key>{spans}</div>"
