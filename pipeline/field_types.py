"""Ranges and units that the type of a configuration's field may carry, and names for the usual ones."""

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pipeline.duration import Duration


@dataclass(frozen=True)
class Range:
    """Of a number or a `Duration`; both ends belong to it but those that `without` names. None: no end."""

    low: float | None = None
    high: float | None = None
    without: Literal["", "low", "high", "both"] = ""

    def holds(self, value: Any) -> bool:
        number = value.value if isinstance(value, Duration) else value
        return not (
            (self.low is not None and (number < self.low or (number == self.low and self.without in ("low", "both"))))
            or (
                self.high is not None
                and (number > self.high or (number == self.high and self.without in ("high", "both")))
            )
        )

    def words(self) -> str:
        low = None if self.low is None else f"{self.low:,}"
        high = None if self.high is None else f"{self.high:,}"
        if high is None:
            return f"above {low}" if self.without else f"of {low} or more"
        end = f"below {high}" if self.without in ("high", "both") else f"{'' if low is None else 'at most '}{high}"
        if low is None:
            return end if end.startswith("below") else f"of at most {high}"
        return (
            f"above {low} and {end}"
            if self.without in ("low", "both")
            else f"from {low} to {end.removeprefix('at most ')}"
        )


@dataclass(frozen=True)
class Unit:
    """Of a plain number; text may name another one of the same kind, as "30 minutes" or "2 GB"."""

    name: str
    known: tuple[tuple[str, float], ...]
    size: float = 1.0
    """Of this unit, in the one that `known` counts in."""

    def factor(self, word: str) -> float | None:
        sizes = {name.lower(): size for name, size in self.known}
        size = sizes.get(word.lower(), sizes.get(word.lower().removesuffix("s")))
        return None if size is None else size / self.size


@dataclass(frozen=True)
class Items:
    """Of a tuple."""

    count: int | None = None
    most: int | None = None
    unique: bool = False
    """No value twice."""
    distinct: bool = False
    """Unique, and sorted: their order says nothing."""
    text: str = ""
    """What such a list is called, where that says more."""

    def holds(self, value: Any) -> bool:
        fits = self.count in (None, len(value)) and (self.most is None or len(value) <= self.most)
        return fits and (not (self.distinct or self.unique) or len(set(value)) == len(value))

    def words(self, what: str) -> str:
        number = f"{self.count} " if self.count else "different " if self.distinct or self.unique else ""
        return self.text or f"a list of {number}{what}"


@dataclass(frozen=True)
class Form:
    """Of text: a regular expression that all of it matches, and words for it."""

    pattern: str
    text: str

    def holds(self, value: Any) -> bool:
        return re.fullmatch(self.pattern, value, re.DOTALL) is not None

    def words(self) -> str:
        return self.text


_SECONDS = (("ms", 1e-3), ("s", 1.0), ("sec", 1.0), ("second", 1.0), ("min", 60.0), ("minute", 60.0), ("h", 3600.0),
            ("hour", 3600.0), ("day", 86400.0))  # fmt: skip
_BYTES = (("B", 1.0), ("byte", 1.0), ("kB", 1e3), ("MB", 1e6), ("GB", 1e9), ("TB", 1e12), ("KiB", 2.0**10),
          ("MiB", 2.0**20), ("GiB", 2.0**30), ("TiB", 2.0**40))  # fmt: skip
SECONDS, MEGABYTES, GIGABYTES = Unit("seconds", _SECONDS), Unit("MB", _BYTES, 1e6), Unit("GB", _BYTES, 1e9)

Positive = Annotated[float, Range(0, without="low")]
NonNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
ShareBelowOne = Annotated[float, Range(0, 1, without="high")]
Count = Annotated[int, Range(1)]
CountOrZero = Annotated[int, Range(0)]
Seconds = Annotated[float, Range(0), SECONDS]
Text = Annotated[str, Form(r".*\S.*", "text that is not empty")]
PositiveDuration = Annotated[Duration, Range(0, without="low")]
