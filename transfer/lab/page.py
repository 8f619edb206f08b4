"""A laboratory's table as text, CSV and one HTML page in the scorecard's style."""

import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from rich.text import Text

from pipeline.configuration import to_dict
from pipeline.display import terminal
from transfer.lab.experiment import Comparison, Experiment
from transfer.lab.table import LabRow, Mean
from transfer.lab.verdict import Verdict
from transfer.measurement.downstream import PREFIX
from transfer.report import plots
from transfer.report.html_page import whole_page
from transfer.report.html_template import fill, hours, plural, record
from transfer.report.plot_style import DASHES, line_style
from transfer.report.scorecard_csv import csv_text
from transfer.report.write_report import text_console, text_table, write_files
from transfer.sweep.ledger import Ledger

HEAD = ("method", "batch", "rate", "seeds", "diverged")
"""Of the CSV."""
NUMBERS = (
    *("accuracy", "train_accuracy", "mode_gap", "eval_sample", "reestimated", "images_per_s", "clipped_share"),
    *("gradient_norm", "train_loss", "squared_mean", "variance", "dead_share", "unit_correlation", "effective_beta"),
    *("loss_range", "weights_size", "multiply_adds", "mutual_information", "speed_ratio", "step_bytes", "memory_ratio"),
    *("largest_rate", "unstable_rate", "downstream"),
)
"""Statistics of the CSV, in shares."""
WIDTH = 270


def _percent(mean: Mean | None, *, sign: bool = False) -> str:
    if mean is None:
        return "–"
    value = f"{100 * mean.value:+.1f}" if sign else f"{100 * mean.value:.1f}"
    return f"{value} ± {100 * mean.error:.1f}" if mean.n > 1 else value


def _number(mean: Mean | None, form: str, *, unit: float = 1.0) -> str:
    return "–" if mean is None else format(mean.value / unit, form)


def _anew(row: LabRow) -> str:
    """Change of the test accuracy with averages that are taken again, in points."""
    again, held = row.mean("reestimated"), row.mean("eval_sample")
    return "–" if again is None or held is None else f"{100 * (again.value - held.value):+.1f}"


COLUMNS: tuple[tuple[str, Callable[[LabRow], str]], ...] = (
    ("method", lambda row: row.line.shown),
    ("batch", lambda row: f"{row.line.batch}"),
    ("rate", lambda row: "–" if row.rate is None else f"{row.rate:g}"),
    ("seeds", lambda row: f"{len(row.good)}"),
    ("diverged", lambda row: f"{row.num_diverged}"),
    ("test %", lambda row: _percent(row.mean("accuracy"))),
    ("train %", lambda row: _percent(row.mean("train_accuracy"))),
    ("modes", lambda row: _percent(row.mean("mode_gap"), sign=True)),
    ("averages anew", _anew),
    ("downstream %", lambda row: _percent(row.mean("downstream"))),
    ("images/s", lambda row: _number(row.mean("images_per_s"), ".0f")),
    ("speed / BN", lambda row: _number(row.mean("speed_ratio"), ".2f")),
    ("memory / BN", lambda row: _number(row.mean("memory_ratio"), ".2f")),
    ("clipped %", lambda row: _percent(row.mean("clipped_share"))),
    ("dead %", lambda row: _percent(row.mean("dead_share"))),
    ("correlation", lambda row: _number(row.mean("unit_correlation"), ".2f")),
    ("information", lambda row: _number(row.mean("mutual_information"), ".3f")),
    ("beta", lambda row: _number(row.mean("effective_beta"), ".3g")),
    ("M mult-adds", lambda row: _number(row.mean("multiply_adds"), ".1f", unit=1e6)),
    ("memory MiB", lambda row: f"{max(e.max_memory_bytes for e in row.good) / 2**20:.0f}" if row.good else "–"),
    ("s a trial", lambda row: f"{fmean(e.seconds_s for e in row.good):.0f}" if row.good else "–"),
    ("largest rate", lambda row: row.largest.text if row.largest else "–"),
)
TITLES = tuple(title for title, _ in COLUMNS)


def cells_of(row: LabRow) -> list[str]:
    """The row as the table shows it."""
    return [cell(row) for _, cell in COLUMNS]


def print_lab(experiment: Experiment, rows: Sequence[LabRow], found: Verdict | None) -> None:
    table = text_table([(title, index > 0) for index, title in enumerate(TITLES)])
    for row in rows:
        table.add_row(*(Text(terminal(cell)) for cell in cells_of(row)))
    console = text_console(WIDTH)
    console.print(table)
    if found is None:
        return
    for one in found.judged:
        console.print(Text(terminal(f"{sides_of(one.comparison)}: {one.word}, {one.reason}")))
    console.print(Text(terminal(f"claim {experiment.name}: {found.word}")))


def sides_of(comparison: Comparison) -> str:
    high, low = _short(comparison.high), _short(comparison.low)
    if comparison.high_over and comparison.low_over:
        high, low = (
            f"gain of {high} over {_short(comparison.high_over)}",
            f"gain of {low} over {_short(comparison.low_over)}",
        )
    return f"{high} above {low} by {comparison.statistic}"


