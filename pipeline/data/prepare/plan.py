"""The plan of a preparation: which images go into which shard. Parts of a job array list their source once, and share it.

    PREPARING/plan/plan.json         what all parts have in common, and which files hold the shards
    PREPARING/plan/<sha256>.json     the samples of neighbouring shards

Files are named by their content and `plan.json` comes last, so that a reader finds a whole plan, whoever writes at the same
time. One of other options, or of another source, is passed over and made anew. A part reads the files of its own shards only.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from pipeline import documents
from pipeline.data.format.shards import SHARD_BYTES
from pipeline.data.prepare.shard_plan import PlannedShard, plan_shards
from pipeline.data.prepare.shard_writer import ShardWriter
from pipeline.data.sources.archives.locators import Locator, Range, Sparse, Whole, Zipped
from pipeline.data.sources.archives.reader import FileReader
from pipeline.data.sources.cards import SPLIT_NAMES, Card
from pipeline.data.sources.entry import ImageEntry, ImageSource
from pipeline.documents import Count, Positive, Sha256, Text
from pipeline.errors import UserError
from pipeline.storage import objects, ownership

NAME = "plan.json"
FILE_IMAGES = 50_000
"""At least so many are in a file, the last one aside; some 8 MB."""
WAIT_S = 2.0
"""Between two looks for a plan that another part makes."""
_MAX_BYTES = 1 << 30
_Row = tuple[str, str, str, int, Literal["Whole", "Range", "Sparse", "Zipped"], str, list[int], str, int]
"""Class, key below it, extension, size; the locator's kind, text and numbers; key in the shard, label."""


@dataclass(frozen=True)
class Plan:
    """All shards of a preparation."""

    source: ImageSource
    """Without its entries."""
    images: Mapping[str, int]
    """Of each split."""
    work: str
    """Changes with everything that decides the bytes of a shard."""
    num_shards: int
    read: Callable[[int, int], Sequence[PlannedShard]]
    """read(begin, end): some of the shards. UserError where they were read from an output and are damaged."""


def make(opened: ImageSource, entries: Sequence[ImageEntry], writer: ShardWriter, recipe: Mapping[str, Any]) -> Plan:
    """The plan of a listed source, of which `entries` are wanted."""
    exact = not writer.reencode and all(entry.size >= 0 for entry in entries)
    shards = list(
        plan_shards(
            entries,
            opened.classes,
            seed=recipe["seed"],
            shard_bytes=recipe["shard_bytes"] or SHARD_BYTES,
            shard_samples=recipe["shard_samples"],
            mean_bytes=None if exact else writer.mean_bytes,
        )
    )
    work = _work(map(writer.plan, shards))
    images = Counter(entry.split for entry in entries)
    return Plan(replace(opened, entries=()), images, work, len(shards), lambda begin, end: shards[begin:end])


def whole(plan: Plan, writer: ShardWriter, folder: str) -> list[tuple[PlannedShard, str]]:
    """All shards, and what `writer.plan` says of each. UserError where a plan that was left lacks some that it was made with."""
    shards = [(shard, writer.plan(shard)) for shard in plan.read(0, plan.num_shards)]
    if _work(digest for _, digest in shards) != plan.work:
        raise UserError(f"the plan in {folder} is not whole any more; remove that folder, and run the parts again")
    return shards


def _work(digests: Iterable[str]) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def wanted(opened: ImageSource, splits: Sequence[str] | None, source: str) -> list[ImageEntry]:
    """The entries of these splits, or of all. UserError where one is not there."""
    present = {entry.split for entry in opened.entries}
    absent = sorted(set(splits or ()) - present)
    if absent:
        raise UserError(
            f"{source} has no split {', '.join(absent)} (it has {', '.join(sorted(present))}): "
            "add the folder, or hold out a part of train with val_share"
        )
    return [entry for entry in opened.entries if splits is None or entry.split in splits]


def count_note(card: Card, found: Mapping[str, int]) -> str:
    """Where the source has other numbers of images than the card says."""
    odd = [(split, num, card.splits[split]) for split, num in found.items() if card.splits.get(split, num) != num]
    return "; ".join(f"{split} has {num} images where the card says {expected}" for split, num, expected in sorted(odd))


@dataclass(frozen=True)
class _File:
    sha256: Sha256
    num_shards: Positive


@dataclass(frozen=True)
class _Seal:
    asked: Sha256
    work: Sha256
    images: Mapping[str, Count]
    fingerprint: Sha256
    note: Text
    classes: tuple[str, ...]
    files: tuple[_File, ...]


