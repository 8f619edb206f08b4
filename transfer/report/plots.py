"""The report's plots: as SVG that takes the page's colours (light and dark), and as one picture for a README."""

import io
from collections.abc import Callable, Sequence
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from transfer.metric_facts import facts_of
from transfer.report.plot_style import (
    MARKS,
    PRINT,
    SOURCES,
    color_of,
    dress,
    line_style,
    literal,
    log_axis,
    new_figure,
    quiet,
    svg,
)
from transfer.results.scorecard import Row, shots_order, shots_phrase, shots_text
from transfer.sweep.entry import LedgerEntry

HEADLINE_SHOTS = 5


def color_of_start(cell: LedgerEntry, sources: Sequence[str]) -> str:
    """Name of the colour of what a trial began from."""
    return "scratch" if cell.init == "scratch" else color_of(cell.backbone, sources)


def few_shot(rows: Sequence[Row], sources: Sequence[str]) -> Markup:
    """A metric over images a class for one task and method, a line for each source, with intervals and each seed as a dot."""
    figure, axes = new_figure(4.6, 3.0)
    draw_few_shot(axes, rows, sources, MARKS)
    return svg(figure, f"{rows[0].task_title}, {rows[0].method_title}: {rows[0].metric} over shots")


def draw_few_shot(axes: Axes, rows: Sequence[Row], sources: Sequence[str], colors: dict[str, str]) -> None:
    shots = sorted({row.shots for row in rows}, key=shots_order)
    last, scale = max((s for s in shots if s > 0), default=1), rows[0].facts.scale
    place = {s: float(s) if s > 0 else 2.5 * last for s in shots}  # "all" stands to the right, at no number
    for baseline, group in grouped(rows, lambda row: row.baseline).items():
        some = grouped([r for r in group if r.scratch], lambda row: row.backbone)
        if some:
            first = next(iter(some.values()))
            style = "-" if baseline == rows[0].baseline else ":"
            _line(
                axes, [(place[r.shots], r.scratch, r.values[1]) for r in first], colors["scratch"], 0.97, style, scale
            )
    for source, group in grouped([r for r in rows if r.pretrained], lambda row: row.backbone).items():
        points = [(place[r.shots], r.pretrained, r.values[0]) for r in group]
        _line(axes, points, colors[color_of(source, sources)], 1.03, "-", scale)
    facts = rows[0].facts
    low, high = axes.get_ylim()
    if facts.within is not None:
        ends = [facts.scale * end for end in facts.within]
        axes.set_ylim(max(ends[0], low), min(ends[1] + 0.015 * (ends[1] - ends[0]), high + 0.005 * (ends[1] - ends[0])))
    axes.set_xscale("log")
    axes.set_xticks([place[s] for s in shots], [shots_text(s) for s in shots])
    axes.set_xticks([], minor=True)
    axes.set_xlim(min(place.values()) / 1.35, max(place.values()) * 1.35)
    dress(axes, colors, "images a class", metric_label(rows[0].metric))


def _line(axes: Axes, points: list[Any], color: str, shift: float, style: str, scale: float) -> None:
    """Means with their intervals as a band, and each seed as a pale dot next to its mean."""
    points.sort(key=lambda point: point[0])
    xs, estimates = [x for x, _, _ in points], [e for _, e, _ in points]
    axes.plot(xs, [scale * e.mean for e in estimates], style, color=color, lw=1.8, marker="o", ms=4.5)
    low = [scale * (e.mean if e.low is None else e.low) for e in estimates]
    high = [scale * (e.mean if e.high is None else e.high) for e in estimates]
    if len(points) > 1:
        axes.fill_between(xs, low, high, color=color, alpha=0.15, lw=0)
    else:
        axes.vlines(xs, low, high, color=color, lw=1.2)
    dots = [(x * shift**2, scale * value) for x, _, values in points for value in values.values()]
    axes.scatter([x for x, _ in dots], [y for _, y in dots], s=9, color=color, alpha=0.4, linewidths=0)