def _short(side: dict[str, Any]) -> str:
    return " ".join(str(v) if k == "method" else f"{k} {v:g}" for k, v in side.items())


def to_csv(rows: Sequence[LabRow]) -> str:
    """A line each, as stored: means over seeds and their standard errors."""
    cards = sorted({name for row in rows for e in row.good for name in e.measures if name.startswith(PREFIX)})
    statistics = (*NUMBERS, *cards)
    lines: list[list[object]] = [[*HEAD, *(name for s in statistics for name in (s, f"{s}_error"))]]
    for row in rows:
        means = [row.mean(statistic) for statistic in statistics]
        numbers = [n for m in means for n in (("", "") if m is None else (m.value, m.error))]
        head = (row.line.shown, row.line.batch, row.rate, len(row.good), row.num_diverged)
        lines.append([*head, *numbers])
    return csv_text(lines)


def render(experiment: Experiment, rows: Sequence[LabRow], found: Verdict | None, sweep_url: str) -> str:
    info = Ledger(sweep_url).info()
    entries = [e for row in rows for e in (*row.entries, *row.searched)]
    facts = [
        (len(rows), "lines"),
        (len(entries), "trials"),
        (hours(sum(e.seconds_s for e in entries)), "of trials"),
        *([(found.word, "verdict")] if found else []),
    ]
    names, styles = names_of(rows), [line_style(i) for i in range(len(rows))]
    section = fill(
        "lab.html.j2",
        kicker=f"laboratory · {experiment.trunk} · {plural(experiment.seeds, 'seed')} · {experiment.epochs:g} epochs",
        title=experiment.title or experiment.name,
        experiment=experiment,
        facts=facts,
        judged=_judged(found),
        titles=TITLES,
        lines=[cells_of(row) for row in rows],
        accuracies=_accuracies(rows, names),
        key=[(color, DASHES[stroke], name) for name, (color, stroke) in zip(names, styles, strict=True)],
        figures=_figures(rows),
        hardware=info.hardware,
        command=info.command,
        settings=record(to_dict(experiment)),
    )
    return whole_page(experiment.title or experiment.name, [section])


def names_of(rows: Sequence[LabRow]) -> list[str]:
    """Of each line: its method, and batch and rate where the lines differ in them."""
    batches, rates = {row.line.batch for row in rows}, {row.line.rate for row in rows}
    return [
        row.line.shown
        + (f", batch {row.line.batch}" if len(batches) > 1 else "")
        + (f", rate {row.line.rate:g}" if len(rates) > 1 and row.line.rate is not None else "")
        for row in rows
    ]


def _accuracies(rows: Sequence[LabRow], names: Sequence[str]) -> Any:
    """Figure of all lines that finished; None where none did."""
    means = [(name, row.mean("accuracy")) for name, row in zip(names, rows, strict=True)]
    lines = [(name, 100 * mean.value, 100 * mean.error) for name, mean in means if mean is not None]
    return plots.lab_accuracies(lines) if lines else None


def _judged(found: Verdict | None) -> list[dict[str, Any]]:
    return [
        {
            "high": _short(one.comparison.high),
            "low": _short(one.comparison.low),
            "statistic": one.comparison.statistic,
            "difference": "–" if one.difference is None else f"{one.difference:+.3g}",
            "noise": "–" if math.isnan(one.noise) else f"{one.noise:.3g}",
            "word": one.word,
            "reason": one.reason,
        }
        for one in (found.judged if found else [])
    ]


def _figures(rows: Sequence[LabRow]) -> list[tuple[str, str, Any]]:
    """Training loss over steps, and what each block's output has at the end, of each line's first seed."""
    first = [(i, row.good[0]) for i, row in enumerate(rows) if row.good]
    losses = [(i, [r["step"] for r in e.history], [r["loss"] for r in e.history]) for i, e in first if e.history]
    figures = []
    if losses:
        figures.append(("Training loss", "over steps, first seed", plots.lab_lines(losses, "step", "training loss")))
    for name, text in (
        ("variance", "average channel variance after each block"),
        ("squared_mean", "average channel squared mean after each block"),
        ("gradient_norm_by_part", "gradient norm by part of the network, last update"),
        ("clipped_share_by_part", "share of units clipped by part of the network"),
        ("dead_share", "share of channels that never change, by depth: what each convolution reads"),
        ("unit_correlation", "mean absolute correlation of two channels, by depth"),
        ("mutual_information", "mean mutual information of two channels, in nats, by depth"),
    ):
        series = []
        for i, e in first:
            values = e.measures.get(name)
            if isinstance(values, list):
                series.append((i, [float(k) for k in range(len(values))], values))
        if series:
            figures.append(
                (name.replace("_", " "), text, plots.lab_lines(series, "block, part or layer", name.replace("_", " ")))
            )
    return figures


def write_lab_report(
    experiment: Experiment, rows: Sequence[LabRow], found: Verdict | None, *, sweep_url: str, out: str
) -> dict[str, str]:
    """Writes lab.csv and lab.html under `out`; {kind: path or URL}."""
    page = render(experiment, rows, found, sweep_url)
    return write_files(out, {"csv": ("lab.csv", to_csv(rows)), "html": ("lab.html", page)})
