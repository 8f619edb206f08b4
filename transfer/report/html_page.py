"""The report as one HTML page that stands alone: no script, no font, no picture from anywhere else, and none would be allowed.

A link that leads nowhere is a defect of this program: `render` raises.
"""

import base64
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser

from markupsafe import Markup

from transfer.report import plots
from transfer.report.html_cells import cells_section, provenance
from transfer.report.html_curves import colors_of, curves, learning
from transfer.report.html_errors import measures, mistakes, overlaps
from transfer.report.html_search import search_table
from transfer.report.html_tables import costs, failures, scorecard_table, side_by_side
from transfer.report.html_template import fill, hours, plural
from transfer.results.comparison import Versus
from transfer.results.contamination import Cleaned, Upstream
from transfer.results.error_analysis import CellMeasures
from transfer.results.scorecard import Row, shots_order, shots_phrase
from transfer.results.scorecard_table import has_several_sources
from transfer.results.statistics import smallest_p
from transfer.results.sweep_results import Findings

Clean = Mapping[str, tuple[Upstream, list[Cleaned]]]


def render(
    findings: Findings,
    rows: Sequence[Row],
    versus: Sequence[Versus] = (),
    clean: Clean | None = None,
    measured: Sequence[CellMeasures] = (),
) -> str:
    """The whole page. RuntimeError if a link in it leads nowhere."""
    title, sources = _headline(rows), list(dict.fromkeys(row.backbone for row in rows))
    sections = [
        _header(findings, rows, title),
        _summary(rows, sources, versus),
        side_by_side(rows, sources),
        scorecard_table(rows),
        curves(rows, sources),
        overlaps(findings, clean or {}),
        measures(measured),
        mistakes(findings),
        search_table(findings, sources),
        learning(findings, sources),
        failures(findings),
        costs(findings),
        cells_section(findings),
        provenance(findings, rows),
    ]
    return whole_page(title, sections)


def whole_page(title: str, sections: Sequence[str]) -> str:
    """One HTML file, whose links have been looked at."""
    page = str(fill("page.html.j2", title=title, policy=policy(), sections=sections)) + "\n"
    check_links(page)
    return page


def policy(*, script: str = "") -> str:
    """A page's Content-Security-Policy: its own style, and the template `script`, by their digests, pictures that it holds
    itself, and nothing else.

    Attributes `style` stay allowed: Matplotlib's SVG has one in every shape.
    """
    scripts = f"script-src {_digest(script)}; " if script else ""
    return (
        f"default-src 'none'; img-src data:; {scripts}style-src 'unsafe-inline'; style-src-elem {_digest('style.css')}; "
        "style-src-attr 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    )


def _digest(template: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(fill(template).encode()).digest()).decode()}'"


class _Links(HTMLParser):
    """The places of a page, what leads to them, and whatever would load or run something."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: Counter[str] = Counter()
        self.inside: set[str] = set()
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("base", "embed", "form", "iframe", "link", "object", "script"):
            self.outside.append(f"<{tag}>")
        for name, value in attrs:
            if name == "id":
                self.ids[value or ""] += 1
            elif name.startswith("on"):
                self.outside.append(f"{name} of <{tag}>")
            elif name in ("href", "xlink:href", "src"):
                if (value or "").startswith("#"):
                    self.inside.add((value or "")[1:])
                elif not (value or "").startswith("data:image/"):
                    self.outside.append(f"{name} of <{tag}>: {value}")


def check_links(page: str, own: Sequence[str] = ()) -> None:
    """RuntimeError if a link has no target, a target is there twice, or something would run or be fetched from elsewhere.

    Args:
        own: what of this the page has by right, each as often as it stands here.
    """
    found = _Links()
    found.feed(page)
    found.outside = list((Counter(found.outside) - Counter(own)).elements())
    twice = [name for name, num in found.ids.items() if num > 1]
    nowhere = sorted(found.inside - set(found.ids))
    if twice or nowhere or found.outside:
        raise RuntimeError(f"links of the page: nowhere {nowhere[:5]}, twice {twice[:5]}, outside {found.outside[:5]}")


def headline_shots(rows: Sequence[Row]) -> int:
    """The number of images a class that the page's first sentence is about: 5, or the nearest that was run."""
    return min({row.shots for row in rows}, key=lambda s: (abs(shots_order(s) - plots.HEADLINE_SHOTS), s))


