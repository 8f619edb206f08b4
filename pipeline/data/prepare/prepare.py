"""Raw images -> a prepared dataset: list, plan, write shards and indices, and the manifest last.

    open_source (listing) -> plan_shards (what goes where) -> ShardWriter in worker processes -> journal -> manifest

The shards are the same, byte by byte, whether the source was a tar or a folder, for any number of workers and after any
number of interruptions: the plan depends on the listing and the seed alone. Until the manifest is there the output is
marked as unfinished by `PREPARING.json`; the same command goes on where it was, and an output folder that holds anything
else is never touched.

In memory are the listing and the plan (some 0.5 KB an image) and one image a worker. Sources that can be read from the
middle cost no disk; a compressed tar or parquet is copied once to the staging folder, as large as it is unpacked.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from pipeline.data.format import manifest as manifests
from pipeline.data.format.manifest import Manifest
from pipeline.data.format.shards import SHARD_BYTES
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
"""Called as progress(phase, done, total): "copying" in files of the source, then "writing" in images."""


def prepare(
    card: Card,
    out: str,
    *,
    source: str | None = None,
    splits: Sequence[str] | None = None,
    shard_bytes: int = SHARD_BYTES,
    shard_samples: int | None = None,
    max_bad_share: float = 0.001,
    seed: int = 0,
    val_share: float | None = None,
    allow_roots: Sequence[str] = (),
    reencode: Reencode | None = None,
    workers: int = 1,
    run_each: Each | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Write the dataset of `card` to the folder or prefix `out`, or return it at once if it is there already.

    Args:
        source: path or URL of the raw images; not needed for embedded and torchvision sets.
        splits: only these; None: all that the source has.
        shard_bytes: size at which a tar is closed.
        shard_samples: images of a tar; given, it takes the place of `shard_bytes`.
        max_bad_share: share of images, over all splits, that may be unreadable; they are listed in the manifest.
        seed: of the order in which samples are written.
        val_share: share of each class held out as val where the source has no split folders.
        allow_roots: folders and addresses that a list may name besides what lies below its own folder.
        reencode: how images are made smaller; None: their bytes stay as they are.
        workers: processes; the result is the same for any number.
        run_each: runs the work in place of processes of this machine.
    Raises:
        UserError: bad arguments, a bad source (`open_source`), too many images that cannot be read, a full disk, or an
            `out` that holds something else. No manifest is left behind then; finished shards are, for the next run.
    """
    reencode = reencode or Reencode()
    run_each = run_each or partial(each, num_workers=workers)
    _check_arguments(shard_bytes, shard_samples, max_bad_share, splits)
    recipe = _recipe(card, splits, shard_bytes, shard_samples, seed, val_share, reencode)
    existing = existing_dataset(out, card, recipe)
    # A finished dataset does not need its source (or a download) any more; a tar or folder still there must match.
    gone = card.kind != "embedded" and (source is None or card.kind == "torchvision" or not objects.exists(source))
    if existing is not None and gone:
        return existing
    with explain_full_disk(out), only_writer(out, existing), staging(out) as folders:
        listing = partial(open_source, card, source, val_share=val_share, splits=splits, allow_roots=allow_roots)
        opened = listing(spool=folders.spool, progress=partial(progress, "copying") if progress else None)
        recipe["source_fingerprint"] = opened.fingerprint
        if existing is not None:
            return _of_this_source(existing, opened, source)
        entries = _wanted(card, opened, splits, source)
        claim(out, card, recipe)
        writer = ShardWriter(opened.reader, out, folders.work, reencode)
        plan = _plan(writer, entries, opened.classes, recipe)
        _write(writer, plan, max_bad_share, run_each, progress)
        pieces = plan_pieces((shard.split, shard.name, writer.plan(shard)) for shard in plan)
        made = list(run_each(PieceMaker(out, folders.work, len(opened.classes)), pieces))
        note = "; ".join(filter(None, [opened.note, _count_note(card, entries)]))
        _finish(card, out, opened.classes, made, recipe, note, folders)
    release(out)
    return Manifest.open(out)


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


def _write(
    writer: ShardWriter, plan: Sequence[PlannedShard], max_bad_share: float, run_each: Each, progress: Progress | None
) -> None:
    """All shards are there afterwards, those that an earlier run has written as they were."""
    total = sum(len(shard.entries) for shard in plan)
    num_done = num_bad = 0
    for finished in run_each(writer, plan):
        num_done += finished.num_planned
        num_bad += len(finished.skipped)
        if progress is not None:
            progress("writing", num_done, total)
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
