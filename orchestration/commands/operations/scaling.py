"""`normfree plan --scaling`: what finished runs say of loss, model size and epochs for a budget."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestration.commands.output import doing, say
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.planning.scaling import FinishedRun, Scaling


def scaling(args: argparse.Namespace) -> int:
    """Fit, print, draw."""
    from orchestration.figures.signal_figure import FORMATS
    from pipeline.planning.scaling import fit

    if args.budget is not None and not 0 < args.budget < math.inf:
        raise UserError(f"--budget is {args.budget}; set a number above 0, in the unit of the runs' compute")
    if args.plot and Path(args.plot).suffix.lower() not in FORMATS:
        raise UserError(f"--plot is {args.plot!r}; end the file's name in {', '.join(FORMATS)}")
    with doing("fitting"):
        found = fit(_runs(args.scaling))
    report = _report(found, args.budget)
    if args.plot:
        from orchestration.figures.scaling_figure import draw_scaling

        title = f"{len(found.runs)} runs, {len(found.frontier)} of them beaten by no cheaper one"
        draw_scaling(args.plot, found, title=title, budget=args.budget)
        report["plot"] = args.plot
    if args.json:
        print(json.dumps(report, indent=1))
    else:
        say(*_lines(found, report, args.budget))
    return 0


def _runs(place: str) -> list[FinishedRun]:
    from pipeline.planning.scaling import read

    if "://" in place and not place.startswith(("s3://", "gs://", "file://")):
        from orchestration.operations.scaling_runs import from_tracker

        return from_tracker(place)
    return read(place)


def _report(found: Scaling, budget: float | None) -> dict[str, Any]:
    report: dict[str, Any] = {
        "runs": len(found.runs),
        "frontier": [run.name for run in found.frontier],
        "slopes": {what: asdict(found.slope(what)) for what in found.lines},
    }
    if budget is not None:
        report |= {"budget": budget, "beyond": found.reach(budget)}
        report["proposal"] = {what: asdict(found.at(what, budget)) for what in found.lines}
    return report


def _lines(found: Scaling, report: dict[str, Any], budget: float | None) -> list[str]:
    lines = [
        f"{len(found.runs)} runs; a line through the {len(found.frontier)} that no cheaper run beats, 90 % intervals from "
        "drawing them anew:"
    ]
    for what, slope in report["slopes"].items():
        lines.append(f"  {what:<10} ~ compute ^ {slope['value']:.3f}  ({slope['low']:.3f} to {slope['high']:.3f})")
    if budget is not None:
        lines.append(f"for a budget of {budget:.4g}, {report['beyond']:.3g} times the dearest run:")
        for what, e in report["proposal"].items():
            lines.append(f"  {what:<10} {e['value']:.4g}  ({e['low']:.4g} to {e['high']:.4g})")
        if report["beyond"] > 10:
            lines.append("  that is far beyond what was tried: run one of a tenth of the budget first")
    return [*lines, *([f"made {report['plot']}"] if "plot" in report else [])]
