"""`normfree drill`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestration.child_process import cores
from orchestration.commands.output import doing, say, warn
from orchestration.commands.parser import add
from pipeline.errors import UserError

if TYPE_CHECKING:
    from orchestration.operations.drill.card import Result
    from pipeline.training.run import Run

EXIT_LOST = 1


def drill_command(commands: Any) -> None:
    p = add(
        commands,
        "drill",
        drill,
        "do to a small form of a configuration, on this machine, what clusters do to runs, and report what it survived",
        [
            "normfree drill nfnet_tiny_glyphs",
            "normfree drill run.yaml --data s3://bucket/imagenet --json card.json",
            "normfree drill nfnet_f0_imagenet --scenarios kill_rank,sigterm,full_disk --keep drilled",
        ],
    )
    p.add_argument("recipe", metavar="RECIPE|FILE.yaml")
    p.add_argument(
        "--data", metavar="URL", help="a prepared dataset to take some images from (default: the file's, or digits)"
    )
    p.add_argument(
        "--scenarios", metavar="A,B", help="only these of %(metavar)s (default: all, see docs/operations.md)"
    )
    p.add_argument(
        "--num-processes", type=int, default=2, metavar="N", help="processes of the run, as far as there are devices"
    )
    p.add_argument("--json", metavar="FILE", help="write the card to this file too")
    p.add_argument(
        "--keep", metavar="FOLDER", help="a new folder for runs and logs, which stays (default: a temporary one)"
    )


def drill(args: argparse.Namespace) -> int:
    with doing("loading PyTorch"):
        from orchestration.commands.train import asked_run
        from orchestration.operations.drill.drill import drill as play
        from orchestration.operations.drill.scenarios import chosen
        from pipeline.training.run import override

    names = [name.strip() for name in (args.scenarios or "").split(",") if name.strip()]
    scenarios = chosen(names)
    run, _ = asked_run(args)
    if args.data:
        run = override(run, {"data.url": args.data})
    if args.num_processes < 1:
        raise UserError(f"--num-processes is {args.num_processes}; set it to 1 or more")
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise UserError(f"there is no folder for {args.json}; make it, or give another file with --json")
    card = play(
        run,
        scenarios,
        num_images=_num_images(args.recipe, run),
        num_ranks=_num_ranks(args.num_processes),
        num_at_once=cores() + 1,  # each waits a part of its time: for a watchdog, a pause, a store
        folder=Path(args.keep) if args.keep else None,
        heard=_progress,
    )
    if args.json:
        Path(args.json).write_bytes(card.to_json())
    say(*card.lines())
    return EXIT_LOST if card.num_lost else 0


def _num_images(recipe: str, run: Run) -> int:
    """Of the training data that the durations are for."""
    from pipeline import recipes
    from pipeline.data.loading.datasets import samples_per_epoch
    from pipeline.recipes.recipe import IMAGENET

    if recipe in recipes.RECIPES:
        return recipes.find(recipe).num_images
    return samples_per_epoch(run.data) // run.data.repeats if run.data.url else IMAGENET


def _num_ranks(asked: int) -> int:
    """As many processes as there are devices for, and on a CPU at least two."""
    import torch

    here = torch.cuda.device_count() if torch.cuda.is_available() else max(2, cores())
    if here < asked:
        say(f"{asked} processes were asked for, and this machine has room for {here}: the drill takes {here}")
    return min(asked, here)


def _progress(result: Result) -> None:
    verdict = "survived" if result.survived else f"LOST: {result.reason}"
    warn(f"{result.name}: {verdict} ({result.seconds_s:.0f} s)")