def gains(rows: Sequence[Row], shots: int, sources: Sequence[str]) -> Markup:
    """Gain of pretraining at `shots` images a class, a bar for each task, method and source, with intervals."""
    here = [row for row in rows if row.shots == shots and row.gain is not None]
    kinds = list(dict.fromkeys((row.method, row.backbone) for row in here))
    best = {row.task: max(r.gain.mean for r in here if r.task == row.task and r.gain) for row in here}
    tasks = sorted(best, key=lambda task: best[task])
    facts = here[0].facts
    figure, axes = new_figure(8.2, 0.9 + 0.26 * len(tasks) * len(kinds) + 0.18 * len(tasks))
    height, titles = 0.78 / max(1, len(kinds)), {row.task: row.task_title for row in here}
    for row in here:
        assert row.gain is not None
        y = tasks.index(row.task) + (len(kinds) - 1) * height / 2 - kinds.index((row.method, row.backbone)) * height
        color = MARKS[color_of(row.backbone, sources)] if row.gain.mean >= 0 else MARKS["scratch"]
        axes.barh(y, facts.scale * row.gain.mean, height * 0.82, color=color, alpha=0.75, linewidth=0)
        half = facts.scale * (row.gain.half_width or 0.0)
        axes.errorbar(facts.scale * row.gain.mean, y, xerr=half, color=MARKS["ink"], elinewidth=1.0, capsize=0)
        axes.annotate(
            facts.text(row.gain.mean, sign=True).replace("-", "−") + f"  {literal(row.method)}",
            (max(0.0, facts.scale * row.gain.mean + half), y),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=MARKS["muted"],
        )
    axes.set_yticks(range(len(tasks)), [literal(titles[task]) for task in tasks])
    axes.axvline(0, color=MARKS["ink"], lw=1.0)
    axes.margins(x=0.2)
    dress(axes, MARKS, f"gain over training from scratch, {facts.difference_unit}", "", grid="x")
    return svg(figure, f"Gain of pretraining at {shots_phrase(shots)}")


def learning(cells: Sequence[LedgerEntry], sources: Sequence[str]) -> Markup:
    """Training loss over steps of the final trials of a task and method at one number of images a class, a line a seed."""
    figure, axes = new_figure(4.6, 2.7)
    positive = True
    for cell in sorted(cells, key=lambda c: c.init, reverse=True):
        rows = [row for row in cell.history if row.get("loss") is not None]
        positive &= all(row["loss"] > 0 for row in rows)
        color = MARKS[color_of_start(cell, sources)]
        axes.plot([r["step"] for r in rows], [r["loss"] for r in rows], color=color, lw=1.3, alpha=0.8)
    if positive:
        log_axis(axes, "y")
    dress(axes, MARKS, "step", "training loss")
    first = cells[0]
    return svg(figure, f"{first.task_title}, {first.method}, {shots_phrase(first.shots)}: training loss over steps")


def lab_lines(series: Sequence[tuple[int, Sequence[float], Sequence[float]]], x: str, y: str) -> Markup:
    """Lines of (place in the key, xs, ys), on a logarithmic axis where all values allow it."""
    figure, axes = new_figure(4.6, 2.7)
    for index, xs, ys in series:
        color, stroke = line_style(index)
        axes.plot(xs, ys, stroke, color=MARKS[color], lw=1.3, alpha=0.8)
    if all(value > 0 for _, _, ys in series for value in ys):
        log_axis(axes, "y")
    dress(axes, MARKS, x, y)
    return svg(figure, f"{y} over {x}")


def lab_accuracies(lines: Sequence[tuple[str, float, float]]) -> Markup:
    """(name, mean, standard error) of lines in %, the best at the top."""
    figure, axes = new_figure(7.4, 0.8 + 0.21 * len(lines))
    found = sorted(lines, key=lambda line: line[1])
    places, (names, means, errors) = range(len(found)), zip(*found, strict=True)
    axes.errorbar(means, places, xerr=errors, fmt="o", color=MARKS[SOURCES[0]], ms=4.5, lw=1.3)
    axes.set_yticks(places, [literal(name) for name in names])
    axes.set_ylim(-0.7, len(found) - 0.3)
    dress(axes, MARKS, "test accuracy, %", "", grid="x")
    return svg(figure, "test accuracy of each line")


def held_out(searched: Sequence[tuple[LedgerEntry, bool]], sources: Sequence[str]) -> Markup:
    """The metric on the held-out part over steps, a line for each candidate of a search, and whether it was chosen.

    Of one task, method and number of images a class. The chosen candidate of each start is drawn strong.
    """
    figure, axes = new_figure(4.6, 2.7)
    for cell, chosen in sorted(searched, key=lambda pair: (pair[1], pair[0].init != "scratch")):
        color = MARKS[color_of_start(cell, sources)]
        steps = [r["step"] for r in cell.history]
        values = [facts_of(cell.metric).scale * r["accuracy"] for r in cell.history]
        strong = {"lw": 1.8, "ms": 4.5} if chosen else {"lw": 1.0, "ms": 3.0, "alpha": 0.4}
        axes.plot(steps, values, color=color, marker="o", **strong)
    first = searched[0][0]
    axes.margins(y=0.12)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    dress(axes, MARKS, "step", metric_label(first.metric))
    return svg(figure, f"{first.task_title}, {first.method}, {shots_phrase(first.shots)}: held-out metric over steps")


Tried = Sequence[tuple[dict[str, Any], float | None]]
"""Hyper-parameters and score of candidates in the order of trying; None = failed."""


