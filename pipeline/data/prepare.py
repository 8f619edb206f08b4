"""Raw images -> a prepared dataset: check, shuffle, write shards and indices, and the manifest last.

The shards are the same, byte by byte, whether the source was a tar or a folder: the order depends on the names of the
samples and the seed alone. Until the manifest is there the output is marked as unfinished by `PREPARING.json`; the
same command starts again, and an output folder that holds anything else is never touched.
"""

import contextlib
import hashlib
import importlib.metadata
import platform
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import storage
from pipeline.data import manifest as manifests
from pipeline.data.cards import Card
from pipeline.data.decode import DecodeError, decode_image
from pipeline.data.index import Shard, index_bytes
from pipeline.data.manifest import IndexFile, Manifest, Skipped, Split
from pipeline.data.order import permutation
from pipeline.data.output import claim, existing_dataset, release, remove_written, staging_folder
from pipeline.data.shards import SHARD_BYTES, ShardSample, WrittenShard, write_shards
from pipeline.data.sources import Entry, Source, open_source
from pipeline.errors import UserError

_MAX_KEY = 90  # characters; a tar name has room for 100 with the extension

Progress = Callable[[str, int, int], None]
"""Called as progress(phase, done, total) with the phases "checking" and "writing", in samples."""


@dataclass(frozen=True)
class _Spooled:
    """A sample that decodes, and where its bytes lie in the spool file."""

    split: str
    class_name: str
    raw_name: str
    extension: str
    offset: int
    size: int


