"""WebDataset tars that are there already -> a manifest next to them. The tars are read once and never touched."""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from pipeline.data import parts
from pipeline.data.format import manifest as manifests
from pipeline.data.format.manifest import Manifest, Skipped, refuse_unfinished
from pipeline.data.format.pieces import Shard
from pipeline.data.format.tars import BadTar
from pipeline.data.parts import Part
from pipeline.data.prepare import journal
from pipeline.data.prepare.assemble import MadePiece, PieceMaker, assemble, plan_pieces
from pipeline.data.prepare.convert import convert
from pipeline.data.prepare.find_tars import FoundTar, find_tars
from pipeline.data.prepare.journal import Record
from pipeline.data.prepare.output_folder import explain_full_disk, only_writer, publish_manifest, staging
from pipeline.data.process_pool import Each, each
from pipeline.data.verify.tar_scan import DOTTED, TarScan, in_order, scan_tar
from pipeline.data.verify.wds_labels import label_classes, label_kind
from pipeline.documents import excerpt
from pipeline.errors import UserError
from pipeline.storage import objects

MIN_FOR_CAPTIONS = 100
"""Samples from which on classes of one sample each are no small set."""


@dataclass(frozen=True)
class _Scanned:
    """A tar that has its record."""

    name: str
    split: str
    num_samples: int
    skipped: tuple[Skipped, ...]
    texts: frozenset[str]
    """Its labels."""
    key_marks: np.ndarray
    """(num_samples,) uint64, digests of the keys."""


@dataclass(frozen=True)
class _Scanner:
    """Scans tars in a worker process."""

    base: str
    label_field: str | None

    def plan(self, tar: FoundTar) -> str:
        text = f"{tar.split}\0{tar.name}\0{tar.size_bytes}\0{self.label_field}"
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()

    def work(self, tars: Sequence[FoundTar]) -> str:
        """What all parts have in common."""
        return hashlib.sha256("".join(map(self.plan, tars)).encode()).hexdigest()

    def __call__(self, tar: FoundTar) -> _Scanned | str:
        """What has its record in the journal afterwards; or what is wrong with the whole tar."""
        record = journal.read_record(self.base, tar.name, self.plan(tar))
        if record is None:
            try:
                record = self._scan(tar)
            except BadTar as error:
                return f"{tar.name} is {error}"
        marks = [hashlib.blake2b(key.encode(), digest_size=8).digest() for key in record.keys]
        texts = frozenset(record.label_texts)
        return _Scanned(
            tar.name, tar.split, len(marks), record.skipped, texts, np.frombuffer(b"".join(marks), np.uint64)
        )

    def _scan(self, tar: FoundTar) -> Record:
        found = TarScan()
        scan_tar(objects.join(self.base, tar.name), found)
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
    run_each: Each | None = None,
    part: Part | None = None,
    merge: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest | None:
    """Write the manifest and the index of existing WebDataset tars into their folder, or those of a dataset of format 2 anew.

    Args:
        url: a folder (all its tars, at any depth), or its tars by a pattern with `*` or `{000..099}`.
        splits: pattern of tar names for each split; None: by the words in the names of tars and folders, else all are train.
        classes: class names in label order; None: as the labels say.
        label_field: of JSON labels; None: the usual names.
        name: of the dataset; None: the folder's.
        max_bad_share: share of samples that may be unusable; they are listed in the manifest with their reasons.
        run_each: runs the work in place of processes of this machine.
        part: scan a share of the tars only, and return None.
        merge: all tars were scanned by parts; UserError while one is missing.
        progress: called as progress(done, total) in tars.
    Raises:
        UserError: no tars, a damaged tar, too many unusable samples, or a manifest that is there and says otherwise.
            What is scanned is kept for the next run.
    """
    if (converted := convert(url)) is not None:
        return converted
    base, tars, notes = find_tars(url, splits)
    scanner = _Scanner(base, label_field)
    asked: dict[str, Any] = {"splits": dict(splits or {}), "classes": list(classes or [])}
    asked |= {"label_field": label_field, "num_tars": len(tars)}
    if (existing := _existing(base, tars, asked)) is not None:
        journal.remove_records(base)  # of a run that was killed after the manifest was there
        return existing
    refuse_unfinished(base)
    run_each = run_each or partial(each, num_workers=workers)
    if part is not None:
        _scan_part(scanner, tars, part, run_each, progress)
        return None
    if merge:
        parts.results(journal.parts_folder(base), scanner.work(tars))
    with explain_full_disk(base), only_writer(base, None), staging(base) as folders:
        scanned = _scan_all(scanner, tars, run_each, progress)
        _refuse_bad(base, scanned, max_bad_share)
        class_names, numbers = _classes(base, scanned, classes)
        recipe = {"adopted": {**asked, "labels": label_kind(class_names, numbers)}}
        pieces = plan_pieces((tar.split, tar.name, scanner.plan(tar)) for tar in tars)
        made = list(run_each(PieceMaker(base, folders.work, len(class_names), numbers), pieces))
        title = name or re.sub(r"[^a-z0-9_]+", "_", base.rstrip("/").rpartition("/")[2].lower()) or "adopted"
        note = "; ".join((*_notes(scanned, made, class_names, numbers), *notes))
        folders.work.mkdir(parents=True, exist_ok=True)
        publish_manifest(assemble(title, base, class_names, made, recipe, note, folders.work), folders.work)
    journal.remove_records(base)
    return Manifest.open(base)


