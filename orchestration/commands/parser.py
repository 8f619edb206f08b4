"""How a command is declared: its name, its handler, a line about it, examples that can be pasted."""

import argparse
import difflib
import math
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from pipeline.display import terminal

EXIT_USER = 2


class Help(argparse.RawDescriptionHelpFormatter):
    """Words stay whole: options and paths have hyphens, and a broken one cannot be pasted."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False, break_long_words=False)


class Parser(argparse.ArgumentParser):
    def __init__(self, **named: Any) -> None:
        super().__init__(**{"formatter_class": Help, "allow_abbrev": False, **named})

    def error(self, message: str) -> NoReturn:
        print(terminal(f"normfree: {message}; see '{self.prog} --help'"), file=sys.stderr)
        raise SystemExit(EXIT_USER)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = list(map(str, action.choices))
            raise argparse.ArgumentError(action, f"invalid choice: {value!r}; {did_you_mean(str(value), known)}")

    def options(self) -> list[str]:
        """The long options, as they are typed."""
        return [option for option in self._option_string_actions if option.startswith("--")]

    def command(self, name: str) -> "Parser":
        (commands,) = (a for a in self._actions if isinstance(a, argparse._SubParsersAction))
        found: Parser = commands.choices[name]
        return found

    def takes_value(self, option: str) -> bool:
        return self._option_string_actions[option].nargs != 0


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Advice by spelling, upper and lower case, _ and - being the same."""
    plain = {name.lower().replace("_", "-"): name for name in known}
    word = word.lower().replace("_", "-").partition("=")[0]
    begun = [name for name in plain if len(word) > 3 and name.startswith(word)]
    near = begun or difflib.get_close_matches(word, plain, n=1, cutoff=0.6)
    return f"did you mean {plain[near[0]]}?" if near else f"choose one of {', '.join(plain.values())}"


def number(kind: type[int] | type[float], least: float, most: float = math.inf) -> Callable[[str], float]:
    """What an option's text is read by: a finite number of that kind and range, or a sentence."""

    def read(text: str) -> float:
        try:
            found = kind(text)
        except ValueError:
            found = math.nan
        if not (least <= found <= most and math.isfinite(found)):
            what = f"from {least:,} to {most:,}" if math.isfinite(most) else f"of {least:,} or more"
            raise argparse.ArgumentTypeError(f"{text!r}; give a {'whole ' * (kind is int)}number {what}")
        return found

    return read


def add(
    parent: Any, name: str, handler: Callable[[argparse.Namespace], int], summary: str, examples: Sequence[str]
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = parent.add_parser(
        name,
        help=summary,
        description="\n".join(textwrap.wrap(summary[0].upper() + summary[1:] + ".", 79, break_on_hyphens=False)),
        epilog="examples:\n  " + "\n  ".join(examples),
    )
    parser.set_defaults(handler=handler, parser=parser)
    return parser
