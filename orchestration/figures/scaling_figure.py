"""Loss, model size and epochs against compute: the runs, the lines through the best of them, the proposal for a budget."""

import io
from typing import Any

import numpy as np

from orchestration.figures.signal_figure import INK, LAW, MEASURED, MUTED, RULE, STYLE
from pipeline.planning.scaling import HIGH, LOW, Scaling
from pipeline.storage import objects

PANELS = (
    ("loss", "Held-out loss"),
    ("parameters", "Parameters of the best runs"),
    ("epochs", "Epochs of the best runs"),
)


def draw_scaling(path: str, scaling: Scaling, *, title: str, budget: float | None) -> None:
    """Write the plot; the file's ending (.png, .svg, .pdf) decides its kind."""
    import matplotlib
    from matplotlib.figure import Figure

    compute = [run.compute for run in scaling.runs]
    ends = [min(compute), max([*compute, budget or 0.0])]
    grid = np.geomspace(ends[0], ends[1], 60)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12.5, 4.4), layout="constrained")
        figure.suptitle(title, x=0.008, ha="left", fontsize=13, color=INK, fontweight="bold")
        for axes, (what, label) in zip(figure.subplots(1, 3), PANELS, strict=True):
            found = [scaling.at(what, float(c)) for c in grid]
            axes.fill_between(grid, [e.low for e in found], [e.high for e in found], color=LAW, alpha=0.15, lw=0,
                              label=f"{HIGH - LOW:.0f} % interval")  # fmt: skip
            axes.plot(grid, [e.value for e in found], color=LAW, ls="--", lw=1.8, label="fit")
            others: list[Any] = [run for run in scaling.runs if run not in scaling.frontier]
            axes.plot(
                [r.compute for r in others],
                [getattr(r, what) for r in others],
                "x",
                color=MUTED,
                ms=5,
                label="other runs",
            )
            axes.plot([r.compute for r in scaling.frontier], [getattr(r, what) for r in scaling.frontier], "o", color=MEASURED,
                      ms=5, label="beaten by no cheaper run")  # fmt: skip
            if budget is not None:
                axes.axvline(budget, color=INK, lw=1, ls=":", label="budget")
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xlabel("compute, in the runs' own unit", color=MUTED)
            axes.set_title(label, fontsize=10, color=INK)
            axes.grid(color=RULE, lw=0.6)
        axes.legend(fontsize=8, frameon=False)
        content = io.BytesIO()
        figure.savefig(content, format=path.rpartition(".")[2].lower(), dpi=140)
    objects.write_bytes(path, content.getvalue())
