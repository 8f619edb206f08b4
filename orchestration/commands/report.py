"""`normfree report`: the scorecard of sweeps, a cell run again, and a leaderboard of all sweeps in a place."""

import argparse
from typing import Any

from orchestration.commands.output import doing, progress_bar, say
from orchestration.commands.parser import add
from pipeline.errors import UserError


def report_command(commands: Any) -> None:
    p = add(
        commands,
        "report",
        report,
        "scorecard of sweeps: table, CSV, HTML page, picture; or one cell of it, run again",
        [
            "normfree report sweeps/demo",
            "normfree report sweeps/c100 sweeps/timm --out docs/results/c100 --overlap cifar10=overlap.csv",
            "normfree report sweeps/demo --rerun digits-ridge-pretrained-5",
            "normfree report --all sweeps s3://bucket/sweeps --out board",
        ],
    )
    p.add_argument("sweep", metavar="URL", nargs="+", help="sweep folders; several stand side by side")
    p.add_argument(
        "--all",
        action="store_true",
        help="the URLs are folders or buckets: all sweeps below them as one page that sorts and filters, leaderboard.html, and "
        "as leaderboard.csv with timm's columns",
    )
    p.add_argument(
        "--out", metavar="DIR", help="default: the first sweep folder's report/; with --all the first folder"
    )
    p.add_argument(
        "--overlap",
        action="append",
        default=[],
        metavar="[TASK=]FILE",
        help="what 'data overlap UPSTREAM TASK --out FILE' wrote: scores with and without these images; again for each task",
    )
    p.add_argument("--data-root", metavar="DIR", help="where the datasets lie now; default: where the sweep read them")
    p.add_argument(
        "--rerun",
        metavar="CELL",
        help="run this cell's trials again; exit 0 if the mean lands in the recorded interval, else 1",
    )


def report(args: argparse.Namespace) -> int:
    from pipeline.storage import objects
    from transfer.report.write_report import write_report

    if args.all:
        return _leaderboard(args)
    if args.rerun:
        return _rerun(args)
    out = args.out or objects.join(args.sweep[0], "report")
    with doing("reading the sweep"):
        paths = write_report(args.sweep, out, overlaps=args.overlap, data_root=args.data_root or "")
    say(*(f"{kind}: {path}" for kind, path in paths.items()))
    return 0


def _leaderboard(args: argparse.Namespace) -> int:
    from pipeline.storage import objects
    from transfer.report import leaderboard
    from transfer.report.html_template import plural

    if given := [name for name in ("--rerun", "--overlap", "--data-root") if getattr(args, name[2:].replace("-", "_"))]:
        raise UserError(f"{given[0]} is of one sweep; leave out --all, and give the sweep's folder")
    out = args.out or args.sweep[0]
    with progress_bar("reading", "sweeps") as update:
        found = leaderboard.board(args.sweep, out, lambda done, total: update("", done, total))
    say(*(f"not shown: {sweep}: {why}" for sweep, why in found.passed_over.items()))
    if not found.places:
        raise UserError("none of these sweeps has a result that can be shown; see above")
    made = {"html": leaderboard.render(found), "csv": leaderboard.to_csv(found.places)}
    for kind, text in made.items():
        objects.write_bytes(objects.join(out, f"leaderboard.{kind}"), text.encode())
    say(f"{plural(len(found.places), 'result')} of {plural(found.num_shown, 'sweep')}")
    say(*(f"{kind}: {objects.join(out, f'leaderboard.{kind}')}" for kind in made))
    return 0


def _rerun(args: argparse.Namespace) -> int:
    """Exit code: 0 the new mean lies in the recorded interval, 1 it does not."""
    from transfer.results.rerun import rerun
    from transfer.results.sweep_results import load_findings

    if len(args.sweep) > 1:
        raise UserError(
            f"--rerun {args.rerun} wants one sweep folder, not {len(args.sweep)}; name the one that has the cell"
        )
    (folder,) = load_findings(args.sweep[0]).folders
    found = rerun(folder, args.rerun, data_root=args.data_root or "", tell=say)
    say(*found.differences)
    recorded, again = found.recorded, found.again
    assert recorded.low is not None and recorded.high is not None
    say(
        f"{found.cell}: {again.mean:.4f} now; recorded {recorded.mean:.4f}, interval {recorded.low:.4f} to "
        f"{recorded.high:.4f} over {recorded.n} seeds",
        "it lands in the recorded interval" if found.lands else "it does NOT land in the recorded interval",
    )
    return 0 if found.lands else 1
