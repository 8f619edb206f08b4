"""From sweeps' ledgers to a scorecard: who wins, by how much, and how sure that is.

Reads what the sweeps wrote (and, for pictures and overlaps, the test images that they were measured on), so a report can be made
anywhere and any time. A number without its records is not shown (`check_lineage`; `check_links` for the page). Shares (0 to 1)
everywhere inside; points and per cent only where people read.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.display import shortened, terminal
from pipeline.storage import objects
from transfer.metric_facts import METRIC_FACTS
from transfer.report.scorecard_csv import measures_to_csv, to_csv
from transfer.results.comparison import Versus, comparisons
from transfer.results.contamination import cleaned, read_overlaps
from transfer.results.error_analysis import measures_of_cells
from transfer.results.scorecard import Row, difference_text, scorecard, shots_text, value_text
from transfer.results.scorecard_table import columns_of, lines_of, notes, p_text
from transfer.results.sweep_results import load_findings
from transfer.results.trial_records import check_lineage
from transfer.results.vtab_score import vtab_scores

MAX_CELL_CHARACTERS = 60
LOG_WIDTH = 160
"""In a log, a line that is cut at 80 characters has lost its verdict."""

OVER_TASKS_COLUMNS = (
    *(("over tasks", False), ("of", False), ("method", False), ("shots", True), ("difference", True)),
    *(("wins-ties-losses", False), ("n tasks", True), ("p", True), ("p (Holm)", True), ("verdict", False)),
)
"""Title, and whether of numbers."""
OVER_TASKS = (
    "± over tasks, + is better; p: exact sign-flip test, two-sided, and after Holm's correction over these lines; "
    "below 6 tasks it cannot reach 0.05"
)


def print_table(rows: Sequence[Row], stream: TextIO | None = None, *, width: int = LOG_WIDTH) -> None:
    """The scorecard in the terminal, or `width` characters wide where that is none."""
    columns = columns_of(rows)
    table = text_table([(c.title, c.is_number) for c in columns], wraps_first=True)
    styles = {"wins": "green", "loses": "red"}
    for line in lines_of(rows):
        cells = [Text(shortened(line.text(column), MAX_CELL_CHARACTERS)) for column in columns]
        if line.is_extra:
            cells[0].pad_left(2)
        cells[-1].stylize(styles.get(line.row.verdict, "dim"))
        table.add_row(*cells)
    console = text_console(width, stream)
    console.print(table)
    for note in notes(rows):
        console.print(Text(terminal(note), style="dim"))
    for row in rows:
        if row.damage:
            console.print(Text(terminal(f"damaged: {row.task} {row.method} {shots_text(row.shots)}: {row.damage}")))
    for one in vtab_scores(rows):
        if one.groups:
            texts = {group: value_text(value, METRIC_FACTS["top1"]) for group, value in one.groups.items()}
            parts = ", ".join(f"{group} {text}" for group, text in texts.items() if group != "all")
            score = f"{texts['all']} % over 19 tasks ({parts}), n = {one.groups['all'].n}"
        else:
            score = f"none: {one.num_tasks} of 19 tasks are there, and a mean over fewer is not the score"
        console.print(Text(terminal(f"VTAB-1k score of {one.start} by {one.method}: {score}")))


def print_comparisons(found: Sequence[Versus]) -> None:
    """Sources against each other over tasks, where a table has several tasks or sources."""
    if not any(versus.result.difference.n > 1 for versus in found):
        return
    table = text_table(OVER_TASKS_COLUMNS)
    several = len({v.a for v in found}) > 1
    for v in found:
        r = v.result
        sides = f"{v.a if several else 'pretrained'} - {v.b}"
        counts = f"{r.wins}-{r.ties}-{r.losses}"
        cells = (
            *(sides, v.family, v.method, shots_text(v.shots), difference_text(r.difference, v.facts), counts),
            *(r.difference.n, f"{r.p_value:.3g}", p_text(r.p_holm), r.verdict),
        )
        table.add_row(*(Text(shortened(cell, MAX_CELL_CHARACTERS)) for cell in cells))
    console = text_console()
    console.print(table)
    console.print(Text(terminal(OVER_TASKS), style="dim"))


def text_table(columns: Iterable[tuple[str, bool]], *, wraps_first: bool = False) -> Table:
    """A table of columns (title, whether of numbers)."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for index, (title, is_number) in enumerate(columns):
        table.add_column(title, justify="right" if is_number else "left", no_wrap=not (wraps_first and index == 0))
    return table


def text_console(width: int = LOG_WIDTH, stream: TextIO | None = None) -> Console:
    console = Console(file=stream, highlight=False)
    if not console.is_terminal:
        console.width = width
    return console


def write_report(
    sweep_urls: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out_dir: str | os.PathLike[str],
    *,
    overlaps: Sequence[str] = (),
    data_root: str = "",
    show: bool = True,
) -> dict[str, str]:
    """Prints the scorecard (`show`), writes scorecard.csv, .html, .png and measures.csv under `out_dir`; {kind: path or URL}.

    Args:
        sweep_urls: one folder, or several to stand side by side.
        overlaps: words of `transfer.results.contamination.read_overlaps`.
        data_root: where the datasets lie now; "" = where the sweeps say.
    Raises:
        UserError: what does not compare, records that are gone, or an overlap that fits no task.
    """
    from transfer.report.html_page import render
    from transfer.report.plots import picture

    urls = [sweep_urls] if isinstance(sweep_urls, str | os.PathLike) else list(sweep_urls)
    findings = load_findings(*urls, data_root=data_root)
    check_lineage(findings)
    rows = scorecard(findings.cells, findings.damages)
    versus = comparisons(rows)
    upstream = read_overlaps(overlaps, findings)
    clean = {task: (found, cleaned(findings, found)) for task, found in upstream.items()}
    measured = measures_of_cells(findings)
    if show:
        print_table(rows)
        print_comparisons(versus)
        for line in (line for one in findings.played for line in (*one.wrong, *one.not_played)):
            print(terminal(line))
    files: dict[str, tuple[str, str | bytes]] = {
        "csv": ("scorecard.csv", to_csv(rows)),
        "html": ("scorecard.html", render(findings, rows, versus, clean, measured)),
        "png": ("scorecard.png", picture(rows)),
        "measures": ("measures.csv", measures_to_csv(measured)),
    }
    return write_files(out_dir, files)


def write_files(out: str | os.PathLike[str], files: Mapping[str, tuple[str, str | bytes]]) -> dict[str, str]:
    """Of a report {kind: (name, content)}, under `out`; {kind: path or URL}. What is written was made whole before: a page that
    does not build leaves nothing behind."""
    paths = {kind: objects.join(out, name) for kind, (name, _) in files.items()}
    for kind, (_, content) in files.items():
        objects.write_bytes(paths[kind], content.encode() if isinstance(content, str) else content)
    return paths
