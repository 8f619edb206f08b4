"""The command `normfree`: each handler imports what it needs when it runs, so `--help` is quick."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from orchestration.commands.parser import EXIT_USER, Parser
from pipeline.supervision.process_exit import run

EXIT_OURS = 1


def build_parser() -> argparse.ArgumentParser:
    from orchestration.commands.data import data_commands
    from orchestration.commands.inspect import inspect_commands
    from orchestration.commands.models import model_commands
    from orchestration.commands.records import records_commands
    from orchestration.commands.train import train_commands
    from orchestration.commands.transfer import transfer_commands

    parser = Parser(
        prog="normfree",
        description="Pretrain normaliser-free image networks from WebDataset shards and measure what they are worth on tasks.",
        epilog="A first run, without any data of your own:  make demo",
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for declare in (
        data_commands,
        inspect_commands,
        train_commands,
        transfer_commands,
        records_commands,
        model_commands,
    ):
        declare(commands)
    return parser


def _dotted(rest: Sequence[str]) -> dict[str, str]:
    """["--optim.learning_rate", "0.2", "--seed=3"] -> {"optim.learning_rate": "0.2", "seed": "3"}."""
    from pipeline.errors import UserError

    fields: dict[str, str] = {}
    words = list(rest)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise UserError(f"unexpected argument {word!r}; fields are given as --path.of.field value")
        name, equals, value = word[2:].partition("=")
        if not equals:
            if not words:
                raise UserError(f"--{name} needs a value")
            value = words.pop(0)
        fields[name] = value
    return fields


def _refuse_secrets(args: argparse.Namespace, rest: Sequence[str]) -> None:
    """Before anything is written: what is given here reaches records, reports and trackers."""
    from pipeline.secrets import refuse_secrets, refuse_secrets_of_a_tracker

    values = [value for name, value in vars(args).items() if name != "tracking_uri"]
    refuse_secrets(values, "the command")
    refuse_secrets_of_a_tracker(getattr(args, "tracking_uri", None))
    refuse_secrets([word.partition("=")[2] or word for word in rest], "the command")


def main(argv: Sequence[str] | None = None) -> int:
    args, rest = build_parser().parse_known_args(argv)
    debug = args.debug
    try:
        _refuse_secrets(args, rest)
        if rest and args.command != "pretrain":
            from pipeline.errors import UserError

            raise UserError(f"unknown argument {rest[0]!r}; see 'normfree {args.command} --help'")
        args.fields = _dotted(rest)
        return int(args.handler(args))
    except KeyboardInterrupt:
        print("normfree: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read us ("| head") has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains when it flushes
        return 0
    except Exception as error:
        if debug:
            raise
        from pipeline.errors import UserError
        from pipeline.secrets import public

        if isinstance(error, UserError):
            print(f"normfree: {public(str(error))}", file=sys.stderr)
            return EXIT_USER
        print(
            f"normfree: {type(error).__name__}: {public(str(error))} (a fault of ours; --debug shows where)",
            file=sys.stderr,
        )
        return EXIT_OURS


def program() -> None:
    """The command `normfree`: `main` in a process of its own, which hears of stop signals from its beginning on."""
    from orchestration.child_process import use_safe_path

    use_safe_path()
    run(main, stops=(signal.SIGTERM, signal.SIGHUP))  # SIGINT is an exception, see `main`


if __name__ == "__main__":
    program()
