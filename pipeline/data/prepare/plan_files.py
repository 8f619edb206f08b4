"""The plan of a preparation in its output: parts of a job array list their source once, and share what was found.

    PREPARING/plan/plan.json         what all parts have in common, and which files hold the shards
    PREPARING/plan/<sha256>.json     the samples of neighbouring shards

Files are named by their content and `plan.json` comes last, so that a reader finds a whole plan, whoever writes at the same
time. One of other options, or of another source, is passed over and made anew. A part reads the files of its own shards only.
What lies in a local copy of the source (a compressed tar, parquet) is said to lie in the source: each part has its own copy.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np

from pipeline import documents
from pipeline.data.format.boxes import ListedBox, ListedBoxes
from pipeline.data.prepare.plan import Access, Plan
from pipeline.data.prepare.shard_plan import PlannedShard
from pipeline.data.sources.archives.locators import Locator, Range, Refused, Sparse, Whole, Zipped
from pipeline.data.sources.cards import SPLIT_NAMES
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
_Place = tuple[Literal["Whole", "Range", "Sparse", "Zipped", "Refused"], str, list[int]]
"""Kind, text and numbers of a locator."""
_Mask = tuple[_Place, int, str]
"""Its place, size and name."""
_Boxes = tuple[list[tuple[float, float, float, float, int, bool]], str]
"""Left, top, right, bottom, label and crowd of each, and the line that says so."""
_Row = tuple[str, str, str, int, _Place, _Mask | None, _Boxes | None, str, int]
"""Class, key below it, extension, size, place, what it has beside; key in the shard, label."""


@dataclass(frozen=True)
class _File:
    sha256: Sha256
    num_shards: Positive


@dataclass(frozen=True)
class _Seal:
    asked: Sha256
    copied: Text
    """Digest of files of which each part needs a copy."""
    work: Sha256
    images: Mapping[str, Count]
    fingerprint: Sha256
    note: Text
    classes: tuple[str, ...]
    labels: tuple[str, ...]
    masks: tuple[str, ...]
    boxes: tuple[str, ...]
    files: tuple[_File, ...]


def write(folder: str, asked: str, plan: Plan, access: Access) -> None:
    """Leave the plan for those who ask for the same (`asked`)."""
    files: list[_File] = []
    pending: list[PlannedShard] = []
    for place, shard in enumerate(plan.read(0, plan.num_shards), start=1):
        pending.append(shard)
        if place == plan.num_shards or sum(len(each.entries) for each in pending) >= FILE_IMAGES:
            content = [[s.split, s.number, _rows(s, access)] for s in pending]
            data = json.dumps(content, separators=(",", ":")).encode()
            files.append(_File(hashlib.sha256(data).hexdigest(), len(pending)))
            objects.write_bytes(objects.join(folder, f"{files[-1].sha256}.json"), data)
            pending = []
    seal = {
        "asked": asked,
        "copied": access.copied(),
        "work": plan.work,
        "images": dict(plan.images),
        **{name: getattr(plan.source, name) for name in ("fingerprint", "note", "classes")},
        **plan.source.several,
        "files": [vars(file) for file in files],
    }
    objects.write_bytes(objects.join(folder, NAME), json.dumps(seal).encode())


def read(folder: str, asked: str, access: Access) -> Plan | None:
    """The plan that was left for those who ask for this; None where there is none, or one of something else.

    Raises:
        UserError: it is damaged, or names files that listing the source could not have given.
    """
    url = objects.join(folder, NAME)
    try:
        seal = documents.read(url, _Seal, max_bytes=_MAX_BYTES, remedy="remove it, and run the part again")
    except (FileNotFoundError, NotADirectoryError):
        return None
    if seal.asked != asked or (seal.copied and seal.copied != access.copied()):
        return None

    def shards(begin: int, end: int) -> list[PlannedShard]:
        found: list[PlannedShard] = []
        first = 0
        for file in seal.files:
            if first < end and begin < first + file.num_shards:
                found += _shards(folder, file, access)[max(0, begin - first) : end - first]
            first += file.num_shards
        return found

    several = {"labels": seal.labels, "masks": seal.masks, "boxes": seal.boxes}
    opened = ImageSource((), seal.classes, seal.fingerprint, seal.note, access.reader, **several)
    num_shards = sum(file.num_shards for file in seal.files)
    return Plan(opened, seal.images, seal.work, num_shards, shards, access.copy if seal.copied else None)


def shared(
    folder: str, asked: str, access: Access, ours: Callable[[], Plan], wait: Callable[[], None] | None = None
) -> Plan:
    """As `read`; where nothing is left, `ours` is made and left by one of those who ask, and the others wait for it."""
    while True:
        try:
            with ownership.hold(folder, "listing of a source"):
                if (found := read(folder, asked, access)) is None:
                    found = ours()
                    write(folder, asked, found, access)
                return found
        except ownership.InUse:
            if wait is not None:
                wait()
            time.sleep(WAIT_S)
        if (left := read(folder, asked, access)) is not None:
            return left


def _rows(shard: PlannedShard, access: Access) -> list[_Row]:
    spool = f"{access.spool}/"

    def place(locator: Locator) -> _Place:
        text, *numbers = cast(tuple[Any, ...], locator)
        if isinstance(locator, Sparse):
            numbers = [*numbers[:2], *(number for part in locator.parts for number in part)]
        kind = cast(Any, type(locator).__name__)
        return kind, access.source if text.startswith(spool) else text, numbers

    def mask(e: ImageEntry) -> _Mask | None:
        return None if e.mask is None else (place(e.mask), e.mask_size, e.beside_name)

    return [
        (e.class_name, e.key, e.extension, e.size, place(e.locator), mask(e), _listed(e.boxes), key, label)
        for e, key, label in zip(shard.entries, shard.keys, shard.labels, strict=True)
    ]


def _listed(boxes: ListedBoxes | None) -> _Boxes | None:
    if boxes is None:
        return None
    rows = np.frombuffer(boxes.data, np.float64).reshape(-1, 6).tolist()
    return [(x0, y0, x1, y1, int(label), bool(crowd)) for x0, y0, x1, y1, label, crowd in rows], boxes.where


def _shards(folder: str, file: _File, access: Access) -> list[PlannedShard]:
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
    may_name = access.may_name()
    places = [p for shard in shards for e in shard.entries for p in (e.locator, e.mask) if p is not None]
    if any(not isinstance(place, Refused) and not may_name(place.url) for place in places):
        raise UserError(f"{url} names files outside {access.source}; {remedy}")
    return shards


def _entry(split: str, row: _Row) -> ImageEntry:
    class_name, key, extension, size, place, mask, listed, _, _ = row
    boxes = None if listed is None else ListedBoxes.of([ListedBox(*box) for box in listed[0]], listed[1])
    mask_place, mask_size, beside_name = (_locator(*mask[0]), *mask[1:]) if mask else (None, -1, "")
    beside_name = boxes.digest if boxes else beside_name
    return ImageEntry(
        split, class_name, key, extension, _locator(*place), size, mask_place, boxes, beside_name, mask_size
    )


def _locator(kind: str, text: str, numbers: list[int]) -> Locator:
    if kind == "Sparse":
        offset, size, *parts = numbers
        return Sparse(text, offset, size, tuple(zip(parts[::2], parts[1::2], strict=True)))
    kinds: dict[str, Callable[..., Locator]] = {"Whole": Whole, "Range": Range, "Zipped": Zipped, "Refused": Refused}
    return kinds[kind](text, *numbers)