def write(folder: str, asked: str, plan: Plan) -> None:
    """Leave the plan for those who ask for the same (`asked`, a SHA-256). Its source is one that `FileReader` reads."""
    files: list[_File] = []
    pending: list[PlannedShard] = []
    for place, shard in enumerate(plan.read(0, plan.num_shards), start=1):
        pending.append(shard)
        if place == plan.num_shards or sum(len(each.entries) for each in pending) >= FILE_IMAGES:
            data = json.dumps([[s.split, s.number, _rows(s)] for s in pending], separators=(",", ":")).encode()
            files.append(_File(hashlib.sha256(data).hexdigest(), len(pending)))
            objects.write_bytes(objects.join(folder, f"{files[-1].sha256}.json"), data)
            pending = []
    content = {
        "asked": asked,
        "work": plan.work,
        "images": dict(plan.images),
        **{name: getattr(plan.source, name) for name in ("fingerprint", "note", "classes")},
        "files": [vars(file) for file in files],
    }
    objects.write_bytes(objects.join(folder, NAME), json.dumps(content).encode())


def read(folder: str, asked: str, source: str) -> Plan | None:
    """The plan that was left for those who ask for this; None where there is none, or one of something else.

    Raises:
        UserError: it is damaged, or names files outside `source`.
    """
    url = objects.join(folder, NAME)
    try:
        seal = documents.read(url, _Seal, max_bytes=_MAX_BYTES, remedy="remove it, and run the part again")
    except (FileNotFoundError, NotADirectoryError):
        return None
    if seal.asked != asked:
        return None

    def shards(begin: int, end: int) -> list[PlannedShard]:
        found: list[PlannedShard] = []
        first = 0
        for file in seal.files:
            if first < end and begin < first + file.num_shards:
                found += _shards(folder, file, source)[max(0, begin - first) : end - first]
            first += file.num_shards
        return found

    opened = ImageSource((), seal.classes, seal.fingerprint, seal.note, FileReader())
    return Plan(opened, seal.images, seal.work, sum(file.num_shards for file in seal.files), shards)


def shared(
    folder: str, asked: str, source: str, ours: Callable[[], Plan], wait: Callable[[], None] | None = None
) -> Plan:
    """As `read`; where nothing is left, `ours` is made and left by one of those who ask, and the others wait for it."""
    while True:
        try:
            with ownership.hold(folder, "listing of a source"):
                if (found := read(folder, asked, source)) is None:
                    found = ours()
                    write(folder, asked, found)
                return found
        except ownership.InUse:
            if wait is not None:
                wait()
            time.sleep(WAIT_S)
        if (left := read(folder, asked, source)) is not None:
            return left


def _rows(shard: PlannedShard) -> list[_Row]:
    return [
        (e.class_name, e.key, e.extension, e.size, *_place(e.locator), key, label)
        for e, key, label in zip(shard.entries, shard.keys, shard.labels, strict=True)
    ]


def _place(locator: Locator) -> tuple[Any, str, list[int]]:
    url, *numbers = cast(tuple[Any, ...], locator)
    if isinstance(locator, Sparse):
        numbers = [*numbers[:2], *(number for part in locator.parts for number in part)]
    return type(locator).__name__, url, numbers


def _shards(folder: str, file: _File, source: str) -> list[PlannedShard]:
    url = objects.join(folder, f"{file.sha256}.json")
    remedy = f"remove {NAME} beside it, and run the part again"
    try:
        data = objects.read_bytes(url, max_bytes=_MAX_BYTES)
    except FileNotFoundError:
        data = b""
    if hashlib.sha256(data).hexdigest() != file.sha256:
        raise UserError(f"{url} is gone, or does not hold what its name says; {remedy}")
    content = documents.parse_json(data, url, max_bytes=_MAX_BYTES, remedy=remedy)
    found = documents.convert(content, list[tuple[Literal[SPLIT_NAMES], Count, list[_Row]]], url, remedy=remedy)  # type: ignore[valid-type]
    try:
        shards = [
            PlannedShard(
                split,
                number,
                tuple(_entry(split, row) for row in rows),
                tuple(row[-2] for row in rows),
                tuple(row[-1] for row in rows),
            )
            for split, number, rows in found
        ]
    except (TypeError, ValueError):
        raise UserError(f"{url} names places that no file has; {remedy}") from None
    # Others may write where the journal lies: what they name is not read.
    places = [e.locator.url for shard in shards for e in shard.entries]
    below = objects.join(source) + "/"
    if any(place != source and (not place.startswith(below) or "/../" in place) for place in places):
        raise UserError(f"{url} names files outside {source}; {remedy}")
    return shards


def _entry(split: str, row: _Row) -> ImageEntry:
    class_name, key, extension, size, kind, url, numbers, _, _ = row
    return ImageEntry(split, class_name, key, extension, _locator(kind, url, numbers), size)


def _locator(kind: str, url: str, numbers: list[int]) -> Locator:
    if kind == "Sparse":
        offset, size, *parts = numbers
        return Sparse(url, offset, size, tuple(zip(parts[::2], parts[1::2], strict=True)))
    kinds: dict[str, Callable[..., Locator]] = {"Whole": Whole, "Range": Range, "Zipped": Zipped}
    return kinds[kind](url, *numbers)
