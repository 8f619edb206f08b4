"""From sweeps' ledgers to a scorecard: who wins, by how much, and how sure that is.

Reads what the sweeps wrote (and, for pictures and overlaps, the test images that they were measured on), so a report can be made
anywhere and any time. Shares (0 to 1) everywhere inside; points and per cent only where people read.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from pipeline.storage import objects
from transfer.protocol.imagenet_labels import BESIDE
from transfer.results.comparison import Versus, comparisons
from transfer.results.contamination import cleaned, read_overlaps
from transfer.results.scorecard import METRIC_TITLES, Row, percent, scorecard, shots_text, with_beside
from transfer.results.sweep_results import check_lineage, load_entries, load_findings
from transfer.results.vtab_score import vtab_scores

__all__ = [
    "Row",
    "load_entries",
    "load_findings",
    "print_comparisons",
    "print_table",
    "scorecard",
    "to_csv",
    "write_report",
]

LOG_WIDTH = 160
"""In a log, a line that is cut at 80 characters has lost its verdict."""


def print_table(rows: Sequence[Row], stream: TextIO | None = None) -> None:
    """The scorecard in the terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    several = len({row.backbone for row in rows}) > 1
    names = ["task", *(["backbone"] if several else []), "method", "shots"]
    for name in (*names, "pretrained %", "from scratch %", "gain, points", "n", ""):
        text = name in ("task", "backbone", "method", "")
        table.add_column(name, justify="left" if text else "right", no_wrap=name != "task")
    styles = {"wins": "green", "loses": "red"}
    lines = with_beside(rows)
    for row, previous in zip(lines, [None, *lines], strict=False):
        failed = f", {row.num_failed} failed" if row.num_failed else ""
        table.add_row(
            Text(_first_word(row, previous)),
            *([row.backbone] if several else []),
            row.method,
            shots_text(row.shots),
            percent(row.pretrained),
            percent(row.scratch),
            percent(row.gain, sign=True),
            str(max((side.n for side in (row.gain, row.pretrained, row.scratch) if side), default=0)),
            Text(("damaged" if row.damage else row.verdict) + failed, style=styles.get(row.verdict, "dim")),
        )
    console = Console(file=stream, highlight=False)
    if not console.is_terminal:
        console.width = LOG_WIDTH
    console.print(table)
    console.print("± half width of a 95 % Student-t interval over n seeds; the gain is paired by seed", style="dim")
    for row in rows:
        if row.damage:
            console.print(f"damaged: {row.task} {row.method} {shots_text(row.shots)}: {row.damage}", markup=False)
    for one in vtab_scores(rows):
        if one.groups:
            parts = ", ".join(f"{group} {percent(value)}" for group, value in one.groups.items() if group != "all")
            said = f"{percent(one.groups['all'])} % over 19 tasks ({parts}), n = {one.groups['all'].n}"
        else:
            said = f"none: {one.num_tasks} of 19 tasks are there, and a mean over fewer is not the score"
        console.print(f"VTAB-1k score of {one.start} by {one.method}: {said}")


def _first_word(row: Row, previous: Row | None) -> str:
    if row.metric in BESIDE:
        return f"  {METRIC_TITLES[row.metric]}"
    return row.task_title if previous is None or previous.task != row.task or previous.metric in BESIDE else ""


def print_comparisons(found: Sequence[Versus], stream: TextIO | None = None) -> None:
    """Sources against each other over tasks, where a table has several tasks or sources."""
    from rich.console import Console
    from rich.table import Table

    if not any(versus.result.difference.n > 1 for versus in found):
        return
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in ("over tasks", "method", "shots", "difference, points", "wins-ties-losses", "n tasks", "p", ""):
        table.add_column(name, justify="right" if name in ("shots", "difference, points", "n tasks", "p") else "left")
    several = len({v.a for v in found}) > 1
    for v in found:
        r = v.result
        sides = f"{v.a if several else 'pretrained'} - {v.b}"
        counts = f"{r.wins}-{r.ties}-{r.losses}"
        difference = percent(r.difference, sign=True).replace("(one seed)", "(one task)")
        table.add_row(
            sides, v.method, shots_text(v.shots), difference, counts, str(r.difference.n), f"{r.p_value:.3g}", r.verdict
        )
    console = Console(file=stream, highlight=False)
    if not console.is_terminal:
        console.width = LOG_WIDTH
    console.print(table)
    console.print("± over tasks; p: exact sign-flip test, two-sided; below 6 tasks it cannot reach 0.05", style="dim")


def to_csv(rows: Sequence[Row]) -> str:
    """The scorecard as CSV, all values as shares; what a cell is measured by besides is a line of its own, with its metric."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    parts = [f"{side}_{end}" for side in ("pretrained", "scratch", "gain") for end in ("mean", "low", "high", "n")]
    head = ["task", "task_title", "method", "shots", "metric", *parts, "verdict", "num_failed", "protocol_digest"]
    writer.writerow([*head, "backbone", "pretrained_cell", "scratch_cell", "damage"])
    for row in with_beside(rows):
        estimates: list[Any] = []
        for side in (row.pretrained, row.scratch, row.gain):
            estimates += [side.mean, side.low, side.high, side.n] if side else ["", "", "", 0]
        first = [row.task, row.task_title, row.method, row.shots, row.metric]
        last = [row.verdict, row.num_failed, row.protocol_digest, row.backbone, row.pretrained_cell, row.scratch_cell]
        last.append(row.damage)
        writer.writerow([*first, *estimates, *last])
    return out.getvalue()


def write_report(
    sweep_urls: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out_dir: str | os.PathLike[str],
    *,
    overlaps: Sequence[str] = (),
    data_root: str = "",
    show: bool = True,
) -> dict[str, str]:
    """Prints the scorecard (`show`) and writes scorecard.csv, .html and .png under `out_dir`; {kind: path or URL}.

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
    if show:
        print_table(rows)
        print_comparisons(versus)
        for line in (line for one in findings.played for line in (*one.wrong, *one.not_played)):
            print(line)
    files: dict[str, Callable[[], bytes]] = {
        "csv": lambda: to_csv(rows).encode(),
        "html": lambda: render(findings, rows, versus, clean).encode(),
        "png": lambda: picture(rows),
    }
    paths = {kind: objects.join(out_dir, f"scorecard.{kind}") for kind in files}
    made = {
        kind: make() for kind, make in files.items()
    }  # all or nothing: a page that does not build leaves none behind
    for kind, data in made.items():
        objects.write_bytes(paths[kind], data)
    return paths
