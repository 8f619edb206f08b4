"""WebDataset tars that are there already -> a manifest next to them. The tars are read once and never touched."""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipeline.data.format import manifest as manifests
from pipeline.data.format.index import Shard
from pipeline.data.format.manifest import Manifest, Skipped
from pipeline.data.format.tars import BadTar
from pipeline.data.prepare import journal
from pipeline.data.prepare.assemble import assemble
from pipeline.data.prepare.find_tars import FoundTar, find_tars
from pipeline.data.prepare.journal import Record
from pipeline.data.prepare.output_folder import explain_full_disk, only_writer, publish, staging
from pipeline.data.process_pool import each
from pipeline.data.verify.tar_scan import DOTTED, TarScan, in_order, scan_tar
from pipeline.data.verify.wds_labels import label_classes, label_kind
from pipeline.errors import UserError
from pipeline.storage import objects


@dataclass(frozen=True)
class _Scanner:
    """Scans tars in a worker process."""

    base: str
    label_field: str | None

    def plan(self, tar: FoundTar) -> str:
        text = f"{tar.split}\0{tar.name}\0{tar.size_bytes}\0{self.label_field}"
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()

    def __call__(self, tar: FoundTar) -> Record | str:
        """The record of a tar, also written to the journal; or what is wrong with the whole tar."""
        found = TarScan()
        try:
            scan_tar(objects.join(self.base, tar.name), found)
        except BadTar as error:
            return f"{tar.name} is {error}"
        rows: list[tuple[str, int, int, int, int, str]] = []
        skipped: list[Skipped] = []
        for sample in in_order(found):
            skipped += [Skipped(tar.split, f"{tar.name}/{sample.key}.{ending}", DOTTED) for ending in sample.dotted]
            if sample.dotted and not sample.images:
                continue  # nothing but images that are named in this way, each of them counted
            try:
                text = sample.label(self.label_field)
            except ValueError as error:
                skipped.append(Skipped(tar.split, f"{tar.name}/{sample.key}", str(error)))
            else:
                rows.append((sample.key, *sample.images[0], sample.phash, sample.crc32, text))
        keys, offsets, sizes, hashes, checksums, texts = zip(*rows, strict=True) if rows else ((),) * 6
        record = Record(
            self.plan(tar),
            tar.split,
            Shard(tar.name, found.num_bytes, found.sha256, len(rows)),
            tuple(keys),
            np.array(offsets, np.int64),
            np.array(sizes, np.int32),
            np.full(len(rows), -1, np.int32),
            np.array(hashes, np.uint64),
            np.array(checksums, np.uint32),
            tuple(skipped),
            tuple(texts),
        )
        journal.write_record(self.base, record)
        return record


