"""The verdicts of several experiments as one table: in the terminal, as CSV, and as one HTML page."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text

from pipeline.display import terminal
from transfer.lab.experiment import Experiment
from transfer.lab.page import WIDTH, sides_of
from transfer.lab.verdict import Verdict
from transfer.report.html_page import whole_page
from transfer.report.html_template import fill, plural
from transfer.report.scorecard_csv import csv_text
from transfer.report.write_report import text_console, text_table, write_files
from transfer.sweep.ledger import SweepInfo

TITLES = ("experiment", "claim", "source", "setting", "criterion", "verdict", "why", "what would settle it")


@dataclass(frozen=True, kw_only=True)
class Told:
    """What one experiment says."""

    experiment: Experiment
    found: Verdict | None
    info: SweepInfo
    data: str


def claim_cells(told: Told) -> list[list[str]]:
    """A line for each comparison of the claim."""
    e = told.experiment
    setting = f"{told.data.rstrip('/').rpartition('/')[2]}, {e.trunk}, {e.epochs:g} epochs, {plural(e.seeds, 'seed')}"
    if e.shots:
        setting += f", {e.shots} images a class"
    if told.found is None:
        return []
    return [
        [e.name, e.claim, e.source, setting, sides_of(one.comparison), one.word, one.reason, e.settles]
        for one in told.found.judged
    ]


def print_claims(told: Sequence[Told]) -> None:
    shown = (0, 4, 5, 6)
    table = text_table([(TITLES[i], False) for i in shown])
    for cells in (row for one in told for row in claim_cells(one)):
        table.add_row(*(Text(terminal(cells[i])) for i in shown))
    text_console(WIDTH).print(table)


def write_claims(told: Sequence[Told], out: str) -> dict[str, str]:
    """Writes claims.csv and claims.html under `out`; {kind: path or URL}."""
    rows = [row for one in told for row in claim_cells(one)]
    words = [one.found.word for one in told if one.found]
    section = fill(
        "claims.html.j2",
        facts=[(words.count(word), word) for word in ("passes", "fails", "unclear")],
        titles=TITLES,
        rows=rows,
        hardware=told[0].info.hardware,
        sweeps=[(one.experiment.name, one.info.command) for one in told],
    )
    page = whole_page("The papers' claims", [section])
    return write_files(out, {"csv": ("claims.csv", csv_text([TITLES, *rows])), "html": ("claims.html", page)})
