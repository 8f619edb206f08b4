"""The signal propagation plot: measured against the law, in the three panels of Brock et al. 2021a."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.storage import objects

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from nfnet.analysis.signal_propagation import SignalPropagation

# Wong's colours, told apart with any kind of colour vision; lines differ in style as well.
MEASURED, LAW, NOISE, INK, MUTED, RULE = "#0072B2", "#D55E00", "#009E73", "#22252a", "#6b7079", "#dfe1e5"
PANELS = (
    ("squared_mean", "Average channel squared mean"),
    ("variance", "Average channel variance"),
    ("residual_variance", "Residual average channel variance"),
)
# Names may hold a dollar sign, which is not the start of a formula.
STYLE: Any = {"font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "text.parse_math": False}
FORMATS = (".png", ".svg", ".pdf")


def draw_signal(
    path: str,
    *,
    title: str,
    subtitle: str,
    measured: SignalPropagation,
    law: SignalPropagation | None,
    on_noise: SignalPropagation | None = None,
) -> None:
    """Write the plot; the file's ending (one of FORMATS) decides its kind.

    Args:
        law: what theory says for this network, where it says anything.
        on_noise: what theory says where pooled shortcuts meet independent pixels.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12.5, 4.4), layout="constrained")
        figure.suptitle(title, x=0.008, ha="left", fontsize=13, color=INK, fontweight="bold")
        figure.supxlabel(subtitle, x=0.008, ha="left", fontsize=8.5, color=MUTED)
        handles: dict[str, Any] = {}
        for axes, (name, label) in zip(figure.subplots(1, 3), PANELS, strict=True):
            stem = 0 if name == "residual_variance" else 1
            series = [("measured", measured, {"color": MEASURED, "marker": "o", "ms": 4, "lw": 1.6, "zorder": 3})]
            if law is not None:
                series.append(("predicted", law, {"color": LAW, "ls": "--", "lw": 1.8, "zorder": 4}))
            if on_noise is not None:
                style = {"color": NOISE, "ls": ":", "lw": 2.6, "zorder": 5}
                series.append(("predicted where pooled shortcuts average independent pixels", on_noise, style))
            blocks: list[float] = []
            for text, signal, style in series:
                ys = getattr(signal, name)
                blocks += [y for y in ys[stem:] if math.isfinite(y)]
                handles[text] = axes.plot(range(1, len(signal.transitions) + 1), ys[stem:], label=text, **style)[0]
            _scale(axes, blocks, is_mean=name == "squared_mean")
            if stem:
                _stem(axes, getattr(measured, name)[0], None if law is None else getattr(law, name)[0])
            _stages(axes, measured)
            axes.set_title(label, fontsize=10.5, color=INK, loc="left", pad=18)
        figure.legend(
            handles.values(),
            handles.keys(),
            loc="outside upper right",
            ncols=3,
            frameon=False,
            fontsize=9,
            labelcolor=INK,
        )
        drawn = io.BytesIO()
        figure.savefig(drawn, format=Path(path).suffix[1:].lower(), dpi=150, facecolor="white")
        objects.write_bytes(path, drawn.getvalue())


def _scale(axes: Axes, values: list[float], *, is_mean: bool) -> None:
    """Logarithmic where the values span more than a factor of 20 and none is 0; from 0 otherwise."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = min(values), max(values)
    if low > 0 and high / low > 20:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 500 else (1.0,)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        # A squared mean of nearly nothing should look like that, and not fill the panel with its noise.
        axes.set_ylim(-0.03 * max(high, 0.1 if is_mean else 0.0), 1.12 * max(high, 0.1 if is_mean else 0.0))


def _stem(axes: Axes, measured: float, predicted: float | None) -> None:
    """The stem next to the blocks: it is no block, and where it pools it would set the scale of the whole panel."""
    low, high = axes.get_ylim()
    if predicted is not None and low <= predicted <= high:
        axes.plot([-0.25, 0.25], [predicted, predicted], color=LAW, lw=1.8, zorder=4)
    if low <= measured <= high:
        axes.plot([0], [measured], color=MEASURED, marker="o", ms=4.5, mfc="white", mew=1.4, zorder=5)
        return
    edge, sign = (1, "↑") if measured > high else (0, "↓")
    axes.annotate(
        f"{sign} {measured:.2g}",
        (0, edge),
        xytext=(0, -9 if edge else 9),
        xycoords=axes.get_xaxis_transform(),
        textcoords="offset points",
        ha="center",
        va="center",
        fontsize=8,
        color=MEASURED,
    )


def _stages(axes: Axes, signal: SignalPropagation) -> None:
    """A line where each stage begins, its number on top, and the house's plain frame."""
    starts = [i for i, starts in enumerate(signal.transitions) if starts]
    last = len(signal.transitions)
    if not starts or starts[0] > 0:
        starts = [0, *starts]
    for number, (start, end) in enumerate(zip(starts, [*starts[1:], last], strict=True), 1):
        axes.axvline(start + 0.5, color=MUTED, lw=0.8, alpha=0.6, zorder=1)
        axes.annotate(
            f"stage {number}" if len(starts) <= 4 and end - start > last / 8 else f"{number}",
            ((start + end + 1) / 2, 1),
            xytext=(0, 4),
            xycoords=axes.get_xaxis_transform(),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=MUTED,
        )
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(-0.8, last + 0.6)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))
    axes.set_xlabel("block (0: stem)", fontsize=9, color=MUTED)
    quiet(axes)


def quiet(axes: Axes) -> None:
    """Rules for the eye along the values, and nothing else but the curves."""
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(RULE)
    axes.grid(axis="y", color=RULE, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0, colors=MUTED, labelsize=9)
