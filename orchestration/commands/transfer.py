"""`normfree transfer`."""

from __future__ import annotations

import argparse
import os
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from orchestration.child_process import cores
from orchestration.commands.output import doing, say
from orchestration.commands.parser import add
from pipeline.display import shell
from pipeline.errors import UserError

if TYPE_CHECKING:
    from transfer.sweep.scheduler import Budget


def transfer_commands(commands: Any) -> None:
    p = add(
        commands,
        "transfer",
        transfer,
        "few-shot and fine-tuning trials on a suite of tasks, against from scratch",
        [
            "normfree transfer timm:resnet18 --data photos --out sweeps/photos",
            "normfree transfer runs/glyphs --suite demo --data-root data --out sweeps/demo",
            "normfree transfer s3://bucket/runs/c100 --suite small_images --data-root data --out sweeps/c100 --seeds 5",
            "normfree transfer ours=runs/c100 runs/convnext 'timm:convnext_atto@atto.safetensors' --suite small_images "
            "--data-root data --out sweeps/compared",
            "normfree transfer nfnet_f0@F0_haiku.npz --suite my.yaml --data-root data --out sweeps/f0 --budget '2 hours'",
        ],
    )
    p.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        nargs="+",
        help="a checkpoint or run folder; NAME@FILE, one of our networks and a file of published weights; timm:NAME[@FILE], "
        "timm's own weights or a local file's. Several stand in one table, each with its from-scratch baseline; LABEL=CHECKPOINT "
        "names one",
    )
    _what(p)
    p.add_argument("--out", required=True, metavar="URL", help="sweep folder; the same command again resumes")
    p.add_argument("--seeds", type=int, help="supports drawn for each cell (default: the suite's)")
    p.add_argument(
        "--scheduler",
        choices=["halving", "hyperband", "asha", "none"],
        default="halving",
        help="which candidates of a search go on: halving and hyperband decide from what is written down, so any two sweeps "
        "select the same; asha is quicker and depends on which trial is first; none stops nobody. A method that states a "
        "search (ranges, in its suite) runs each trial to its end under all of them (default %(default)s)",
    )
    p.add_argument(
        "--budget", metavar="TEXT", help="for this call: '100 trials', '1e6 images', '2 hours', or several with commas"
    )
    p.add_argument("--trial-limit", metavar="TIME", help="a trial that takes longer is a failed one, as '30 minutes'")
    p.add_argument(
        "--max-concurrent",
        type=int,
        metavar="N",
        help="trials at a time (default: one a GPU, else as many as cores and memory allow)",
    )
    p.add_argument(
        "--gpus-per-trial",
        type=float,
        metavar="X",
        help="share of a GPU, 0 to 1, or whole GPUs: as many processes a trial (default: all GPUs over the trials at a time)",
    )
    p.add_argument(
        "--processes-per-trial", type=int, metavar="N", help="of fine-tuning trials, a core or GPU each (default: 1)"
    )
    p.add_argument(
        "--ray-address", metavar="ADDRESS", help="of a cluster, host:port; default: a Ray of its own on this machine"
    )
    p.add_argument(
        "--tracking-uri", metavar="URI", help="MLflow; default: MLFLOW_TRACKING_URI, else SQLite in the sweep folder"
    )


def _what(p: argparse.ArgumentParser) -> None:
    """What is measured: datasets, or a suite and the root of its datasets."""
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--data",
        action="append",
        metavar="URL",
        help="a prepared dataset, or raw images (folder, tar, zip, list) that are prepared below the sweep folder first; "
        "once for each. The protocol follows from their size and is told in the first lines",
    )
    what.add_argument(
        "--suite",
        metavar="SUITE",
        help="name of a suite or path of its YAML ('normfree suites' lists and explains them)",
    )
    p.add_argument("--methods", metavar="A,B", help="with --data: these methods in place of the default ones")
    p.add_argument("--data-root", metavar="URL", help="with --suite: holds one prepared dataset a task, ROOT/<card>")


