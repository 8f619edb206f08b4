"""The report as one HTML page that stands alone: no script, no font, no picture from anywhere else.

Every text that comes from data goes through `esc`. A link that leads nowhere is a defect of this program: `render` raises.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from transfer.report import plots
from transfer.report.html_cells import cells_section
from transfer.report.html_curves import curves, key, learning
from transfer.report.html_elements import esc, hours, plain, plural
from transfer.report.html_errors import mistakes, overlaps
from transfer.report.html_provenance import origin
from transfer.report.html_search import search_table
from transfer.report.html_style import STYLE
from transfer.report.html_tables import comparison_table, costs, failures, scorecard_table, side_by_side
from transfer.results.comparison import Versus
from transfer.results.contamination import Cleaned, Upstream
from transfer.results.scorecard import Row, shots_order, shots_phrase
from transfer.results.sweep_results import Findings

Clean = Mapping[str, tuple[Upstream, list[Cleaned]]]


def render(findings: Findings, rows: Sequence[Row], versus: Sequence[Versus] = (), clean: Clean | None = None) -> str:
    """The whole page. RuntimeError if a link in it leads nowhere."""
    title, sources = _headline(rows), list(dict.fromkeys(row.backbone for row in rows))
    sections = [
        _head(findings, rows, title),
        _summary(rows, sources, versus),
        side_by_side(rows, sources),
        scorecard_table(rows),
        curves(rows, sources),
        overlaps(findings, clean or {}),
        mistakes(findings),
        search_table(findings, sources),
        learning(findings, sources),
        failures(findings),
        costs(findings),
        cells_section(findings),
        origin(findings, rows),
    ]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{esc(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><main>\n{chr(10).join(filter(None, sections))}\n</main></body></html>\n"
    )
    check_links(page)
    return page


def check_links(page: str) -> None:
    """RuntimeError if a link has no target, a target is there twice, or something is fetched from elsewhere."""
    ids = Counter(re.findall(r'\sid="([^"]*)"', page))
    twice = [name for name, num in ids.items() if num > 1]
    nowhere = sorted(set(re.findall(r'href="#([^"]*)"', page)) - set(ids))
    outside = re.findall(r"""(?:src|href)\s*=\s*["'](?!#|data:)[^"']*""", page)
    if twice or nowhere or outside:
        raise RuntimeError(f"links of the page: nowhere {nowhere[:5]}, twice {twice[:5]}, outside {outside[:5]}")


def headline_shots(rows: Sequence[Row]) -> int:
    """The number of images a class that the page's first sentence is about: 5, or the nearest that was run."""
    return min({row.shots for row in rows}, key=lambda s: (abs(shots_order(s) - plots.HEADLINE_SHOTS), s))


def _headline(rows: Sequence[Row]) -> str:
    shots = headline_shots(rows)
    here = [row for row in rows if row.shots == shots]
    counts = Counter(row.verdict for row in here)
    num_judged = len(here) - counts["one seed"] - counts["no pair"]
    at = "with all images" if shots == 0 else f"at {shots_phrase(shots)}"
    if num_judged == 0:
        return f"No verdict {at} yet: each comparison has one seed, or lacks its twin"
    # Comparisons and not tasks: counting a task as won when any of several methods wins would flatter.
    text = f"Pretraining wins {counts['wins']} of {plural(num_judged, 'comparison')} {at}"
    return text + (f", and loses {counts['loses']}" if counts["loses"] else "")


def _head(findings: Findings, rows: Sequence[Row], title: str) -> str:
    shots = headline_shots(rows)
    gains = [row for row in rows if row.shots == shots and row.gain]
    best = max(gains, key=lambda row: row.gain.mean if row.gain else 0.0, default=None)
    lead = ""
    if best is not None and best.gain is not None and best.pretrained and best.scratch:
        of = f" of {esc(best.backbone)}" if len({row.backbone for row in rows}) > 1 else ""
        lead = (
            f"<p class=lead>The largest gain at {esc(shots_phrase(shots))} is on {esc(best.task_title)} by "
            f"{esc(best.method_title)}{of}: {100 * best.pretrained.mean:.1f} % against "
            f"{100 * best.scratch.mean:.1f} % from scratch, {plain(best.gain, sign=True)} points.</p>"
        )
    finals = [cell for cell in findings.cells if cell.kind == "final"]
    seeds = sorted({len(entries) for entries in findings.by_cell().values()})
    facts = [
        (str(len({row.task for row in rows})), "tasks"),
        (f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}" if seeds else "0", "seeds a cell"),
        (f"{len(finals):,}", "final trials"),
        (f"{len(findings.cells) - len(finals):,}", "search trials"),
        (hours(sum(cell.seconds_s for cell in findings.cells)), "of computing"),
    ]
    if num_sources := len({row.backbone for row in rows}) - 1:
        facts.insert(1, (str(num_sources + 1), "sources"))
    if num_failed := sum(not cell.is_ok for cell in findings.cells):
        facts.append((f"<em>{num_failed}</em>", "failed trials"))
    cards = "".join(f"<div class=fact><b>{value}</b><span>{esc(name)}</span></div>" for value, name in facts)
    said = [
        str(folder.sweep.get(key)) for folder in findings.folders for key in ("model", "suite") if folder.sweep.get(key)
    ]
    kicker = " · ".join(["normfree scorecard", *dict.fromkeys(said)])
    return (
        f"<header><p class=kicker>{esc(kicker)}</p><h1>{esc(title)}</h1>{lead}<div class=facts>{cards}</div></header>"
    )


def _summary(rows: Sequence[Row], sources: Sequence[str], versus: Sequence[Versus]) -> str:
    shots = headline_shots(rows)
    figure = ""
    if any(row.gain and row.shots == shots for row in rows):
        figure = (
            f"<p class=note>Gain over a from-scratch twin of equal budget, at {esc(shots_phrase(shots))}.</p>"
            f"{key(sources) if len(sources) > 1 else ''}<figure class=wide>{plots.gains(rows, shots, sources)}</figure>"
        )
    table = comparison_table(versus)
    return f"<h2>What pretraining is worth</h2>{figure}{table}" if figure or table else ""
