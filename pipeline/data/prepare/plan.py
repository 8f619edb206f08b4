"""The plan of a preparation: which images go into which shard. `plan_files` leaves it for the parts of a job array."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from pipeline.data.format.shards import SHARD_BYTES
from pipeline.data.prepare.shard_plan import PlannedShard, plan_shards
from pipeline.data.prepare.shard_writer import ShardWriter
from pipeline.data.sources.archives.reader import FileReader
from pipeline.data.sources.boxes.coco import FOLDER, annotations
from pipeline.data.sources.cards import Card
from pipeline.data.sources.csv_jsonl import is_list
from pipeline.data.sources.entry import ImageEntry, ImageSource
from pipeline.data.sources.list_access import AllowedPlaces
from pipeline.data.sources.open_source import SpoolProgress, local_copy
from pipeline.data.sources.parquet import parquet_files
from pipeline.errors import UserError
from pipeline.storage import objects


@dataclass(frozen=True)
class Access:
    """A source that somebody else has listed: what its listing follows from, and the way to its bytes."""

    card: Card
    source: str
    allow_roots: Sequence[str]
    spool: Path
    progress: SpoolProgress | None

    def asked(self, recipe: Mapping[str, Any]) -> str:
        """Digest of what a listing and a plan follow from, as far as is seen without listing anything: lists by their content."""
        seen: list[tuple[str, object]] = []
        if self._is_listed:
            seen = [(url, _sha256(url)) for url in self._lists if objects.is_file(url)]
        elif objects.is_file(self.source):
            seen = [(self.source, objects.size_bytes(self.source))]
        return _digest((self.card, self.source, sorted(self.allow_roots), seen, sorted(recipe.items())))

    def copied(self) -> str:
        """Digest of the files that are copied; empty where images are read in place. A folder in a store is listed for it."""
        if self.copy is None:
            return ""
        urls = [self.source] if objects.is_file(self.source) else parquet_files(self.source)
        return _digest([(url, objects.size_bytes(url)) for url in urls])

    @property
    def _is_listed(self) -> bool:
        return is_list(self.source) or self.card.boxes

    @property
    def _lists(self) -> list[str]:
        if is_list(self.source):
            return [self.source]
        return [objects.join(self.source, FOLDER, name) for name, *_ in annotations(self.source)]

    @property
    def reader(self) -> FileReader:
        return FileReader(tolerant=self._is_listed)

    @property
    def copy(self) -> Callable[[], str] | None:
        """Makes the local file in which the images lie; None where they are read in place."""
        return local_copy(self.card, self.source, self.spool, self.progress)

    def may_name(self) -> Callable[[str], bool]:
        """Whether a file is one that listing the source could have given."""
        if is_list(self.source):
            return AllowedPlaces(self.source, self.allow_roots).allows
        if self.card.boxes:
            return AllowedPlaces(objects.join(self.source, FOLDER)).allows
        below = objects.join(self.source) + "/"
        return lambda url: url == self.source or (url.startswith(below) and "/../" not in url)


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
    copy: Callable[[], str] | None = None
    """Of a plan that was left: makes the local file in which the images lie that are said to lie in the source itself."""


def _digest(what: object) -> str:
    return hashlib.sha256(repr(what).encode("utf-8", "surrogateescape")).hexdigest()


def _sha256(url: str) -> str:
    with objects.open_read(url) as file:
        return hashlib.file_digest(cast(Any, file), "sha256").hexdigest()


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
    work = work_of(map(writer.plan, shards))
    images = Counter(entry.split for entry in entries)
    return Plan(replace(opened, entries=()), images, work, len(shards), lambda begin, end: shards[begin:end])


def whole(plan: Plan, writer: ShardWriter, folder: str) -> list[tuple[PlannedShard, str]]:
    """All shards, and what `writer.plan` says of each. UserError where a plan that was left lacks some that it was made with."""
    shards = [(shard, writer.plan(shard)) for shard in plan.read(0, plan.num_shards)]
    if work_of(digest for _, digest in shards) != plan.work:
        raise UserError(f"the plan in {folder} is not whole any more; remove that folder, and run the parts again")
    return shards


def in_copy(shards: Iterable[PlannedShard], source: str, copy: str) -> list[PlannedShard]:
    """The shards with the images and masks of `source` read from its copy."""

    def moved(locator: Any) -> Any:
        return locator._replace(url=copy) if locator is not None and locator.url == source else locator

    return [
        replace(shard, entries=tuple(replace(e, locator=moved(e.locator), mask=moved(e.mask)) for e in shard.entries))
        for shard in shards
    ]


def work_of(digests: Iterable[str]) -> str:
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
