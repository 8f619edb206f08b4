"""How the report's plots look: their colours, axes and texts, and their way into a page as SVG."""

import hashlib
import html
import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from pipeline.display import shortened, visible

# Matplotlib writes colours into the SVG; these stand for the page's variables and are replaced by them afterwards.
SOURCES = ("pretrained", "second", "third", "fourth", "fifth", "sixth")
"""Colours of sources, by their place; a seventh takes the first again."""
MARKS = {name: f"#0102{i:02x}" for i, name in enumerate(("ink", "muted", "rule", "scratch", *SOURCES), 3)}
PRINT = {
    "ink": "#22252a",
    "muted": "#6b7079",
    "rule": "#dfe1e5",
    "scratch": "#c4632d",
    **dict(zip(SOURCES, ("#14708a", "#6a4c93", "#4d7c0f", "#a3195b", "#8a6d14", "#3b5bb5"), strict=True)),
}

DASHES = {"-": "none", "--": "6 3", ":": "2 2", "-.": "7 2 2 2"}
"""Strokes of lines: matplotlib's name, and SVG's pattern for the key."""

MAX_LABEL_CHARACTERS = 48


def color_of(source: str, sources: Sequence[str]) -> str:
    """Name of a source's colour."""
    return SOURCES[(sources.index(source) if source in sources else 0) % len(SOURCES)]


def line_style(index: int) -> tuple[str, str]:
    """(name of the colour, stroke) of the line at a place: the first 24 look differently."""
    strokes = list(DASHES)
    return SOURCES[index % len(SOURCES)], strokes[index // len(SOURCES) % len(strokes)]


def log_axis(axes: Axes, which: str) -> None:
    getattr(axes, f"set_{which}scale")("log")
    axis = getattr(axes, f"{which}axis")
    low, high = axes.dataLim.intervalx if which == "x" else axes.dataLim.intervaly
    wide = which == "x" and high > 30 * low  # digits of neighbours would meet
    axis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("e-0", "e-")))


def quiet() -> Any:
    settings: Any = {"font.sans-serif": ["DejaVu Sans"], "svg.fonttype": "none", "svg.hashsalt": "normfree"}
    return matplotlib.rc_context({"font.family": "sans-serif", **settings})


def new_figure(
    width_in: float, height_in: float, *, empty: bool = False, padding_in: float = 0.04
) -> tuple[Figure, Any]:
    # Without pyplot: no global state, no display, nothing to close.
    layout = ConstrainedLayoutEngine(w_pad=padding_in, h_pad=padding_in, wspace=0.03, hspace=0.05)
    figure = Figure(figsize=(width_in, height_in), layout=layout)
    return figure, None if empty else figure.add_subplot()


def dress(axes: Axes, colors: dict[str, str], x: str, y: str, grid: str = "y") -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(colors["rule"])
    axes.patch.set_alpha(0)
    axes.grid(axis=grid, color=colors["rule"], lw=0.8)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0, colors=colors["muted"], labelsize=9)
    axes.set_xlabel(x, color=colors["muted"], fontsize=9)
    axes.set_ylabel(y, color=colors["muted"], fontsize=9)


def literal(text: str) -> str:
    """`text` as it is: a dollar sign is not the start of a formula. Too long a name would leave the plot no room."""
    return shortened(text, MAX_LABEL_CHARACTERS).replace("$", r"\$")


def svg(figure: Figure, label: str) -> Markup:
    """Inline SVG: scales with its place, takes its colours and its style from the page, names nothing outside.

    Matplotlib escapes the texts in it.
    """
    out = io.StringIO()
    with quiet():
        figure.patch.set_alpha(0)
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(
        r"<defs>\s*<style[^>]*>[^<]*</style>\s*</defs>", "", text
    )  # the page's own style says it for all figures
    for name, color in MARKS.items():
        text = text.replace(color, f"var(--{name})")
    text = re.sub(r"'?DejaVu Sans'?(?:, [^;\"]*)?", "var(--sans)", text)
    head, _, body = text.partition(">")
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None
    # Matplotlib names groups alike in every figure, and shapes by their content: in one page the names must differ.
    body = re.sub(r'<g id="[^"]*"', "<g", body).replace("xlink:href", "href")
    own = hashlib.sha256((label + body).encode()).hexdigest()[:8]
    body = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>s{own}-", body)
    label = html.escape(visible(label), quote=True)
    return Markup(f'<svg {box[0]} role="img" aria-label="{label}">{body}')