def searched(
    starts: Sequence[tuple[str, Tried, dict[str, Any]]], axes: Sequence[tuple[str, float, float, str]]
) -> Markup:
    """Scores of a model's candidates in their order, with the best so far, and over each range on its own scale.

    Args:
        starts: (colour, candidates, hyper-parameters of the chosen one) of each.
        axes: (name, low, high, "log" or "linear").
    """
    num_columns = min(4, 1 + len(axes))
    num_rows = -(-(1 + len(axes)) // num_columns)
    figure, _ = new_figure(2.5 * num_columns, 2.2 * num_rows, empty=True)
    for index, (name, low, high, scale) in enumerate(
        [("trial", 0.5, 0.5 + max(len(t) for _, t, _ in starts), ""), *axes]
    ):
        plot = figure.add_subplot(num_rows, num_columns, index + 1)
        for color, tried, chosen in starts:
            places = [float(point[name]) if index else float(n) for n, (point, _) in enumerate(tried, 1)]
            _draw_tried(plot, places, tried, chosen, MARKS[color], lines=not index)
        if scale == "log":
            log_axis(plot, "x")
        plot.set_xlim(*_with_margins(low, high, scale))
        dress(plot, MARKS, literal(name.replace("_", " ")), "" if index % num_columns else "held-out score, %")
    return svg(figure, f"Candidates of a search over {', '.join(name for name, *_ in axes)}")


def _with_margins(low: float, high: float, scale: str) -> tuple[float, float]:
    """A range with room for a ring at either end."""
    if scale == "log":
        return low / (high / low) ** 0.06, high * (high / low) ** 0.06
    return low - 0.06 * (high - low), high + 0.06 * (high - low)


def _draw_tried(
    plot: Axes, places: Sequence[float], tried: Tried, chosen: dict[str, Any], color: str, *, lines: bool
) -> None:
    """Dots; a ring around the chosen one; crosses at the bottom for those that failed; `lines`: the best so far."""
    good = [(x, 100 * score, point) for x, (point, score) in zip(places, tried, strict=True) if score is not None]
    plot.scatter([x for x, *_ in good], [y for _, y, _ in good], s=12, color=color, alpha=0.6, linewidths=0)
    if lines:
        best = [max(y for _, y, _ in good[: n + 1]) for n in range(len(good))]
        plot.step([x for x, *_ in good], best, where="post", color=color, lw=1.4)
    rings = [(x, y) for x, y, point in good if point == chosen][:1]
    plot.scatter(
        [x for x, _ in rings], [y for _, y in rings], s=52, facecolors="none", edgecolors=color, linewidths=1.3
    )
    bad = [x for x, (_, score) in zip(places, tried, strict=True) if score is None]
    plot.plot(bad, [0.03] * len(bad), "x", color=color, ms=4, transform=plot.get_xaxis_transform())


def picture(rows: Sequence[Row]) -> bytes:
    """The few-shot curves of all tasks and methods as one PNG on white."""
    sources = list(dict.fromkeys(row.backbone for row in rows))
    groups = grouped(rows, lambda row: (row.task, row.method))
    tasks, methods = (list(dict.fromkeys(key[i] for key in groups)) for i in (0, 1))
    # One task: a plot for each method side by side. Several: a column for each task, at most four, a line for each method.
    wide, high = (methods, tasks) if len(tasks) == 1 else (tasks, methods)
    num_columns = min(4, len(wide))
    num_rows = -(-len(wide) // num_columns) * len(high)
    one_metric = len({row.metric for row in rows}) == 1
    figure, _ = new_figure(3.3 * num_columns, 2.75 * num_rows + 0.55, empty=True, padding_in=0.12)
    with quiet():
        for (task, method), here in groups.items():
            index, line = (wide.index(method), 0) if len(tasks) == 1 else (wide.index(task), high.index(method))
            position = (index // num_columns * len(high) + line) * num_columns + index % num_columns
            axes = figure.add_subplot(num_rows, num_columns, position + 1)
            draw_few_shot(axes, here, sources, PRINT)
            if (
                position % num_columns and one_metric
            ):  # else a plot would seem to have the metric of the one on its left
                axes.set_ylabel("")
            axes.set_title(literal(here[0].task_title), fontsize=10.5, color=PRINT["ink"], loc="left", pad=14)
            where: dict[str, Any] = {"xytext": (0, 4), "xycoords": "axes fraction", "textcoords": "offset points"}
            axes.annotate(literal(here[0].method_title), (0, 1), fontsize=8.5, color=PRINT["muted"], **where)
        names = {color_of(s, sources): literal(s) if len(sources) > 1 else "pretrained" for s in sources}
        names = {"scratch": "from scratch", **names}
        handles = [Line2D([], [], color=PRINT[c], marker="o", ms=5, lw=1.8) for c in names]
        where = {"loc": "outside upper left", "ncols": min(4, len(handles))}  # above all plots
        figure.legend(handles, names.values(), frameon=False, fontsize=9.5, labelcolor=PRINT["ink"], **where)
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=150, facecolor="white", metadata={"Software": None})
    return out.getvalue()


def grouped(rows: Sequence[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def metric_label(metric: str) -> str:
    facts = facts_of(metric)
    return literal(f"{facts.title}, {facts.unit}" if facts.unit else facts.title)
