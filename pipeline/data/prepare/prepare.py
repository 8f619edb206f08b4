"""Raw images -> a prepared dataset: list, plan, write shards and indices, and the manifest last.

    open_source (listing) -> plan_shards (what goes where) -> ShardWriter in worker processes -> journal -> manifest

The shards are the same, byte by byte, whether the source was a tar or a folder, for any number of workers and after any
number of interruptions: the plan depends on the listing and the seed alone. Until the manifest is there `PREPARING.json`
marks the output as unfinished; the same command goes on where it was. An output that holds anything else is never touched.

In memory are the listing and the plan (some 0.5 KB an image) and one image a worker. A compressed tar or parquet is copied
once to the staging folder, as large as it is unpacked; other sources cost no disk.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from pipeline.data import parts
from pipeline.data.format import manifest as manifests
from pipeline.data.format.manifest import Manifest
from pipeline.data.format.shards import SHARD_BYTES
from pipeline.data.parts import Part
from pipeline.data.prepare import journal
from pipeline.data.prepare.assemble import MadePiece, PieceMaker, assemble, plan_pieces
from pipeline.data.prepare.output_folder import (
    Staging,
    claim,
    existing_dataset,
    explain_full_disk,
    only_writer,
    publish,
    release,
    remove_written,
    staging,
)
from pipeline.data.prepare.reencode import Reencode
from pipeline.data.prepare.shard_plan import PlannedShard, plan_shards
from pipeline.data.prepare.shard_writer import ShardWriter
from pipeline.data.process_pool import Each, each
from pipeline.data.sources.cards import Card
from pipeline.data.sources.entry import ImageEntry, ImageSource
from pipeline.data.sources.open_source import open_source
from pipeline.errors import UserError
from pipeline.storage import objects

Progress = Callable[[str, int, int], None]
"""progress(phase, done, total): "copying" in files of the source, then "writing" in images."""


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """The dataset of `card` in the folder or prefix `out`, written by one process, or by parts on many machines."""

    card: Card
    out: str
    source: str | None = None
    """Path or URL of the raw images; not needed for embedded and torchvision sets."""
    splits: Sequence[str] | None = None
    """Only these; None: all that the source has."""
    shard_bytes: int = SHARD_BYTES
    """Size at which a tar is closed."""
    shard_samples: int | None = None
    """Images of a tar; given, it takes the place of `shard_bytes`."""
    max_bad_share: float = 0.001
    """Of images, over all splits, that may be unreadable; they are listed."""
    seed: int = 0
    """Of the order in which samples are written."""
    val_share: float | None = None
    """Of each class, held out as val where the source has no split folders."""
    allow_roots: Sequence[str] = ()
    """Folders and addresses that a list may name besides what lies below its own folder."""
    reencode: Reencode = field(default_factory=Reencode)
    """How images are made smaller; as it is: their bytes stay."""
    workers: int = 1
    """Processes; the result is the same for any number."""
    run_each: Each | None = None  # in place of processes of this machine
    progress: Progress | None = None

    def run(self, *, merge: bool = False) -> Manifest:
        """Write the dataset, or return it at once if it is there already.

        Args:
            merge: its shards were written by parts (`run_part`), all of which must be done.
        Raises:
            UserError: bad arguments, a bad source (`open_source`), too many images that cannot be read, a full disk, an `out`
                that holds something else, or a part that is missing. No manifest is left behind then; finished shards are, for
                the next run.
        """
        recipe, existing = self._existing()
        if existing is not None and self._source_is_gone:
            return existing
        with explain_full_disk(self.out), only_writer(self.out, existing), staging(self.out) as folders:
            opened = self._open(folders, recipe)
            if existing is not None:
                return _of_this_source(existing, opened, self.source)
            entries = _wanted(self.card, opened, self.splits, self.source)
            writer = ShardWriter(opened.reader, self.out, folders.work, self.reencode)
            plan = _plan(writer, entries, opened.classes, recipe)
            if merge:
                parts.results(journal.parts_folder(self.out), _work(writer, plan))
            claim(self.out, self.card, recipe)
            _write(writer, plan, len(entries), self.max_bad_share, self._each, self.progress)
            pieces = plan_pieces((shard.split, shard.name, writer.plan(shard)) for shard in plan)
            made = list(self._each(PieceMaker(self.out, folders.work, len(opened.classes)), pieces))
            note = "; ".join(filter(None, [opened.note, _count_note(self.card, entries)]))
            _finish(self.card, self.out, opened.classes, made, recipe, note, folders)
        release(self.out)
        return Manifest.open(self.out)

    def run_part(self, part: Part) -> int:
        """Write a share of the shards; how many. Errors as of `run`, and for an `out` that holds parts of another preparation."""
        recipe, existing = self._existing()
        if existing is not None:
            return 0
        folder = journal.parts_folder(self.out)
        with (
            explain_full_disk(self.out),
            parts.hold(folder, part),
            staging(self.out, f"spool-{part.number}-of-{part.of}") as folders,
        ):
            opened = self._open(folders, recipe)
            entries = _wanted(self.card, opened, self.splits, self.source)
            claim(self.out, self.card, recipe, is_shared=True)
            writer = ShardWriter(opened.reader, self.out, folders.work, self.reencode)
            plan = _plan(writer, entries, opened.classes, recipe)
            mine = part.share(plan)
            _write(writer, mine, len(entries), self.max_bad_share, self._each, self.progress)
            parts.record(folder, part, _work(writer, plan), {"shards": len(mine)})
        return len(mine)

    @property
    def _each(self) -> Each:
        return self.run_each or partial(each, num_workers=self.workers)

    def _existing(self) -> tuple[dict[str, Any], Manifest | None]:
        _check_arguments(self.shard_bytes, self.shard_samples, self.max_bad_share, self.splits)
        recipe = _recipe(
            self.card, self.splits, self.shard_bytes, self.shard_samples, self.seed, self.val_share, self.reencode
        )
        return recipe, existing_dataset(self.out, self.card, recipe)

    @property
    def _source_is_gone(self) -> bool:
        """A finished dataset does not need its source (or a download) any more; a tar or folder still there must match."""
        gone = self.source is None or self.card.kind == "torchvision" or not objects.exists(self.source)
        return gone and self.card.kind != "embedded"

    def _open(self, folders: Staging, recipe: dict[str, Any]) -> ImageSource:
        opened = open_source(
            self.card,
            self.source,
            val_share=self.val_share,
            splits=self.splits,
            allow_roots=self.allow_roots,
            spool=folders.spool,
            progress=partial(self.progress, "copying") if self.progress else None,
        )
        recipe["source_fingerprint"] = opened.fingerprint
        return opened


def prepare(card: Card, out: str, **options: Any) -> Manifest:
    """`Preparation` in one go; `options` are its fields."""
    return Preparation(card=card, out=out, **options).run()


def _recipe(
    card: Card,
    splits: Sequence[str] | None,
    shard_bytes: int,
    shard_samples: int | None,
    seed: int,
    val_share: float | None,
    reencode: Reencode,
) -> dict[str, Any]:
    """What the bytes of the dataset follow from, besides the source; kept in the manifest."""
    return {
        "card": card.name,
        "splits": sorted(splits) if splits else None,
        "shard_bytes": shard_bytes if shard_samples is None else None,
        "shard_samples": shard_samples,
        "seed": seed,
        "val_share": val_share,
        "reencode": reencode.to_recipe(),
    }


def _of_this_source(existing: Manifest, opened: ImageSource, source: str | None) -> Manifest:
    """The dataset that is there, if it was made from this source."""
    if existing.recipe.get("source_fingerprint") != opened.fingerprint:
        raise UserError(
            f"{existing.url} holds '{existing.name}' from another source than {source}: "
            "remove it or choose another --out"
        )
    return existing


def _check_arguments(
    shard_bytes: int, shard_samples: int | None, max_bad_share: float, splits: Sequence[str] | None
) -> None:
    if shard_bytes < 1 << 12:
        raise UserError(f"shard_bytes {shard_bytes} is too small: give at least 4096, or leave it at {SHARD_BYTES}")
    if shard_samples is not None and shard_samples < 1:
        raise UserError(f"shard_samples {shard_samples} must be at least 1, for example 1000")
    if not 0 <= max_bad_share < 1:
        raise UserError(f"max_bad_share {max_bad_share} must be at least 0 and below 1, for example 0.001")
    if splits is not None and "train" not in splits:
        raise UserError(f"splits {', '.join(splits) or '(none)'} must include train: the classes are defined by it")


def _wanted(card: Card, opened: ImageSource, splits: Sequence[str] | None, source: str | None) -> list[ImageEntry]:
    present = {entry.split for entry in opened.entries}
    absent = sorted(set(splits or ()) - present)
    if absent:
        raise UserError(
            f"{source or card.name} has no split {', '.join(absent)} (it has {', '.join(sorted(present))}): "
            "add the folder, or hold out a part of train with val_share"
        )
    return [entry for entry in opened.entries if splits is None or entry.split in splits]


def _plan(
    writer: ShardWriter, entries: Sequence[ImageEntry], classes: Sequence[str], recipe: dict[str, Any]
) -> list[PlannedShard]:
    exact = not writer.reencode and all(entry.size >= 0 for entry in entries)
    return list(
        plan_shards(
            entries,
            classes,
            seed=recipe["seed"],
            shard_bytes=recipe["shard_bytes"] or SHARD_BYTES,
            shard_samples=recipe["shard_samples"],
            mean_bytes=None if exact else writer.mean_bytes,
        )
    )


def _work(writer: ShardWriter, plan: Sequence[PlannedShard]) -> str:
    """What all parts of a preparation have in common."""
    return hashlib.sha256("".join(writer.plan(shard) for shard in plan).encode()).hexdigest()


def _write(
    writer: ShardWriter,
    plan: Sequence[PlannedShard],
    total: int,
    max_bad_share: float,
    run_each: Each,
    progress: Progress | None,
) -> None:
    """Shards that an earlier run has written stay as they are; `total`: images of the dataset."""
    num_done, num_bad, to_do = 0, 0, sum(len(shard.entries) for shard in plan)
    report = progress or (lambda *_: None)
    report("writing", 0, to_do)
    for finished in run_each(writer, plan):
        num_done += finished.num_planned
        num_bad += len(finished.skipped)
        report("writing", num_done, to_do)
        if num_bad > max_bad_share * total:
            last = finished.skipped[-1]
            raise UserError(
                f"{num_bad} of the first {num_done} images (of {total}) cannot be read or decoded, above the share of "
                f"{max_bad_share:g} that is allowed; the last is {last.split}/{last.key} ({last.reason}): mend the source, or "
                "raise --max-bad-share and run again, which keeps what is written"
            )


def _finish(
    card: Card,
    out: str,
    classes: tuple[str, ...],
    made: Sequence[MadePiece],
    recipe: dict[str, Any],
    note: str,
    folders: Staging,
) -> None:
    """What is not needed goes, and the manifest comes: with it the dataset exists."""
    used = sum((part.class_counts for part in made if part.split == "train"), start=np.zeros(len(classes), np.int64))
    bare = [class_name for class_name, num in zip(classes, used.tolist(), strict=True) if not num]
    if bare and not card.indexed:
        raise UserError(f"the class {bare[0]} has no image in train that can be read: mend its images, or remove it")
    folders.work.mkdir(parents=True, exist_ok=True)
    result = assemble(card.name, out, classes, made, recipe, note, folders.work)
    names = {name for part in made for name in (*part.names, *part.shards)}
    if result.skipped_list is not None:
        publish(folders.work / result.skipped_list.name, objects.join(out, result.skipped_list.name))
        names.add(result.skipped_list.name)
    remove_written(out, keep=names)  # what an interrupted run with other options left
    objects.write_bytes(objects.join(out, manifests.NAME), result.to_json())


def _count_note(card: Card, entries: Sequence[ImageEntry]) -> str:
    """Where the source has other numbers of images than the card says."""
    found = Counter(entry.split for entry in entries)
    odd = [(split, num, card.splits[split]) for split, num in found.items() if card.splits.get(split, num) != num]
    return "; ".join(f"{split} has {num} images where the card says {expected}" for split, num, expected in sorted(odd))
