"""The report's plots: as SVG that takes the page's colours (light and dark), and as one picture for a README."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from transfer.ledger import Entry
from transfer.report import METHODS, SHORT, Row, shots_order, shots_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INITS = {"pretrained": "pretrained", "scratch": "from scratch"}
# Matplotlib writes colours into the SVG; these stand for the page's variables and are replaced by them afterwards.
MARKS = {"ink": "#010201", "muted": "#010202", "rule": "#010203", "pretrained": "#010204", "scratch": "#010205"}
PRINT = {"ink": "#22252a", "muted": "#6b7079", "rule": "#dfe1e5", "pretrained": "#14708a", "scratch": "#c4632d"}
HEADLINE_SHOTS = 5


def few_shot(rows: Sequence[Row], finals: Sequence[Entry]) -> str:
    """Accuracy over images a class for one task and method, with intervals and each seed as a dot."""
    figure, axes = _figure(4.6, 3.0)
    draw_few_shot(axes, rows, finals, MARKS)
    return _svg(figure, f"{rows[0].task_title}, {METHODS.get(rows[0].method, rows[0].method)}: accuracy over shots")


def draw_few_shot(axes: Axes, rows: Sequence[Row], finals: Sequence[Entry], colors: dict[str, str]) -> None:
    shots = sorted({row.shots for row in rows}, key=shots_order)
    place = {value: x for x, value in enumerate(shots)}  # even steps: 1, 5, 10, 25 are about even in the logarithm
    for init, shift in (("scratch", 0.06), ("pretrained", -0.06)):
        points = [(place[row.shots] + shift, e) for row in rows if (e := getattr(row, init)) is not None]
        points.sort(key=lambda point: point[0])
        if not points:
            continue
        xs, means = [x for x, _ in points], [100 * e.mean for _, e in points]
        bars = [100 * (e.half_width or 0.0) for _, e in points]
        color = colors[init]
        axes.errorbar(xs, means, yerr=bars, color=color, lw=1.8, marker="o", ms=5, elinewidth=1.2, capsize=0)
        mine = [c for c in finals if c.init == init and (c.task, c.method) == (rows[0].task, rows[0].method)]
        # Beside the interval and not on it, where they would drown.
        dots = [(place[c.shots] + 2.2 * shift, 100 * c.value) for c in mine if c.shots in place and c.value is not None]
        axes.scatter([x for x, _ in dots], [y for _, y in dots], s=10, color=color, alpha=0.4, linewidths=0)
    low, high = axes.get_ylim()
    axes.set_ylim(max(0.0, low), min(100.0, high) + 1.5)
    axes.set_xticks(range(len(shots)), [shots_text(value) for value in shots])
    axes.set_xlim(-0.4, len(shots) - 0.6)
    _dress(axes, colors, "images a class", "test accuracy, %")


def gains(rows: Sequence[Row], shots: int) -> str:
    """Gain of pretraining at `shots` images a class, a bar for each task and method, with intervals."""
    here = [row for row in rows if row.shots == shots and row.gain is not None]
    methods = [m for m in METHODS if any(row.method == m for row in here)]
    best = {row.task: max(r.gain.mean for r in here if r.task == row.task and r.gain) for row in here}
    tasks = sorted(best, key=lambda task: best[task])
    figure, axes = _figure(8.2, 0.9 + 0.26 * len(tasks) * len(methods) + 0.18 * len(tasks))
    height, titles = 0.78 / max(1, len(methods)), {row.task: row.task_title for row in here}
    for row in here:
        assert row.gain is not None
        y = tasks.index(row.task) + (len(methods) - 1) * height / 2 - methods.index(row.method) * height
        color = MARKS["pretrained"] if row.gain.mean >= 0 else MARKS["scratch"]
        alpha = 1.0 if row.method == "finetune" or len(methods) == 1 else 0.55
        axes.barh(y, 100 * row.gain.mean, height * 0.82, color=color, alpha=alpha, linewidth=0)
        half = 100 * (row.gain.half_width or 0.0)
        axes.errorbar(100 * row.gain.mean, y, xerr=half, color=MARKS["ink"], elinewidth=1.0, capsize=0)
        end = max(0.0, 100 * row.gain.mean + half)
        axes.annotate(
            f"{100 * row.gain.mean:+.1f}".replace("-", "−") + f"  {SHORT.get(row.method, row.method)}",
            (end, y),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=MARKS["muted"],
        )
    axes.set_yticks(range(len(tasks)), [_literal(titles[task]) for task in tasks])
    axes.axvline(0, color=MARKS["ink"], lw=1.0)
    axes.margins(x=0.16)
    _dress(axes, MARKS, "gain over training from scratch, points", "", grid="x")
    return _svg(figure, f"Gain of pretraining at {shots_text(shots)} images a class")


def learning(cells: Sequence[Entry]) -> str:
    """Training loss over steps of the final trials of one task at one number of images a class, a line a seed."""
    figure, axes = _figure(4.6, 2.7)
    positive = True
    for cell in sorted(cells, key=lambda c: c.init, reverse=True):
        rows = [row for row in cell.history if row.get("loss") is not None]
        positive &= all(row["loss"] > 0 for row in rows)
        axes.plot([r["step"] for r in rows], [r["loss"] for r in rows], color=MARKS[cell.init], lw=1.3, alpha=0.8)
    if positive:
        from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    _dress(axes, MARKS, "step", "training loss")
    return _svg(figure, f"{cells[0].task_title}: training loss over steps")


def picture(rows: Sequence[Row], finals: Sequence[Entry], *, dpi: int = 150) -> bytes:
    """The few-shot curves of all tasks and methods as one PNG on white."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    methods = list(dict.fromkeys(row.method for row in rows))
    wide = methods if len(tasks) == 1 else tasks
    num_columns = min(4, len(wide))
    blocks = -(-len(wide) // num_columns)
    num_rows = blocks * (1 if len(tasks) == 1 else len(methods))
    figure, _ = _figure(3.3 * num_columns, 2.75 * num_rows + 0.55, empty=True, padding_in=0.12)
    with _quiet():
        for index, name in enumerate(wide):
            for line, other in enumerate(tasks if len(tasks) == 1 else methods):
                task, method = (other, name) if len(tasks) == 1 else (name, other)
                here = [row for row in rows if (row.task, row.method) == (task, method)]
                if not here:
                    continue
                step = 1 if len(tasks) == 1 else len(methods)
                position = (index // num_columns * step + line) * num_columns + index % num_columns + 1
                axes = figure.add_subplot(num_rows, num_columns, position)
                draw_few_shot(axes, here, finals, PRINT)
                if (position - 1) % num_columns:
                    axes.set_ylabel("")
                axes.set_title(_literal(here[0].task_title), fontsize=10.5, color=PRINT["ink"], loc="left", pad=14)
                axes.annotate(
                    METHODS.get(method, method),
                    (0, 1),
                    xytext=(0, 4),
                    xycoords="axes fraction",
                    textcoords="offset points",
                    fontsize=8.5,
                    color=PRINT["muted"],
                )
        from matplotlib.lines import Line2D

        handles = [Line2D([], [], color=PRINT[i], marker="o", ms=5, lw=1.8, label=text) for i, text in INITS.items()]
        figure.legend(
            handles=handles, loc="outside upper left", ncols=2, frameon=False, fontsize=9.5, labelcolor=PRINT["ink"]
        )
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    return out.getvalue()


def _quiet() -> Any:
    import matplotlib

    settings: Any = {"font.sans-serif": ["DejaVu Sans"], "svg.fonttype": "none", "svg.hashsalt": "normfree"}
    return matplotlib.rc_context({"font.family": "sans-serif", **settings})


def _figure(width_in: float, height_in: float, *, empty: bool = False, padding_in: float = 0.04) -> tuple[Figure, Any]:
    # Without pyplot: no global state, no display, nothing to close.
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=padding_in, h_pad=padding_in, wspace=0.03, hspace=0.05)
    figure = Figure(figsize=(width_in, height_in), layout=layout)
    return figure, None if empty else figure.add_subplot()


def _dress(axes: Axes, colors: dict[str, str], x: str, y: str, grid: str = "y") -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(colors["rule"])
    axes.patch.set_alpha(0)
    axes.grid(axis=grid, color=colors["rule"], lw=0.8)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0, colors=colors["muted"], labelsize=9)
    axes.set_xlabel(x, color=colors["muted"], fontsize=9)
    axes.set_ylabel(y, color=colors["muted"], fontsize=9)


def _literal(text: str) -> str:
    """Dollar signs in a title are not the start of a formula."""
    return text.replace("$", r"\$")


def _svg(figure: Figure, label: str) -> str:
    """Inline SVG: scales with its place, takes its colours from the page, names nothing outside."""
    out = io.StringIO()
    with _quiet():
        figure.patch.set_alpha(0)
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    for name, color in MARKS.items():
        text = text.replace(color, f"var(--{name})")
    text = re.sub(r"'?DejaVu Sans'?(?:, [^;\"]*)?", "var(--sans)", text)
    head, _, body = text.partition(">")
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {spaces} {box[0]} role="img" aria-label="{html.escape(label, quote=True)}">{body}'
