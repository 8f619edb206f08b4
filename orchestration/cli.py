"""The command `normfree`: each handler imports what it needs when it runs, so `--help` is quick."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from orchestration.commands.parser import EXIT_USER, Parser, did_you_mean
from pipeline.supervision.process_exit import run

EXIT_OURS = 1
TAKE_FIELDS = ("pretrain", "launch", "plan")
"""Commands whose options may be fields of a Run, by their paths."""


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:  # noqa: ARG002
        from importlib.metadata import version

        print(f"normfree {version('normfree')}")
        raise SystemExit(0)


def build_parser() -> Parser:
    from orchestration.commands.data.commands import data_commands
    from orchestration.commands.inspect import inspect_commands
    from orchestration.commands.launch import launch_commands
    from orchestration.commands.models import model_commands
    from orchestration.commands.operations.average import average_command
    from orchestration.commands.operations.doctor import doctor_command
    from orchestration.commands.operations.drill import drill_command
    from orchestration.commands.operations.evaluate import evaluate_command
    from orchestration.commands.operations.lab import lab_command
    from orchestration.commands.operations.plan import plan_command
    from orchestration.commands.operations.suites import suites_command
    from orchestration.commands.operations.watch import watch_commands
    from orchestration.commands.records import records_commands
    from orchestration.commands.report import report_command
    from orchestration.commands.sharing import sharing_commands
    from orchestration.commands.train import train_commands
    from orchestration.commands.transfer import transfer_commands

    parser = Parser(
        prog="normfree",
        description="Pretrain normaliser-free image networks from WebDataset shards and measure what\n"
        "they are worth on tasks.",
        epilog="A first run, without any data of your own:  make demo\nMore about a command:  normfree COMMAND --help",
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and stop")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for declare in (
        data_commands,
        inspect_commands,
        train_commands,
        evaluate_command,
        launch_commands,
        watch_commands,
        transfer_commands,
        report_command,
        lab_command,
        suites_command,
        records_commands,
        model_commands,
        sharing_commands,
        average_command,
        plan_command,
        drill_command,
        doctor_command,
    ):
        declare(commands)
    return parser


def _refuse_secrets(args: argparse.Namespace) -> None:
    """Before anything is written: what is given here reaches records, reports and trackers."""
    from pipeline.secrets import refuse_secrets, refuse_secrets_of_a_tracker

    values = [value for name, value in vars(args).items() if name not in ("tracking_uri", "handler", "parser")]
    refuse_secrets(values, "the command")
    refuse_secrets_of_a_tracker(getattr(args, "tracking_uri", None))


def _split_fields(words: list[str], parser: Parser) -> tuple[list[str], dict[str, str]]:
    """Takes the fields of a Run out of the words of a command, wherever they stand: --optim.learning_rate 0.2, --seed=3."""
    from pipeline.errors import UserError

    kept: list[str] = []
    fields: dict[str, str] = {}
    words = list(words)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if not word.startswith("--") or name in parser.options():
            kept.append(word)
            if not equals and words and word[:2] == "--" != words[0][:2] and parser.takes_value(name):
                kept.append(words.pop(0))
            continue
        if not equals:
            if not words or words[0].startswith("--"):
                raise UserError(f"{name} needs a value; see '{parser.prog} --help'")
            value = words.pop(0)
        fields[name[2:]] = value
    return kept, fields


def _parse(parser: Parser, words: list[str]) -> argparse.Namespace:
    from orchestration.commands.near_names import USUAL
    from pipeline.errors import UserError

    if words[:1] == ["help"]:
        words = [*words[1:], "--help"]
    fields: dict[str, str] = {}
    sweep: list[str] = []
    if words[:1] == ["launch"] and "--" in words:
        at = words.index("--")
        words, sweep = words[:at], words[at + 1 :]
    if words[:1] and words[0] in TAKE_FIELDS:
        kept, fields = _split_fields(words[1:], parser.command(words[0]))
        words = [words[0], *kept]
    args, rest = parser.parse_known_args(words)
    if rest:
        used = args.parser if hasattr(args, "parser") else parser
        advice = did_you_mean(rest[0], used.options()) if rest[0].startswith("-") else "leave it out"
        if args.command in TAKE_FIELDS and (usual := USUAL.get(rest[0].lstrip("-"))):
            advice = f"did you mean {usual}?"
        raise UserError(f"unknown argument {rest[0]!r}; {advice}; see '{used.prog} --help'")
    args.fields, args.sweep_words = fields, sweep
    return args


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    parser = build_parser()
    if not [word for word in words if word != "--debug"]:
        parser.print_help(sys.stderr)
        return EXIT_USER
    try:
        args = _parse(parser, [word for word in words if word != "--debug"])
        args.debug = debug
        _refuse_secrets(args)
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
        from pipeline.display import terminal
        from pipeline.errors import UserError, place_trouble
        from pipeline.secrets import public
        from pipeline.storage.store_errors import silence

        away = silence(error) or place_trouble(error)
        text = terminal(public(away or str(error)))
        if away or isinstance(error, UserError):
            print(f"normfree: {text}", file=sys.stderr)
            return EXIT_USER
        print(f"normfree: {type(error).__name__}: {text} (a fault of ours; --debug shows where)", file=sys.stderr)
        return EXIT_OURS


def _use_utf8() -> None:
    """Starts this program anew in UTF-8 where the locale knows ASCII alone, as Python does by itself unless it is told not to:
    names of files would be what nobody can type, and no server takes them."""
    if sys.getfilesystemencoding().lower() in ("utf-8", "utf8") or "NORMFREE_UTF8" in os.environ:
        return
    environment = {**os.environ, "PYTHONUTF8": "1", "NORMFREE_UTF8": "1"}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def program() -> None:
    """The command `normfree`: `main` in a process of its own, which hears of stop signals from its beginning on."""
    from orchestration.child_process import use_safe_path
    from orchestration.commands.output import plain_streams

    _use_utf8()
    use_safe_path()
    plain_streams()
    run(main, stops=(signal.SIGTERM, signal.SIGHUP))  # SIGINT is an exception, see `main`


if __name__ == "__main__":
    program()
