"""Writes the numbers of the front pages from the committed scorecards: `python -m transfer.readme_numbers`. A test compares them.

A page marks a place, and what follows up to the end mark is written anew:

    <!-- numbers: docs/results/demo/scorecard.csv table -->      the terminal's table, with its rules
    <!-- numbers: docs/results/demo/scorecard.csv at 5 -->       gains at 5 images a class, a column a method
    <!-- /numbers -->
"""

import io
import re
import sys
from pathlib import Path

from pipeline.display import markdown
from pipeline.errors import UserError
from transfer.report.scorecard_csv import from_csv
from transfer.report.write_report import print_table
from transfer.results.scorecard import Row, difference_text

PAGES = ("README.md", "docs/results/README.md")
PLACE = re.compile(r"(<!-- numbers: (\S+) (table|at (\d+)) -->\n).*?(<!-- /numbers -->)", re.DOTALL)
TABLE_WIDTH = 140


def current(text: str, root: Path) -> str:
    """A page's text with the numbers that the scorecards under `root` hold. UserError for a scorecard that is not there."""

    def numbers(place: re.Match[str]) -> str:
        file = root / place[2]
        if not file.is_file():
            raise UserError(f"there is no scorecard {place[2]}; correct the mark, or commit the file")
        rows = from_csv(file.read_text())
        return place[1] + (_at(rows, int(place[4])) if place[4] else _table(rows)) + place[5]

    return PLACE.sub(numbers, text)


def _table(rows: list[Row]) -> str:
    stream = io.StringIO()
    print_table(rows, stream, width=TABLE_WIDTH)
    return "```\n" + "".join(f"{line.rstrip()}\n" for line in stream.getvalue().splitlines()) + "```\n"


def _at(rows: list[Row], shots: int) -> str:
    here = [row for row in rows if row.shots == shots]
    methods = list(dict.fromkeys(row.method for row in here))
    lines = [["task", *methods], ["---"] * (1 + len(methods))]
    for task in dict.fromkeys(row.task_title for row in here):
        cells = {row.method: _cell(row) for row in here if row.task_title == task}
        lines.append([markdown(task), *(cells.get(method, "-") for method in methods)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(row: Row) -> str:
    if row.pretrained is None or row.scratch is None:
        return "-"
    gain = difference_text(row.gain, row.facts)
    ours, theirs = (f"{row.facts.text(side.mean)} {row.facts.unit}".rstrip() for side in (row.pretrained, row.scratch))
    return f"{ours} against {theirs}: " + (f"**{gain}**" if row.verdict in ("wins", "loses") else f"{gain}, not clear")


if __name__ == "__main__":
    top = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    for page in map(top.joinpath, PAGES):
        page.write_text(current(page.read_text(), top))
