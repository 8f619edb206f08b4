"""The report as one HTML page that stands alone: no script, no font, no picture from anywhere else.

Every text that comes from data goes through `esc`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from transfer import plots
from transfer.ledger import Entry
from transfer.page_parts import esc, hours, plain, table, table_row, value_with_half
from transfer.page_style import STYLE
from transfer.page_tables import costs, failures, provenance, scorecard_table, search_table
from transfer.report import METHODS, SHORT, Findings, Row, shots_order, shots_text
from transfer.statistics import estimate


def render(findings: Findings, rows: Sequence[Row]) -> str:
    """The whole page."""
    title = _headline(rows)
    sections = [
        _head(findings, rows, title),
        _summary(rows),
        _curves(findings, rows),
        scorecard_table(rows),
        search_table(findings),
        _learning(findings),
        failures(findings),
        costs(findings),
        provenance(findings, rows),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{esc(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><main>\n{chr(10).join(filter(None, sections))}\n</main></body></html>\n"
    )


def headline_shots(rows: Sequence[Row]) -> int:
    """The number of images a class that the page's first sentence is about: 5, or the nearest that was run."""
    return min({row.shots for row in rows}, key=lambda s: (abs(shots_order(s) - plots.HEADLINE_SHOTS), s))


def _headline(rows: Sequence[Row]) -> str:
    shots = headline_shots(rows)
    here = [row for row in rows if row.shots == shots]
    counts = Counter(row.verdict for row in here)
    num_judged = len(here) - counts["one seed"] - counts["no pair"]
    at = "with all images" if shots <= 0 else f"at {shots} image{'s' * (shots != 1)} a class"
    if num_judged == 0:
        return f"No verdict {at} yet: each comparison has one seed, or lacks its twin"
    # Comparisons and not tasks: counting a task as won when any of several methods wins would flatter.
    text = f"Pretraining wins {counts['wins']} of {num_judged} comparison{'s' * (num_judged != 1)} {at}"
    return text + (f", and loses {counts['loses']}" if counts["loses"] else "")


def _head(findings: Findings, rows: Sequence[Row], title: str) -> str:
    sweep, shots = findings.sweep, headline_shots(rows)
    gains = [row for row in rows if row.shots == shots and row.gain]
    best = max(gains, key=lambda row: row.gain.mean if row.gain else 0.0, default=None)
    lead = ""
    if best is not None and best.gain is not None and best.pretrained and best.scratch:
        lead = (
            f"<p class=lead>The largest gain at {esc(shots_text(shots))} a class is on {esc(best.task_title)} by "
            f"{esc(METHODS.get(best.method, best.method))}: {100 * best.pretrained.mean:.1f} % against "
            f"{100 * best.scratch.mean:.1f} % from scratch, {plain(best.gain, sign=True)} points.</p>"
        )
    finals = [cell for cell in findings.cells if cell.kind == "final"]
    good = [cell for cell in finals if cell.is_ok]
    seeds = sorted({len({c.seed for c in good if (c.task, c.method, c.shots) == key}) for key in _keys(good)})
    facts = [
        (str(len({row.task for row in rows})), "tasks"),
        (f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}" if seeds else "0", "seeds a cell"),
        (f"{len(finals):,}", "final trials"),
        (f"{len(findings.cells) - len(finals):,}", "search trials"),
        (hours(sum(cell.seconds_s for cell in findings.cells)), "of computing"),
    ]
    if num_failed := sum(not cell.is_ok for cell in findings.cells):
        facts.append((f"<em>{num_failed}</em>", "failed trials"))
    cards = "".join(f"<div class=fact><b>{value}</b><span>{esc(name)}</span></div>" for value, name in facts)
    kicker = " · ".join(str(part) for part in ("normfree scorecard", sweep.get("model"), sweep.get("suite")) if part)
    return (
        f"<header><p class=kicker>{esc(kicker)}</p><h1>{esc(title)}</h1>{lead}<div class=facts>{cards}</div></header>"
    )


