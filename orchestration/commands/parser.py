"""How a command is declared: its name, its handler, a line about it, examples that can be pasted."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

EXIT_USER = 2


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"normfree: {message}; see '{self.prog} --help'", file=sys.stderr)
        raise SystemExit(EXIT_USER)


def add(
    parent: Any, name: str, handler: Callable[[argparse.Namespace], int], summary: str, examples: Sequence[str]
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = parent.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog="examples:\n  " + "\n  ".join(examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(handler=handler)
    return parser
