"""A piece of work cut into parts for a job array, each of which may run on another machine; a last command merges them.

--part 3/64     does its share and records that it has
--merge         refuses while a part is missing, or was of other work
"""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pipeline import documents
from pipeline.documents import Positive, Text
from pipeline.errors import UserError
from pipeline.storage import objects, ownership

T = TypeVar("T")
MAX_PARTS = 100_000
_MAX_BYTES = 1 << 30


@dataclass(frozen=True)
class Part:
    number: int
    """From 1."""
    of: int

    @staticmethod
    def parse(text: str) -> "Part":
        """UserError for anything but K/N with K from 1 to N."""
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]) <= MAX_PARTS:
            raise UserError(f"--part is {documents.excerpt(text)!r}; write K/N with K from 1 to N, as 3/64")
        return Part(int(match[1]), int(match[2]))

    def share(self, items: Sequence[T]) -> Sequence[T]:
        return items[self.number - 1 :: self.of]

    def span(self, count: int) -> tuple[int, int]:
        """(begin, end) of a share of `count` items that are neighbours."""
        return (self.number - 1) * count // self.of, self.number * count // self.of

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


@dataclass(frozen=True)
class _Done:
    part: Positive
    of: Positive
    work: Text
    result: Any


@contextlib.contextmanager
def hold(folder: str, part: Part) -> Iterator[None]:
    """Own the part inside the block. UserError where another process works on it."""
    with ownership.hold(objects.join(folder, f"{part.number}-of-{part.of}"), "part", remedy="run another part"):
        yield


def record(folder: str, part: Part, work: str, result: Mapping[str, Any]) -> None:
    """The part is done. `work` says what all parts have in common, and changes with it."""
    content = {"part": part.number, "of": part.of, "work": work, "result": dict(result)}
    objects.write_bytes(objects.join(folder, f"{part.number}-of-{part.of}.json"), json.dumps(content).encode())


def results(folder: str, work: str) -> list[Any]:
    """What each part recorded, in order.

    Raises:
        UserError: none, one that is missing, or parts of other work.
    """
    done = [
        (url, documents.read(url, _Done, max_bytes=_MAX_BYTES, remedy="run this part again"))
        for url in objects.list_urls(folder, suffix=".json")
        if re.fullmatch(r"\d+-of-\d+\.json", url.rpartition("/")[2])
    ]
    others = [url for url, found in done if found.work != work]
    if others:
        raise UserError(f"{others[0]} is a part of other work: merge with the options that its part had, or remove it")
    divisions: dict[int, dict[int, Any]] = {}
    for _, found in done:
        divisions.setdefault(found.of, {})[found.part] = found.result
    # Parts of a division that was given up do no harm: the same work is the same result, however it is divided.
    count = max(divisions, key=lambda of: (len(divisions[of]) == of, of), default=0)
    by_number = divisions.get(count, {})
    if not divisions or (len(divisions) > 1 and len(by_number) < count):
        has = f"parts of {' and of '.join(map(str, sorted(divisions)))}" if divisions else "no part"
        raise UserError(f"{folder} holds {has}: run all parts of one division with --part, then --merge")
    missing = [f"{number}/{count}" for number in range(1, count + 1) if number not in by_number]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UserError(f"part {missing[0]}{more} is not done: run it with --part {missing[0]}, then --merge again")
    return [by_number[number] for number in sorted(by_number)]