def prepare(
    card: Card,
    out: str,
    *,
    source: str | None = None,
    splits: Sequence[str] | None = None,
    shard_bytes: int = SHARD_BYTES,
    max_bad_share: float = 0.001,
    seed: int = 0,
    val_share: float | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Write the dataset of `card` to the folder or prefix `out`, or return it at once if it is there already.

    Args:
        source: path or URL of the raw images; not needed for embedded and torchvision sets.
        splits: only these; None: all that the source has.
        shard_bytes: size at which a tar is closed.
        max_bad_share: share of images, over all splits, that may fail to decode; they are listed in the manifest.
        seed: of the order in which samples are written.
        val_share: share of each class held out as val where the source has no split folders.
    Raises:
        UserError: bad arguments, a bad source (`open_source`), too many images that do not decode, or an `out` that
            holds something else. No manifest is left behind then.
    """
    _check_arguments(shard_bytes, max_bad_share, splits)
    recipe: dict[str, Any] = {
        "card": card.name,
        "splits": sorted(splits) if splits else None,
        "shard_bytes": shard_bytes,
        "seed": seed,
        "val_share": val_share,
    }
    existing = existing_dataset(out, card, recipe)
    # A finished dataset does not need its source (or a download) any more; a tar or folder still there must match.
    gone = card.kind != "embedded" and (source is None or card.kind == "torchvision" or not storage.exists(source))
    if existing is not None and gone:
        return existing
    opened = open_source(card, source, val_share=val_share)
    recipe["source_fingerprint"] = opened.fingerprint
    if existing is not None:
        if existing.recipe.get("source_fingerprint") != opened.fingerprint:
            raise UserError(
                f"{out} holds '{card.name}' from another source than {source}: remove it or choose another --out"
            )
        return existing
    entries = _wanted(card, opened, splits, source)
    claim(out, card, recipe)
    try:
        with staging_folder(out) as staging:
            good, bad = _check(opened, entries, staging / "spool", max_bad_share, progress)
            split_records = _write(good, opened.classes, out, staging, seed, shard_bytes, progress)
            note = "; ".join(filter(None, [opened.note, _count_note(card, entries)]))
            result = _manifest(card, out, opened.classes, split_records, bad, recipe, note)
            remove_written(out, keep=_file_names(result))  # what an interrupted run with other options left
            storage.write_bytes(storage.join(out, manifests.NAME), result.to_json())
    except UserError:
        remove_written(out)  # the same command would fail the same way: nothing of ours is worth keeping
        release(out)
        raise
    release(out)
    return Manifest.open(out)


def _file_names(manifest: Manifest) -> set[str]:
    splits = manifest.splits.values()
    return {shard.name for split in splits for shard in split.shards} | {split.index.name for split in splits}


def _check_arguments(shard_bytes: int, max_bad_share: float, splits: Sequence[str] | None) -> None:
    if shard_bytes < 1 << 12:
        raise UserError(f"shard_bytes {shard_bytes} is too small: give at least 4096, or leave it at {SHARD_BYTES}")
    if not 0 <= max_bad_share < 1:
        raise UserError(f"max_bad_share {max_bad_share} must be at least 0 and below 1, for example 0.001")
    if splits is not None and "train" not in splits:
        raise UserError(f"splits {', '.join(splits) or '(none)'} must include train: the classes are defined by it")


def _wanted(card: Card, opened: Source, splits: Sequence[str] | None, source: str | None) -> list[Entry]:
    present = {entry.split for entry in opened.entries}
    absent = sorted(set(splits or ()) - present)
    if absent:
        raise UserError(
            f"{source or card.name} has no split {', '.join(absent)} (it has {', '.join(sorted(present))}): "
            "add the folder, or hold out a part of train with val_share"
        )
    return [entry for entry in opened.entries if splits is None or entry.split in splits]


def _check(
    opened: Source, entries: Sequence[Entry], spool: Path, max_bad_share: float, progress: Progress | None
) -> tuple[list[_Spooled], list[Skipped]]:
    """Decode every image once; copy those that decode into one file, from which any order can be read."""
    good: list[_Spooled] = []
    bad: list[Skipped] = []
    offset = 0
    with spool.open("wb") as file:
        for number, (entry, data) in enumerate(zip(entries, opened.read(entries), strict=True)):
            raw_name = f"{entry.class_name}/{entry.key}.{entry.extension}"
            try:
                decode_image(data)
            except DecodeError as error:
                bad.append(Skipped(entry.split, raw_name, str(error)))
                if len(bad) > max_bad_share * len(entries):
                    raise _too_many(bad, number + 1, len(entries), max_bad_share) from error
            else:
                file.write(data)
                good.append(_Spooled(entry.split, entry.class_name, raw_name, entry.extension, offset, len(data)))
                offset += len(data)
            if progress is not None:
                progress("checking", number + 1, len(entries))
    return good, sorted(bad, key=lambda entry: (entry.split, entry.key))


def _too_many(bad: Sequence[Skipped], seen: int, total: int, max_bad_share: float) -> UserError:
    last = bad[-1]
    return UserError(
        f"{len(bad)} of the first {seen} images (of {total}) cannot be decoded, above the share of {max_bad_share:g} "
        f"that is allowed; the last is {last.split}/{last.key} ({last.reason}): mend the source or raise max_bad_share"
    )


def _write(
    good: Sequence[_Spooled],
    classes: Sequence[str],
    out: str,
    staging: Path,
    seed: int,
    shard_bytes: int,
    progress: Progress | None,
) -> dict[str, Split]:
    """Shards and indices of every split, put to `out` as they are finished."""
    labels = {name: label for label, name in enumerate(classes)}
    ordered = sorted(good, key=lambda sample: (sample.split, sample.class_name, sample.raw_name))
    keys = _unique_keys(ordered)
    records: dict[str, Split] = {}
    num_done = 0
    with (staging / "spool").open("rb") as spool:
        for place, split in enumerate(sorted({sample.split for sample in ordered})):
            members = [number for number, sample in enumerate(ordered) if sample.split == split]

            def samples(members: list[int] = members, place: int = place) -> Iterator[ShardSample]:
                for position in permutation(len(members), seed, place).tolist():
                    sample = ordered[members[position]]
                    spool.seek(sample.offset)
                    data = spool.read(sample.size)
                    extension = "jpg" if sample.extension == "jpeg" else sample.extension
                    yield ShardSample(keys[members[position]], labels[sample.class_name], data, extension)

            written: list[WrittenShard] = []
            for shard in write_shards(samples(), staging, split, shard_bytes):
                storage.put_file(shard.path, storage.join(out, shard.path.name))
                shard.path.unlink()
                written.append(shard)
                num_done += len(shard.rows)
                if progress is not None:
                    progress("writing", num_done, len(ordered))
            records[split] = _write_index(split, written, out)
    return records


def _write_index(split: str, written: Sequence[WrittenShard], out: str) -> Split:
    rows = [row for shard in written for row in shard.rows]
    data = index_bytes(
        shard=np.repeat(np.arange(len(written), dtype=np.int32), [len(shard.rows) for shard in written]),
        offset=np.array([row.offset for row in rows], np.int64),
        size=np.array([row.size for row in rows], np.int32),
        label=np.array([row.label for row in rows], np.int32),
        keys=[row.key for row in rows],
    )
    name = f"{split}.index.parquet"
    storage.write_bytes(storage.join(out, name), data)
    shards = tuple(Shard(shard.path.name, shard.size_bytes, shard.sha256, len(shard.rows)) for shard in written)
    return Split(len(rows), shards, IndexFile(name, hashlib.sha256(data).hexdigest()))


def _unique_keys(ordered: Sequence[_Spooled]) -> list[str]:
    """A key for each sample that says where it came from, safe as a file name and in a tar; no two alike."""
    keys: list[str] = []
    taken: set[str] = set()
    for sample in ordered:
        stem = sample.raw_name.rpartition(".")[0]
        # WebDataset splits at the first dot; slashes and odd characters would meet file systems of every kind.
        key = re.sub(r"[^A-Za-z0-9_-]+", "_", stem)
        if len(key) > _MAX_KEY or key.lower() in taken:
            full = f"{sample.split}/{sample.raw_name}".encode("utf-8", "surrogateescape")
            key = f"{key[: _MAX_KEY - 17]}-{hashlib.sha256(full).hexdigest()[:16]}"
        taken.add(key.lower())
        keys.append(key)
    return keys


def _count_note(card: Card, entries: Sequence[Entry]) -> str:
    """Where the source has other numbers of images than the card says."""
    found = Counter(entry.split for entry in entries)
    odd = [(split, num, card.splits[split]) for split, num in found.items() if card.splits.get(split, num) != num]
    return "; ".join(f"{split} has {num} images where the card says {expected}" for split, num, expected in sorted(odd))


def _manifest(
    card: Card,
    out: str,
    classes: tuple[str, ...],
    splits: dict[str, Split],
    bad: Sequence[Skipped],
    recipe: dict[str, Any],
    note: str,
) -> Manifest:
    versions = {"python": platform.python_version()}
    for package in ("normfree", "webdataset", "pillow", "pyarrow"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    digest = manifests.dataset_digest(classes, splits)
    return Manifest(out, card.name, classes, digest, splits, tuple(bad), recipe, note, versions)
