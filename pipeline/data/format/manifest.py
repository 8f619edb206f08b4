"""The manifest: what a prepared dataset is, byte by byte. A dataset exists if and only if its manifest.json does.

`manifest.json` names the pieces of each split's index with their digests; the pieces name every shard with size and SHA-256
and say where in it each image lies (`pipeline.data.format.pieces`). Opening reads the manifest alone; a piece is checked
against its digest when it is first used, and shards are read whole by `pipeline.data.verify.verify`.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import documents
from pipeline.data.format import label_sets
from pipeline.data.format.index import SplitIndex
from pipeline.data.format.pieces import MIN_SAMPLE_BYTES, Piece, Shard, StoredFile
from pipeline.documents import Count, FileName, Sha256, Text
from pipeline.errors import UserError
from pipeline.storage import objects

__all__ = ["Manifest", "Piece", "Shard", "Skipped", "Split", "SplitIndex", "StoredFile"]

NAME = "manifest.json"
SKIPPED_NAME = "skipped.jsonl"
UNFINISHED_NAME = "PREPARING.json"
"""In a place without manifest: a preparation is under way there, or was interrupted."""
FORMAT, FORMAT_VERSION = "normfree-dataset", 3
MAX_BYTES = 512 << 20
_REMEDY = "restore it, or prepare the dataset again elsewhere"


@dataclass(frozen=True)
class Split:
    """What the manifest says of one split."""

    num_samples: Count
    pieces: tuple[Piece, ...]

    @property
    def num_shards(self) -> int:
        return sum(piece.num_shards for piece in self.pieces)

    @property
    def num_bytes(self) -> int:
        """Of all shards."""
        return sum(piece.num_bytes for piece in self.pieces)


@dataclass(frozen=True)
class Skipped:
    """A raw image that is in no shard, and why."""

    split: Text
    key: Text
    reason: Text


@dataclass(frozen=True)
class Manifest:
    url: str
    name: Text
    classes: tuple[Text, ...]
    digest: Sha256
    """SHA-256 over the classes and, for each split, the digests of shards and rows: two datasets with one digest hold the
    same bytes under the same labels."""
    splits: Mapping[FileName, Split]
    skipped_list: StoredFile | None
    """JSON lines of `Skipped`; None where nothing was."""
    recipe: Mapping[str, Any]
    """What was asked of `prepare`: decides whether asking again is the same dataset."""
    source_note: Text
    created_with: Mapping[str, Text]
    former_digest: Text = ""
    """Of the same dataset in format 2, from which it was converted: what runs of that time have recorded."""
    labels: tuple[Text, ...] = ()
    """Where an image has several: the labels in order, of which the classes are sets (`pipeline.data.format.label_sets`)."""
    masks: tuple[Text, ...] = ()
    """Where each pixel has a class: these, in order (`pipeline.data.format.masks`); an image then has none of its own."""
    boxes: tuple[Text, ...] = ()
    """Where images have boxes: their classes, in order (`pipeline.data.format.boxes`); an image then has none of its own."""

    @staticmethod
    def open(url: str) -> "Manifest":
        """Read the manifest and check it against its digests; the index files are opened by `split`.

        Raises:
            UserError: there is no dataset at `url`, or what is there does not verify.
        """
        url = str(url)
        try:
            return _parse(objects.read_bytes(objects.join(url, NAME), max_bytes=MAX_BYTES + 1), url)
        except (FileNotFoundError, NotADirectoryError):
            refuse_unfinished(url)
            raise UserError(
                f"there is no dataset at {url} (no {NAME}): run 'normfree data prepare CARD --out {url}' (again, if it "
                f"was interrupted), or 'normfree data index {url}' if it holds WebDataset tars"
            ) from None

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def outputs(self) -> tuple[str, ...]:
        """What a network has a logit for: the labels where an image has several, the classes of pixels or of boxes, else the
        classes."""
        return self.labels or self.masks or self.boxes or self.classes

    @property
    def targets(self) -> np.ndarray | None:
        """(classes, labels) int8, see `label_sets.targets`; None with one label an image."""
        return label_sets.targets(self.classes, self.labels) if self.labels else None

    def strata(self, label: np.ndarray) -> np.ndarray:
        """Within what parts of a split are drawn: classes; where images have several labels, all of it as one."""
        return np.zeros_like(label) if self.labels else label

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """The raw images that are in no shard, by split and key. Reads their list."""
        if self.skipped_list is None:
            return ()
        where = objects.join(self.url, self.skipped_list.name)
        try:
            data = objects.read_bytes(where, max_bytes=self.skipped_list.size_bytes + 1)
        except FileNotFoundError:
            raise UserError(f"{where} is missing: {_REMEDY}") from None
        if hashlib.sha256(data).hexdigest() != self.skipped_list.sha256:
            raise UserError(f"{where} does not verify (edited or damaged): {_REMEDY}")
        lines = documents.parse_jsonl(data, where, max_bytes=len(data) + 1, remedy=_REMEDY)
        return tuple(documents.convert(value, Skipped, where, remedy=_REMEDY) for _, value in lines)

    def split(self, name: str) -> SplitIndex:
        """The index of a split; its pieces are read when they are needed.

        Raises:
            UserError: no split of that name.
        """
        if name not in self.splits:
            raise UserError(f"the dataset {self.url} has no split '{name}': choose {' or '.join(self.splits)}")
        return SplitIndex(self.url, name, self.num_classes, self.splits[name].pieces)

    def to_json(self) -> bytes:
        """The content of manifest.json; equal datasets give equal bytes."""
        content: dict[str, Any] = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "name": self.name,
            "digest": self.digest,
            "classes": list(self.classes),
            "splits": {name: asdict(split) for name, split in self.splits.items()},
            "skipped_list": self.skipped_list and asdict(self.skipped_list),
            "recipe": dict(self.recipe),
            "source_note": self.source_note,
            "created_with": dict(self.created_with),
            "former_digest": self.former_digest,
            **{name: list(getattr(self, name)) for name in ("labels", "masks", "boxes") if getattr(self, name)},
        }
        content["checksum"] = checksum(content)
        return (json.dumps(content, indent=1, ensure_ascii=True) + "\n").encode()


def dataset_digest(classes: Iterable[str], splits: Mapping[str, Split], labels: Sequence[str] = ()) -> str:
    """Hex SHA-256 over the class names in order and, a split, the digests of the shards and rows of its pieces; and over the
    labels, where an image, its pixels or its boxes have several.

    Perceptual hashes are not in it: they follow from the bytes, and may differ by a bit between versions of Pillow.
    """
    content: list[Any] = [list(classes), *([list(labels)] if labels else [])]
    for name, split in sorted(splits.items()):
        content.append([name, [[piece.shards_sha256, piece.rows_sha256] for piece in split.pieces]])
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def write_skipped(folder: Path, entries: Iterable[Skipped]) -> StoredFile | None:
    """The list of skipped images as a file in a local folder; None where there are none."""
    lines = [json.dumps(asdict(e)) + "\n" for e in sorted(entries, key=lambda e: (e.split, e.key))]
    if not lines:
        return None
    path = folder / SKIPPED_NAME
    path.write_text("".join(lines))
    return StoredFile.of(path)


def checksum(content: Mapping[str, Any]) -> str:
    """Over everything in a manifest but itself."""
    plain = {key: value for key, value in content.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def refuse_unfinished(url: str) -> None:
    """UserError where a preparation has not ended: its shards are a part of the dataset and look like a whole one."""
    if objects.exists(objects.join(url, UNFINISHED_NAME)):
        raise UserError(
            f"the preparation at {url} is not finished ({UNFINISHED_NAME} is there): run its 'normfree data prepare' command "
            "again, or its missing parts and --merge"
        )


def _parse(data: bytes, url: str) -> Manifest:
    where = objects.join(url, NAME)
    content = documents.parse_json(data, where, max_bytes=MAX_BYTES, remedy=_REMEDY)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{where} is not a dataset manifest; {_REMEDY}")
    if content.get("format_version") != FORMAT_VERSION:
        remedy = "prepare the dataset again, or use the normfree that wrote it"
        if content.get("format_version") == 2:
            remedy = f"'normfree data index {url}' converts it, without reading its images"
        raise UserError(
            f"{where} has format version {documents.excerpt(content.get('format_version'))}, this normfree reads "
            f"{FORMAT_VERSION}: {remedy}"
        )
    damaged = f"{where} does not verify (edited or damaged): {_REMEDY}"
    if content.get("checksum") != checksum(content):
        raise UserError(damaged)
    manifest = documents.convert({**content, "url": url}, Manifest, where, remedy=_REMEDY)
    for split in manifest.splits.values():
        too_many = any(piece.num_samples * MIN_SAMPLE_BYTES > piece.num_bytes for piece in split.pieces)
        if too_many or sum(piece.num_samples for piece in split.pieces) != split.num_samples:
            raise UserError(damaged)
    several = manifest.labels or manifest.masks or manifest.boxes
    if manifest.digest != dataset_digest(manifest.classes, manifest.splits, several):
        raise UserError(damaged)
    if manifest.labels and label_sets.labels_of(manifest.classes) - set(manifest.labels):
        raise UserError(damaged)
    return manifest
