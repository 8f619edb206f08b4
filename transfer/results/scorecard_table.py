"""The one description of the scorecard as a table: its columns, what stands in a cell, and the rules that stand under it.

The terminal, the page and MLflow's notes draw these columns and rules; the CSV file is `transfer.report.scorecard_csv`'s.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from transfer.protocol.imagenet_labels import is_extra as is_further
from transfer.results.scorecard import Row, difference_text, shots_text, value_text, with_extra_metrics
from transfer.results.statistics import OF_TEST_IMAGES, Estimate

BELOW, FIXED = "†", "‡"
"""Marks of a value below its baseline, and of one where nothing is drawn."""


@dataclass(frozen=True)
class Column:
    field: str
    """Of `Row`."""
    title: str
    is_number: bool = False


COLUMNS = (
    Column("task_title", "task"),
    Column("metric", "metric"),
    Column("backbone", "source"),
    Column("method", "method"),
    Column("shots", "shots", is_number=True),
    Column("pretrained", "pretrained", is_number=True),
    Column("scratch", "from scratch", is_number=True),
    Column("gain", "gain", is_number=True),
    Column("n", "n", is_number=True),
    Column("p_holm", "p (Holm)", is_number=True),
    Column("verdict", "verdict"),
)
BASELINES = ("chance", "majority", "prevalence")


@dataclass(frozen=True)
class Line:
    """One row where it stands in the table."""

    row: Row
    first_words: str
    """The task where it begins, or again below a further metric; the metric where that is one of the row above; else ""."""
    is_extra: bool
    """By a further metric."""
    begins_task: bool

    def text(self, column: Column) -> str:
        """What stands in a cell, as plain text. It may hold anything that a name from outside holds."""
        row = self.row
        match column.field:
            case "task_title":
                return self.first_words
            case "metric":
                return row.facts.label
            case "pretrained" | "scratch":
                value: Estimate | None = getattr(row, column.field)
                return value_text(value, row.facts) + self.marks(value)
            case "gain":
                return difference_text(row.gain, row.facts)
            case "p_holm":
                return p_text(row.p_holm)
            case "verdict":
                words = ["damaged"] if row.damage else [row.verdict]
                return ", ".join(words + ([f"{row.num_failed} failed"] if row.num_failed else []))
            case "shots":
                return shots_text(row.shots)
        return str(getattr(row, column.field))

    def marks(self, value: Estimate | None) -> str:
        """` †` or ` ‡` or both, as `notes` explains them."""
        marks = (BELOW if self.row.is_below_baseline(value) else "") + (FIXED if _is_fixed(value) else "")
        return f" {marks}" if marks else ""


def p_text(p: float | None) -> str:
    return "-" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def _is_fixed(value: Estimate | None) -> bool:
    return value is not None and value.rule in OF_TEST_IMAGES


def has_several_sources(rows: Iterable[Row]) -> bool:
    return len({row.backbone for row in rows}) > 1


def columns_of(rows: Sequence[Row]) -> list[Column]:
    """The source is named only where there are several."""
    return [column for column in COLUMNS if column.field != "backbone" or has_several_sources(rows)]


def lines_of(rows: Iterable[Row]) -> list[Line]:
    """Rows in their order, each followed by its further metrics."""
    lines: list[Line] = []
    for row in with_extra_metrics(rows):
        previous = lines[-1] if lines else None
        begins = previous is None or previous.row.task != row.task
        is_extra = is_further(row.metric)
        shows_task = begins or (previous is not None and previous.is_extra)
        words = row.facts.title if is_extra else row.task_title if shows_task else ""
        lines.append(Line(row, words, is_extra, begins))
    return lines


def notes(rows: Sequence[Row]) -> list[str]:
    """The rules by which the table is to be read, a sentence or two each; they stand under it wherever it is drawn."""
    lines = with_extra_metrics(rows)
    sides = [(row, side) for row in lines for side in (row.pretrained, row.scratch) if side]
    num = sum(row.p_holm is not None for row in lines)
    found = []
    if any(side.rule == "logit t" for _, side in sides):
        found.append(
            "mean [95 % interval]: Student's t over seeds, on the logit scale so that it stays in the metric's range; "
            "a seed draws the training images and the new head"
        )
    if rules := sorted({side.rule for _, side in sides if side.rule in OF_TEST_IMAGES}):
        names = " and ".join({"wilson": "Wilson's score interval", "bootstrap": "a bootstrap"}[rule] for rule in rules)
        found.append(f"{FIXED} nothing is drawn: one value, with {names} of the test images")
    if num:
        found.append(
            f"gain ± half width of the 95 % t interval over n pairs of one seed; wins and loses: paired t test, p below 0.05 "
            f"after Holm's correction over the {num} {'row' if num == 1 else 'rows'} with a p" + _uncorrected(lines)
        )
    if any(row.gain is None for row in lines):
        found.append("no pair: nothing to compare with; n counts the values that there are")
    if any(row.gain and row.gain.p is None for row in lines):
        found.append("one pair: a difference without an interval permits no verdict")
    for title, text in _baselines(rows).items():
        found.append(f"without looking at the images, {title}: {text}")
    if any(row.is_below_baseline(side) for row, side in sides):
        found.append(f"{BELOW} below what chance or the most frequent class gives")
    return found


def _uncorrected(lines: Sequence[Row]) -> str:
    more = sum(row.verdict_uncorrected != row.verdict for row in lines)
    return f"; uncorrected {more} more would have a direction (CSV: verdict_uncorrected)" if more else ""


def _baselines(rows: Sequence[Row]) -> dict[str, str]:
    """Chance and the most frequent class by task and metric; of several supports the largest."""
    found: dict[str, dict[str, float]] = {}
    facts = {}
    for row in rows:
        if row.baselines:
            title = f"{row.task_title}, {row.facts.short}"
            there = found.setdefault(title, dict(row.baselines))
            found[title] = {k: max(v, there.get(k, v)) for k, v in row.baselines.items()}
            facts[title] = row.facts
    return {
        title: ", ".join(
            f"{name} {facts[title].text(values[name])} {facts[title].unit}".rstrip()
            for name in BASELINES
            if name in values
        )
        for title, values in found.items()
    }
