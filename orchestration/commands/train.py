"""`normfree pretrain`."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from orchestration.commands.near_names import check_names
from orchestration.commands.output import doing, say
from orchestration.commands.parser import add, number
from pipeline.errors import UserError
from pipeline.profiling import asked

if TYPE_CHECKING:
    from pipeline.training.run import Run


def train_commands(commands: Any) -> None:
    p = add(
        commands,
        "pretrain",
        pretrain,
        "train a recipe; the same command again resumes",
        [
            "normfree pretrain nfnet_tiny_glyphs --data.url data/glyphs --out runs/glyphs",
            "normfree pretrain nfnet_tiny_cifar100 --data.url data/cifar100 --out runs/c100 --num-processes 2",
            "normfree pretrain nfnet_tiny_glyphs --data.url data/glyphs --out runs/glyphs --profile 10:13",
            "normfree pretrain run.yaml --out runs/mine --optim.learning_rate 0.2 --duration '30 epochs'",
            "normfree pretrain nfnet_f0_imagenet --show",
            "normfree pretrain --list",
        ],
    )
    p.add_argument("recipe", nargs="?", metavar="RECIPE|FILE.yaml")
    p.add_argument("--list", action="store_true", help="print the recipes, one a line, and stop")
    p.add_argument("--out", metavar="URL", help="run folder: checkpoints, records, configuration")
    p.add_argument("--num-processes", type=int, default=1, metavar="N", help="processes on this machine (default 1)")
    p.add_argument(
        "--max-restarts",
        type=number(int, 0),
        default=0,
        metavar="N",
        help="after a process was lost, failed or froze, start again from the newest checkpoint, N times an hour at most "
        "(default 0)",
    )
    p.add_argument(
        "--tracking-uri", metavar="URI", help="MLflow; default: MLFLOW_TRACKING_URI, else SQLite in the run folder"
    )
    add_profile(p)
    p.add_argument("--show", action="store_true", help="print the recipe's header and resolved configuration, and stop")
    p.add_argument(
        "--help-fields",
        action="store_true",
        help="explain every field of the configuration, with the values of the recipe where one is given, and stop",
    )
    p.epilog = (
        p.epilog or ""
    ) + "\n\nAny field of the configuration is an option by its path: --optim.weight_decay 1e-5 (--help-fields)"


def pretrain(args: argparse.Namespace) -> int:
    with doing("loading PyTorch"):
        from pipeline import recipes
        from pipeline.training.run import dump_yaml

    if args.list:
        say(*recipes.listing())
        return 0
    if args.recipe is None and not args.help_fields:
        raise UserError("no recipe: give the name of one ('normfree pretrain --list' prints them) or a FILE.yaml")
    run, header = asked_run(args) if args.recipe else (None, "")
    if args.help_fields:
        from orchestration.commands.field_help import terminal_lines

        say(*"\n".join(terminal_lines(run)).splitlines())
        return 0
    assert run is not None
    profile = asked_profile(args)
    if args.num_processes < 1:
        raise UserError(f"--num-processes is {args.num_processes}; set it to 1 or more")
    if args.show:
        say(*(header + checked(run, args.num_processes) + dump_yaml(run)).splitlines())
        return 0
    if not args.out:
        raise UserError("no run folder: set --out to where checkpoints and records go")
    if not run.data.url:
        raise UserError("the run has no data: set --data.url to a folder that 'normfree data prepare' wrote")
    from orchestration.launch.local import pretrain as launch
    from orchestration.tracking.tracking_uri import chosen_uri

    uri = chosen_uri(args.tracking_uri)
    with doing("checking the run against its data"):
        checked(run, args.num_processes)
    return launch(
        run,
        args.out,
        num_processes=args.num_processes,
        tracking_uri=uri,
        debug=args.debug,
        max_restarts=args.max_restarts,
        profile=profile,
    )


def add_profile(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--profile",
        metavar="STEPS",
        help="look at steps FIRST:LAST closely, or at a number of steps after the warm-up: a trace in the run folder, and tables",
    )


def asked_profile(args: argparse.Namespace) -> str:
    """The steps of --profile, else those of the variable; "" = none. UserError: nothing that can be steps."""
    if args.profile == "":
        raise UserError("--profile has no steps; write FIRST:LAST, such as 10:13, or a number of steps")
    profile: str = os.environ.get(asked.VARIABLE, "") if args.profile is None else args.profile
    asked.parse(profile)
    return profile


def asked_run(args: argparse.Namespace) -> tuple[Run, str]:
    """The Run that the command names, fields replaced, and a header for --show."""
    from orchestration.commands.field_help import describe
    from pipeline import recipes
    from pipeline.storage import objects
    from pipeline.training.run import Run, load_yaml, override
    from pipeline.yaml_files.parse import read_yaml

    check_names(list(args.fields), [field.path for field in describe(Run)], args.parser.options())
    header = ""
    if args.recipe.endswith((".yaml", ".yml")):
        if not objects.exists(args.recipe):
            raise UserError(f"no file {args.recipe}; give the path of a Run in YAML, or a recipe's name")
        run = load_yaml(read_yaml(args.recipe), args.recipe)
    else:
        recipe = recipes.find(args.recipe)
        run, header = recipe.make(), "".join(f"# {line}".rstrip() + "\n" for line in recipe.header.splitlines())
    return override(run, args.fields), header


def checked(run: Run, num_processes: int) -> str:
    """Refuses a run that does not fit together. A line of YAML about what could not be looked at, or nothing."""
    from pipeline.data.format import manifest
    from pipeline.storage import objects
    from pipeline.supervision.rank_environment import place
    from pipeline.training.check_run import check_run

    size = max(num_processes, place().size)
    has_data = bool(run.data.url) and objects.exists(objects.join(run.data.url, manifest.NAME))
    check_run(run, num_ranks=size, read_data=has_data)
    if has_data or not run.data.url:
        return ""
    return f"# There is no {manifest.NAME} at {run.data.url}: nothing is compared with the data.\n"
