"""What came of a drill, for people and for programs."""

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass

FORMAT = "normfree-drill"
WIDTH = 110


@dataclass(frozen=True, kw_only=True)
class Result:
    """Of one scenario."""

    name: str
    done: str
    expected: str
    happened: tuple[str, ...]
    codes: tuple[int, ...]
    """Exit codes of the starts, in order; minus its number where a signal ended one."""
    survived: bool
    reason: str
    """Why it was lost."""
    seconds_s: float


@dataclass(frozen=True, kw_only=True)
class Card:
    run: str
    """In words: which configuration, on what."""
    results: Sequence[Result]
    not_played: dict[str, str]
    """Scenarios that this machine or configuration does not allow, and why."""
    seconds_s: float

    @property
    def num_lost(self) -> int:
        return sum(not result.survived for result in self.results)

    def lines(self) -> list[str]:
        found = [f"drill of {self.run}", ""]
        for result in self.results:
            found += _lines(result)
        found += [f"not played  {name}: {why}" for name, why in self.not_played.items()]
        survived = len(self.results) - self.num_lost
        return [*found, "", f"{survived} survived, {self.num_lost} lost, in {self.seconds_s:.0f} s"]

    def to_json(self) -> bytes:
        content = {
            "format": FORMAT,
            "run": self.run,
            "survived": len(self.results) - self.num_lost,
            "lost": self.num_lost,
            "seconds_s": round(self.seconds_s, 1),
            "scenarios": [asdict(result) for result in self.results],
            "not_played": self.not_played,
        }
        return (json.dumps(content, indent=1) + "\n").encode()


def _lines(result: Result) -> list[str]:
    verdict = "survived" if result.survived else "LOST"
    codes = f"codes {', '.join(map(str, result.codes))}" if result.codes else ""
    parts = [codes, *result.happened] if result.survived else [f"expected: {result.expected}", codes, *result.happened]
    text = "; ".join(part for part in parts if part)
    if not result.survived:
        text += f"; but {result.reason}"
    first = f"{verdict:9} {result.name:14} {result.done} ({result.seconds_s:.0f} s)"
    return [first, *textwrap.wrap(text, WIDTH, initial_indent=" " * 10, subsequent_indent=" " * 10)]
