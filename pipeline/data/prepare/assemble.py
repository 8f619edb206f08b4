"""Records of finished shards -> pieces of the index, and the manifest's content. No process holds more than a piece."""

import contextlib
import importlib.metadata
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.format.manifest import Manifest, Skipped, Split, dataset_digest, write_skipped
from pipeline.data.format.pieces import PIECE_SHARDS, ROW, Piece, write_piece
from pipeline.data.prepare import journal
from pipeline.data.prepare.journal import Record
from pipeline.data.prepare.output_folder import explain_full_disk, publish
from pipeline.errors import UserError
from pipeline.storage import objects


@dataclass(frozen=True)
class PlannedPiece:
    """Neighbouring shards of a split whose records are in the journal."""

    split: str
    number: int
    plans: Mapping[str, str]
    """Shard names in order -> what their records must say (`Record.plan`)."""


@dataclass(frozen=True)
class MadePiece:
    split: str
    number: int
    piece: Piece | None
    """None where no shard of it has a sample."""
    names: tuple[str, ...]
    """Of its objects."""
    shards: tuple[str, ...]
    """Names of those that have samples."""
    class_counts: np.ndarray
    skipped: tuple[Skipped, ...]


def plan_pieces(plans: Iterable[tuple[str, str, str]]) -> list[PlannedPiece]:
    """Args: plans: (split, shard name, `Record.plan`) of all shards, in order."""
    by_split: dict[str, list[tuple[str, str]]] = {}
    for split, name, plan in plans:
        by_split.setdefault(split, []).append((name, plan))
    return [
        PlannedPiece(split, begin // PIECE_SHARDS, dict(shards[begin : begin + PIECE_SHARDS]))
        for split, shards in sorted(by_split.items())
        for begin in range(0, len(shards), PIECE_SHARDS)
    ]


@dataclass(frozen=True)
class PieceMaker:
    """Makes pieces out of the journal; what is sent to a worker process."""

    out: str
    work: Path
    """Local folder for unfinished files."""
    num_classes: int
    numbers: Mapping[str, int] | None = None
    """Of adopted tars: the class of each label text."""

    def __call__(self, planned: PlannedPiece) -> MadePiece:
        records = []
        for name, plan in planned.plans.items():
            record = journal.read_record(self.out, name, plan)
            if record is None:
                raise UserError(
                    f"{objects.join(self.out, name)} was finished and is gone, or was changed: run the same command again"
                )
            if not self._has_labels(record):
                raise UserError(
                    f"{journal.url_of(self.out, name)} has labels that are none of the classes: remove it, and run the same "
                    "command again"
                )
            records.append(record)
        with explain_full_disk(self.out):
            self.work.mkdir(parents=True, exist_ok=True)
            made = make_piece(self.work, planned.split, planned.number, records, self.num_classes, self.numbers)
            for name in made.names:
                publish(self.work / name, objects.join(self.out, name))
        return made

    def _has_labels(self, record: Record) -> bool:
        """One for each sample, of a class that there is: others may write where the journal lies."""
        if self.numbers is not None:
            return len(record.label_texts) == len(record.keys) and self.numbers.keys() >= set(record.label_texts)
        return bool(np.all((record.label >= 0) & (record.label < self.num_classes)))


def make_piece(
    folder: Path,
    split: str,
    number: int,
    records: Sequence[Record],
    num_classes: int,
    numbers: Mapping[str, int] | None = None,
) -> MadePiece:
    """The objects of a piece in a local folder, in the order of the records."""
    import pyarrow as pa

    skipped = tuple(entry for record in records for entry in record.skipped)
    kept = [record for record in records if record.shard.num_samples]
    rows = np.empty(sum(record.shard.num_samples for record in kept), ROW)
    begin = 0
    for record in kept:
        part = rows[begin : begin + record.shard.num_samples]
        begin += len(part)
        part["offset"], part["size"], part["crc32"] = record.offset, record.size, record.crc32
        part["label"] = record.label if numbers is None else [numbers[text] for text in record.label_texts]
    counts = np.bincount(rows["label"], minlength=num_classes)
    if not kept:
        return MadePiece(split, number, None, (), (), counts, skipped)
    texts = pa.chunked_array([pa.array(record.keys, pa.string()) for record in kept])
    hashes = np.concatenate([record.phash for record in kept])
    piece, names = write_piece(folder, split, number, [record.shard for record in kept], rows, texts, hashes)
    return MadePiece(split, number, piece, names, tuple(r.shard.name for r in kept), counts, skipped)


def assemble(
    name: str,
    url: str,
    classes: tuple[str, ...],
    made: Sequence[MadePiece],
    recipe: Mapping[str, Any],
    note: str,
    folder: Path,
    labels: tuple[str, ...] = (),
    masks: tuple[str, ...] = (),
    boxes: tuple[str, ...] = (),
) -> Manifest:
    """The manifest of a dataset at `url` that consists of these pieces; the list of what was skipped is written to `folder`."""
    splits: dict[str, Split] = {}
    for split in sorted({part.split for part in made}):
        parts = sorted((part for part in made if part.split == split), key=lambda part: part.number)
        pieces = tuple(part.piece for part in parts if part.piece is not None)
        if pieces:
            splits[split] = Split(sum(piece.num_samples for piece in pieces), pieces)
    skipped = write_skipped(folder, (entry for part in made for entry in part.skipped))
    versions = {"python": platform.python_version()}
    for package in ("normfree", "webdataset", "pillow", "pyarrow"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    digest = dataset_digest(classes, splits, labels or masks or boxes)
    whole = Manifest(url, name, classes, digest, splits, skipped, dict(recipe), note, versions)
    return replace(whole, labels=labels, masks=masks, boxes=boxes)