def _headline(rows: Sequence[Row]) -> str:
    shots = headline_shots(rows)
    here = [row for row in rows if row.shots == shots]
    counts = Counter(row.verdict for row in here)
    num_judged = len(here) - counts["one pair"] - counts["no pair"]
    at = "with all images" if shots == 0 else f"at {shots_phrase(shots)}"
    if num_judged == 0:
        return f"No verdict {at} yet: each comparison has one seed, or lacks its from-scratch baseline"
    # Comparisons and not tasks: counting a task as won when any of several methods wins would flatter.
    text = f"Pretraining wins {counts['wins']} of {plural(num_judged, 'comparison')} {at}"
    return text + (f", and loses {counts['loses']}" if counts["loses"] else "")


def _header(findings: Findings, rows: Sequence[Row], title: str) -> Markup:
    shots = headline_shots(rows)
    gains = [row for row in rows if row.shots == shots and row.gain and row.pretrained and row.scratch]
    finals = [cell for cell in findings.cells if cell.kind == "final"]
    seeds = sorted({len(entries) for entries in findings.by_cell().values()})
    facts = [
        counted(len({row.task for row in rows}), "task"),
        (f"{seeds[0]} to {seeds[-1]}", "seeds a cell")
        if len(seeds) > 1
        else counted(max(seeds, default=0), "seed", " a cell"),
        counted(len(finals), "final trial"),
        counted(len(findings.cells) - len(finals), "search trial"),
        (hours(sum(cell.seconds_s for cell in findings.cells)), "of computing"),
    ]
    if num_sources := len({row.backbone for row in rows}) - 1:
        facts.insert(1, (str(num_sources + 1), "sources"))
    if num_failed := sum(not cell.is_ok for cell in findings.cells):
        facts.append(counted(num_failed, "failed trial"))
    names = [folder.sweep.get(key) for folder in findings.folders for key in ("model", "suite")]
    return fill(
        "header.html.j2",
        title=title,
        kicker=" · ".join(["normfree scorecard", *dict.fromkeys(str(name) for name in names if name)]),
        best=_best(gains),
        several_sources=has_several_sources(rows),
        facts=facts,
    )


def counted(num: int, word: str, more: str = "") -> tuple[str, str]:
    """Of the page's facts: the number, and what it counts."""
    return f"{num:,}", word + "s" * (num != 1) + more


def _best(rows: Sequence[Row]) -> Row | None:
    """The largest gain among rows of the first one's kind of metric; None where pretraining gains nothing anywhere."""
    alike = [row for row in rows if row.facts.family == rows[0].facts.family]
    best = max(alike, key=_gain_of, default=None)
    return best if best is not None and _gain_of(best) > 0 else None


def _gain_of(row: Row) -> float:
    """Positive where pretraining helps."""
    mean = row.gain.mean if row.gain else 0.0
    return mean if row.facts.larger_is_better else -mean


def _summary(rows: Sequence[Row], sources: Sequence[str], versus: Sequence[Versus]) -> str:
    """What pretraining is worth: the gains as bars, and the comparison of sources over tasks."""
    shots = headline_shots(rows)
    shown = [row for row in rows if row.shots == shots and row.gain]
    families = plots.grouped(shown, lambda row: row.facts.family)  # what may stand on one axis
    if not shown and not versus:
        return ""
    return fill(
        "summary.html.j2",
        shots=shots,
        plots=[plots.gains(part, shots, sources) for part in families.values()],
        colors=colors_of(sources),
        versus=versus,
        several=len({v.a for v in versus}) > 1,
        smallest_p=smallest_p(5),
    )