def adopt(
    url: str,
    *,
    splits: Mapping[str, str] | None = None,
    classes: Sequence[str] | None = None,
    label_field: str | None = None,
    name: str | None = None,
    max_bad_share: float = 0.001,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Write the manifest and the indices of existing WebDataset tars into their folder.

    Args:
        url: a folder (all its tars, at any depth), or its tars by a pattern with `*` or `{000..099}`.
        splits: pattern of tar names for each split; None: by the words in the names of tars and folders, else all are train.
        classes: class names in label order; None: as the labels say.
        label_field: of JSON labels; None: the usual names.
        name: of the dataset; None: the folder's.
        max_bad_share: share of samples that may be unusable; they are listed in the manifest with their reasons.
        progress: called as progress(done, total) in tars.
    Raises:
        UserError: no tars, a damaged tar, too many unusable samples, or a manifest that is there and says otherwise.
            What is scanned is kept for the next run.
    """
    base, tars, notes = find_tars(url, splits)
    scanner = _Scanner(base, label_field)
    asked: dict[str, Any] = {"splits": dict(splits or {}), "classes": list(classes or [])}
    asked |= {"label_field": label_field, "num_tars": len(tars)}
    existing = _existing(base, tars, asked)
    if existing is not None:
        journal.remove_records(base)  # of a run that was killed after the manifest was there
        return existing
    with explain_full_disk(base), only_writer(base, None), staging(base) as folders:
        records = _scan_all(scanner, tars, max_bad_share, workers, progress)
        texts = {text for record in records for text in record.label_texts}
        class_names, numbers = label_classes(texts, classes)
        records = [
            replace(record, label=np.array([numbers[text] for text in record.label_texts], np.int32))
            for record in records
        ]
        kind = label_kind(class_names, numbers)
        recipe = {"adopted": {**asked, "labels": kind}}
        folders.work.mkdir(parents=True, exist_ok=True)
        title = name or re.sub(r"[^a-z0-9_]+", "_", base.rstrip("/").rpartition("/")[2].lower()) or "adopted"
        result = assemble(
            title, base, class_names, records, recipe, "; ".join((_note(records, class_names), *notes)), folders.work
        )
        for split in result.splits.values():
            for file in (split.index.columns, split.index.keys):
                publish(folders.work / file.name, objects.join(base, file.name))
        objects.write_bytes(objects.join(base, manifests.NAME), result.to_json())
    journal.remove_records(base)
    return Manifest.open(base)


def _existing(base: str, tars: Sequence[FoundTar], asked: Mapping[str, object]) -> Manifest | None:
    """The manifest that is there, if it is of these tars and was asked for in the same way."""
    if not objects.exists(objects.join(base, manifests.NAME)):
        return None
    found = Manifest.open(base)
    adopted = dict(found.recipe.get("adopted") or {})
    adopted.pop("labels", None)
    stored = {(name, shard.name, shard.size_bytes) for name, split in found.splits.items() for shard in split.shards}
    if adopted != asked or not stored <= {(tar.split, tar.name, tar.size_bytes) for tar in tars}:
        raise UserError(
            f"{base} has a manifest already, made otherwise or of other tars: remove {manifests.NAME} to index again"
        )
    return found


def _scan_all(
    scanner: _Scanner,
    tars: Sequence[FoundTar],
    max_bad_share: float,
    workers: int,
    progress: Callable[[int, int], None] | None,
) -> list[Record]:
    records = journal.read_records(scanner.base, {tar.name: scanner.plan(tar) for tar in tars})
    todo = [tar for tar in tars if tar.name not in records]
    broken: list[str] = []
    for number, found in enumerate(each(scanner, todo, workers), start=len(records) + 1):
        if isinstance(found, str):
            broken.append(found)
        else:
            records[found.shard.name] = found
        if progress is not None:
            progress(number, len(tars))
    if broken:
        raise UserError(
            f"{len(broken)} of {len(tars)} tars are damaged; fetch them again or leave them out: {'; '.join(broken)}"
        )
    skipped = [entry for tar in tars for entry in records[tar.name].skipped]
    total = sum(record.num_planned for record in records.values())
    if len(skipped) == total:
        reason = f" (such as {skipped[0].key}: {skipped[0].reason})" if skipped else ""
        raise UserError(f"{scanner.base} has no usable sample{reason}: an image and a label with one key are needed")
    if len(skipped) > max_bad_share * total:
        raise UserError(
            f"{len(skipped)} of {total} samples cannot be used, above the share of {max_bad_share:g} that is allowed; "
            f"such as {skipped[0].key} ({skipped[0].reason}): raise --max-bad-share, which keeps what is scanned"
        )
    return [records[tar.name] for tar in tars]


def _note(records: Sequence[Record], classes: Sequence[str]) -> str:
    used = {int(label) for record in records if record.split == "train" for label in np.unique(record.label)}
    repeated = sum(len(record.keys) for record in records) - len({key for record in records for key in record.keys})
    notes = ["existing tars, indexed in place"]
    notes += [f"{len(classes) - len(used)} classes have no sample in train"] if len(used) < len(classes) else []
    notes += [f"{repeated} keys occur in more than one tar"] if repeated else []
    return "; ".join(notes)