def _summary(rows: Sequence[Row]) -> str:
    shots = headline_shots(rows)
    if not any(row.gain and row.shots == shots for row in rows):
        return ""
    groups: dict[tuple[int, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row.gain is not None:
            groups[row.shots, row.method].append(row)
    body = ""
    for (number, method), group in sorted(
        groups.items(), key=lambda item: (shots_order(item[0][0]), item[0][1] != "ridge")
    ):
        counts = Counter(row.verdict for row in group)
        over_tasks = estimate([row.gain.mean for row in group if row.gain])
        rest = len(group) - counts["wins"] - counts["loses"]
        body += table_row(
            [
                esc(shots_text(number)),
                esc(SHORT.get(method, method)),
                value_with_half(over_tasks, sign=True),
                *map(str, (counts["wins"], rest, counts["loses"])),
            ],
            numbers={0, 2, 3, 4, 5},
        )
    tasks_note = "The interval of this table is over tasks, each with its mean over seeds."
    head = ["images a class", "method", "mean gain, points", "wins", "not clear", "loses"]
    return (
        f"<h2>What pretraining is worth</h2><p class=note>Gain over a from-scratch twin of equal budget, at "
        f"{esc(shots_text(shots))} images a class.</p>"
        f"<figure class=wide>{plots.gains(rows, shots)}</figure>"
        + table(head, body, numbers={0, 2, 3, 4, 5})
        + f"<p class='note below'>{tasks_note}</p>"
    )


def _curves(findings: Findings, rows: Sequence[Row]) -> str:
    finals = [cell for cell in findings.cells if cell.kind == "final" and cell.is_ok]
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row.pretrained or row.scratch:
            groups[row.task, row.method].append(row)
    figures = "".join(
        f"<figure><figcaption>{esc(group[0].task_title)} <span>{esc(METHODS.get(method, method))}</span></figcaption>"
        f"{plots.few_shot(group, finals)}</figure>"
        for (_, method), group in groups.items()
    )
    return (
        "<h2>Few-shot curves</h2><p class=note>Mean over seeds with its interval; each pale dot is one seed. "
        f"The scales differ from plot to plot.</p>{_key()}<div class=plots>{figures}</div>"
    )


def _learning(findings: Findings) -> str:
    groups: dict[int, dict[str, list[Entry]]] = defaultdict(lambda: defaultdict(list))
    for cell in findings.cells:
        if cell.kind == "final" and cell.is_ok and cell.method == "finetune" and len(cell.history) > 1:
            groups[cell.shots][cell.task].append(cell)
    if not groups:
        return ""
    first = min(groups, key=lambda s: (abs(shots_order(s) - plots.HEADLINE_SHOTS), s))
    out = ""
    for shots in sorted(groups, key=lambda s: (s != first, shots_order(s))):
        figures = "".join(
            f"<figure><figcaption>{esc(cells[0].task_title)} <span>{esc(shots_text(shots))} a class</span></figcaption>"
            f"{plots.learning(cells)}</figure>"
            for _, cells in sorted(groups[shots].items())
        )
        opened = " open" if shots == first else ""
        summary = f"<summary>{esc(shots_text(shots))} image{'s' * (shots != 1)} a class</summary>"
        out += f"<details{opened}>{summary}<div class=plots>{figures}</div></details>"
    note = "Training loss of the final trials, a line a seed, on a logarithmic scale."
    return f"<h2>Learning curves of the fine-tunings</h2><p class=note>{note}</p>{_key()}{out}"


def _keys(cells: Iterable[Entry]) -> set[tuple[str, str, int]]:
    return {(c.task, c.method, c.shots) for c in cells}


def _key() -> str:
    spans = "".join(f'<span><i style="background:var(--{i})"></i>{text}</span>' for i, text in plots.INITS.items())
    return f"<div class=key>{spans}</div>"