def transfer(args: argparse.Namespace) -> int:
    """Exit code: 0 all trials have a result, 1 some failed (they are listed, and run again by the same command)."""
    from orchestration.tune.ray_cluster import Resources
    from orchestration.tune.ray_tune import transfer as run_sweep
    from orchestration.tune.sweep_listener import SweepListener
    from pipeline.storage import objects
    from transfer.report.write_report import write_report
    from transfer.results.scorecard import shots_text

    suite = _suite_of(args)
    listener = SweepListener(args)
    result = run_sweep(
        args.checkpoint,
        suite,
        args.out,
        data_root=args.data_root or "",
        num_seeds=args.seeds,
        scheduler=args.scheduler,
        budget=parse_budget(args.budget),
        resources=Resources(
            max_concurrent=args.max_concurrent,
            gpus_per_trial=args.gpus_per_trial,
            processes_per_trial=args.processes_per_trial,
            ray_address=args.ray_address,
            trial_limit_s=parse_time_s(args.trial_limit, "--trial-limit") if args.trial_limit else 0.0,
        ),
        on_event=listener.hear,
    )
    with doing("writing the report"):
        paths = write_report(args.out, objects.join(args.out, "report"))
    for row in result.not_run:
        where = f" {row['method']} at {shots_text(row['shots'])} shots" if row["method"] else ""  # else the whole task
        say(f"not run: {row['task']}{where}: {row['reason']}")
    listener.finish()
    if result.spent:
        say(f"the budget of {result.spent} is spent; the same command goes on where this one ended")
    say(f"made {args.out}: {result.num_run} trials now, {result.num_failed} failed, {result.seconds_s:.0f} s")
    say(*(f"{kind}: {path}" for kind, path in paths.items()))
    shown = shell(["--tracking-uri", args.tracking_uri] if args.tracking_uri else [args.out])
    say(f"next: open {paths['html']}, or: normfree ui {shown}")
    return 1 if result.num_failed else 0


def _suite_of(args: argparse.Namespace) -> Any:
    """What --suite names, or the default one for --data, whose images are prepared now where they are not."""
    from transfer.protocol.own_data import default_suite, prepared

    if args.suite:
        if args.methods:
            raise UserError("--methods goes with --data; a suite states its own methods")
        if not args.data_root:
            raise UserError(
                f"--suite {args.suite} needs --data-root, the folder that holds one prepared dataset a task"
            )
        return args.suite
    if args.data_root:
        raise UserError("--data names the datasets themselves; leave out --data-root")
    places = [prepared(_absolute(place), args.out, workers=cores()) for place in args.data]
    suite, told = default_suite([_absolute(place) for place in places], args.methods.split(",") if args.methods else ())
    say(*told)
    return suite


def _absolute(place: str) -> str:
    return place if "://" in place else os.path.abspath(os.path.expanduser(place))


SECONDS = {"second": 1.0, "minute": 60.0, "hour": 3600.0, "day": 86400.0}


def parse_time_s(text: str, where: str) -> float:
    """Seconds, from "90 seconds", "30 minutes", "2 hours" or "1 day"."""
    match = re.fullmatch(r"\s*([0-9.]+)\s*(second|minute|hour|day)s?\s*", text)
    try:
        found = float(match[1]) * SECONDS[match[2]] if match else 0.0
    except ValueError:
        found = 0.0
    if not found > 0:
        raise UserError(f"{where} is {text!r}; write a number and a unit, as '30 minutes' or '2 hours'")
    return found


def parse_budget(text: str | None) -> Budget:
    """From "100 trials", "1e6 images", "2 hours" (or another time); several with commas between."""
    from transfer.sweep.scheduler import Budget

    budget = Budget()
    for word in [] if text is None else text.split(","):
        match = re.fullmatch(r"\s*([0-9.eE+]+)\s*(trial|image)s?\s*", word)
        try:
            number = int(float(match[1])) if match else 0
        except (ValueError, OverflowError):
            number = 0
        if match and number > 0:
            budget = replace(budget, **{f"{match[2]}s": number})
        elif re.search(r"(second|minute|hour|day)s?\s*$", word):
            budget = replace(budget, seconds_s=parse_time_s(word, "--budget"))
        else:
            raise UserError(
                f"--budget is {text!r}; write a number and trials, images or hours, as '2 hours' or '100 trials'"
            )
    return budget