def _scan_part(
    scanner: _Scanner,
    tars: Sequence[FoundTar],
    part: Part,
    run_each: Each,
    progress: Callable[[int, int], None] | None,
) -> None:
    folder = journal.parts_folder(scanner.base)
    with explain_full_disk(scanner.base), parts.hold(folder, part):
        found = _scan_all(scanner, part.share(tars), run_each, progress)
        parts.record(folder, part, scanner.work(tars), {"tars": len(found)})


def _existing(base: str, tars: Sequence[FoundTar], asked: Mapping[str, object]) -> Manifest | None:
    """The manifest that is there, if it is of these tars and was asked for in the same way."""
    if not objects.exists(objects.join(base, manifests.NAME)):
        return None
    found = Manifest.open(base)
    adopted = dict(found.recipe.get("adopted") or {})
    adopted.pop("labels", None)
    stored = {(name, shard.name, shard.size_bytes) for name in found.splits for shard in found.split(name).shards}
    if adopted != asked or not stored <= {(tar.split, tar.name, tar.size_bytes) for tar in tars}:
        raise UserError(
            f"{base} has a manifest already, made otherwise or of other tars: remove {manifests.NAME} to index again"
        )
    return found


def _scan_all(
    scanner: _Scanner,
    tars: Sequence[FoundTar],
    run_each: Each,
    progress: Callable[[int, int], None] | None,
) -> list[_Scanned]:
    scanned: list[_Scanned] = []
    broken: list[str] = []
    for number, found in enumerate(run_each(scanner, tars), start=1):
        if isinstance(found, str):
            broken.append(found)
        else:
            scanned.append(found)
        if progress is not None:
            progress(number, len(tars))
    if broken:
        raise UserError(
            f"{len(broken)} of {len(tars)} tars are damaged; fetch them again or leave them out: "
            f"{'; '.join(sorted(broken))}"
        )
    return sorted(scanned, key=lambda tar: (tar.split, tar.name))


def _refuse_bad(base: str, scanned: Sequence[_Scanned], max_bad_share: float) -> None:
    skipped = [entry for tar in scanned for entry in tar.skipped]
    total = len(skipped) + sum(tar.num_samples for tar in scanned)
    if len(skipped) == total:
        reason = f" (such as {skipped[0].key}: {skipped[0].reason})" if skipped else ""
        raise UserError(f"{base} has no usable sample{reason}: an image and a label with one key are needed")
    if len(skipped) > max_bad_share * total:
        raise UserError(
            f"{len(skipped)} of {total} samples cannot be used, above the share of {max_bad_share:g} that is allowed; "
            f"such as {skipped[0].key} ({skipped[0].reason}): raise --max-bad-share, which keeps what is scanned"
        )


def _classes(
    base: str, scanned: Sequence[_Scanned], given: Sequence[str] | None
) -> tuple[tuple[str, ...], dict[str, int]]:
    """`label_classes` of all labels. UserError where hardly any two samples share one: it describes an image, and is no class."""
    names, numbers = label_classes({text for tar in scanned for text in tar.texts}, given)
    total = sum(tar.num_samples for tar in scanned)
    if given is None and total >= MIN_FOR_CAPTIONS and 2 * len(names) > total:
        raise UserError(
            f"the {total} samples of {base} have {len(names)} different labels, such as '{excerpt(names[0])}', which look "
            "like captions or names of images: name the field of the class by --label-field, or give all names by --classes"
        )
    return names, numbers


def _notes(
    scanned: Sequence[_Scanned], made: Sequence[MadePiece], classes: Sequence[str], numbers: Mapping[str, int]
) -> Iterator[str]:
    used = sum((part.class_counts > 0 for part in made if part.split == "train"), start=np.zeros(len(classes), bool))
    marks = np.concatenate([tar.key_marks for tar in scanned])
    repeated = len(marks) - len(np.unique(marks))
    empty = [tar.name for tar in scanned if not tar.num_samples]
    yield "existing tars, indexed in place"
    if len(classes) == 1:
        yield f"all samples are of one class ({excerpt(classes[0])})"
    if label_kind(classes, numbers) != "numbers" and all(name.isdecimal() for name in classes):
        first, last = excerpt(classes[0]), excerpt(classes[-1])
        yield f"the labels are {len(classes)} numbers from {first} to {last}, numbered anew in their order"
    if not used.all():
        yield f"{(~used).sum()} classes have no sample in train"
    if repeated:
        yield f"{repeated} keys occur in more than one tar"
    if empty:
        yield f"{len(empty)} tars have no sample, such as {empty[0]}"
