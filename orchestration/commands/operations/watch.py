"""`normfree status` and `normfree logs`: runs and sweeps as their folders have them, on any machine that reaches these."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

from orchestration.commands.output import doing, progress_bar, say
from orchestration.commands.parser import add, number
from pipeline.errors import UserError


def watch_commands(commands: Any) -> None:
    _status(commands)
    _logs(commands)


def _status(commands: Any) -> None:
    p = add(
        commands,
        "status",
        status,
        "what a run or sweep is, whether it lives, how far it is, what it has saved, what went wrong, and how it goes on; of a "
        "folder or bucket with many, a line each",
        [
            "normfree status runs/c100",
            "normfree status s3://bucket/runs/c100 --verify",
            "normfree status s3://bucket/runs",
            "normfree status sweeps/demo --json",
        ],
    )
    p.add_argument("url", metavar="RUN|SWEEP|FOLDER", help="local or in an object store")
    p.add_argument(
        "--verify",
        action="store_true",
        help="read all bytes of the newest checkpoint; without it its commit file and the sizes of its files are looked at",
    )
    p.add_argument("--json", action="store_true", help="everything that is known, for programs")
    p.add_argument(
        "--limit",
        type=number(int, 1, 1 << 30),
        default=100,
        metavar="N",
        help="of many, so many are read (default %(default)s)",
    )


def status(args: argparse.Namespace) -> int:
    """Exit code: 0 it could be said."""
    from orchestration.operations import folders
    from orchestration.operations.status_text import block

    with doing(f"reading {args.url}"):
        found = folders.status(args.url, verify=args.verify)
    if found is None:
        return _many(args)
    if args.json:
        say_json(dataclasses.asdict(found))
    else:
        say(*block(found))
    return 0


def _many(args: argparse.Namespace) -> int:
    from orchestration.operations import folders
    from orchestration.operations.status_text import line

    if args.verify:
        raise UserError(
            f"{args.url} is no run; --verify reads the newest checkpoint of one, so give the folder of a run"
        )
    with progress_bar(f"reading {args.url}", "folders") as progress:
        results, is_all = folders.many(args.url, limit=args.limit, progress=progress)
    if not results:
        raise UserError(
            f"there is no run and no sweep at {args.url}, nor in {folders.DEPTH} levels of folders below it; give the folder "
            "of one that has started"
        )
    if args.json:
        say_json([result if isinstance(result, str) else dataclasses.asdict(result) for result in results])
        return 0
    for result in results:
        say(result if isinstance(result, str) else line(result))
    if not is_all:
        say(f"there are more than {args.limit}; --limit shows more")
    return 0


def say_json(value: Any) -> None:
    """Of any length, and with nothing cut: for programs."""
    print(json.dumps(value, indent=1), flush=True)


def _logs(commands: Any) -> None:
    p = add(
        commands,
        "logs",
        logs,
        "what happened in a run: its records and what its ranks wrote in one order of time, the first error at the top",
        [
            "normfree logs runs/c100",
            "normfree logs runs/c100 --rank 1",
            "normfree logs s3://bucket/runs/c100 --errors",
            "normfree logs runs/c100 --follow",
        ],
    )
    p.add_argument("run", metavar="RUN", help="run folder, local or in an object store")
    p.add_argument("--rank", type=number(int, 0, 1 << 30), metavar="R", help="what this rank wrote alone")
    p.add_argument("--errors", action="store_true", help="errors alone, the first in time first")
    p.add_argument(
        "--lines",
        type=number(int, 0, 1 << 40),
        metavar="N",
        help="the last N; 0 = all (default: 200, and all with --errors)",
    )
    p.add_argument("--follow", action="store_true", help="go on with what comes, until Ctrl-C")


def logs(args: argparse.Namespace) -> int:
    from orchestration.operations.logs import follow, news, poll_s, show

    lines = args.lines if args.lines is not None else (0 if args.errors else 200)
    coming = news(args.run, args.rank)
    with doing(f"reading {args.run}"):
        if args.follow:  # from before the rest is read: rather twice than not at all
            next(coming)
        found = list[str]()
        show(args.run, rank=args.rank, errors=args.errors, lines=lines, say=found.append)
    say(*found)
    if args.follow:
        follow(coming, errors=args.errors, poll_s=poll_s(args.run), say=say)
    return 0
