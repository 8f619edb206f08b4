"""The manifest: what a prepared dataset is, byte by byte. A dataset exists if and only if its manifest.json does.

`manifest.json` names every shard with size and SHA-256; next to it lie two index files a split that say where in which
shard each image lies (`pipeline.data.format.index`). Opening reads the manifest alone; a column of an index is checked against
its digest when it is first used, and shards are read whole by `pipeline.data.verify.verify`.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline import documents, places
from pipeline.data.format.index import COLUMNS, IndexFiles, Keys, Shard, SplitIndex, StoredFile
from pipeline.documents import Count, FileName, Sha256, Text
from pipeline.errors import UserError
from pipeline.storage import content_cache, objects

__all__ = ["IndexFiles", "Keys", "Manifest", "Shard", "Skipped", "Split", "SplitIndex", "StoredFile"]

NAME = "manifest.json"
FORMAT, FORMAT_VERSION = "normfree-dataset", 2
MAX_BYTES = 512 << 20
"""A manifest lists every shard, and every image that was skipped."""
_REMEDY = "restore it, or prepare the dataset again elsewhere"


@dataclass(frozen=True)
class Split:
    """What the manifest says of one split."""

    num_samples: Count
    shards: tuple[Shard, ...]
    index: IndexFiles


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
    """SHA-256 over the classes and, for each split, the digests of shards and index columns: two datasets with one
    digest hold the same bytes under the same labels."""
    splits: Mapping[FileName, Split]
    skipped: tuple[Skipped, ...]
    recipe: Mapping[str, Any]
    """What was asked of `prepare`: decides whether asking again is the same dataset."""
    source_note: Text
    created_with: Mapping[str, Text]

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
            raise UserError(
                f"there is no dataset at {url} (no {NAME}): run 'normfree data prepare CARD --out {url}' (again, if it "
                f"was interrupted), or 'normfree data index {url}' if it holds WebDataset tars"
            ) from None

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def split(self, name: str) -> SplitIndex:
        """The index of a split, mapped from disk (from an object store it is fetched once into the user's cache).

        Raises:
            UserError: no split of that name, or its index files are missing or have another size than recorded.
        """
        if name not in self.splits:
            raise UserError(f"the dataset {self.url} has no split '{name}': choose {' or '.join(self.splits)}")
        split = self.splits[name]
        path, keys_path = (_local(self.url, file) for file in (split.index.columns, split.index.keys))
        return SplitIndex(
            name, split.shards, self.num_classes, split.num_samples, path, keys_path, split.index.column_sha256
        )

    def to_json(self) -> bytes:
        """The content of manifest.json; equal datasets give equal bytes."""
        content: dict[str, Any] = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "name": self.name,
            "digest": self.digest,
            "classes": list(self.classes),
            "splits": {name: asdict(split) for name, split in self.splits.items()},
            "skipped": [asdict(entry) for entry in self.skipped],
            "recipe": dict(self.recipe),
            "source_note": self.source_note,
            "created_with": dict(self.created_with),
        }
        content["checksum"] = _checksum(content)
        return (json.dumps(content, indent=1, ensure_ascii=True) + "\n").encode()


def dataset_digest(classes: Iterable[str], splits: Mapping[str, Split]) -> str:
    """Hex SHA-256 over the class names in order and, a split, the digests of its shards in order and index columns."""
    content: list[Any] = [list(classes)]
    for name, split in sorted(splits.items()):
        # The perceptual hashes follow from the bytes, and may differ by a bit between versions of Pillow.
        columns = {key: digest for key, digest in sorted(split.index.column_sha256.items()) if key != "phash"}
        content.append([name, [shard.sha256 for shard in split.shards], columns])
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _local(url: str, file: StoredFile) -> Path:
    """A local copy of an index file; for a local dataset the file itself."""
    where = objects.join(url, file.name)
    found = None
    with contextlib.suppress(FileNotFoundError):
        found = objects.size_bytes(where)
    if found is None:
        raise UserError(f"the index {where} is missing: restore it, or prepare the dataset again elsewhere")
    if found == file.size_bytes:
        try:
            return content_cache.fetch(
                where,
                sha256=file.sha256,
                size_bytes=file.size_bytes,
                cache_dir=str(places.cache_folder() / "indices"),
            )
        except OSError as error:
            if error.errno is not None:  # the cache's disk, or the store: not the content
                raise
    raise UserError(f"the index {where} does not verify: restore it, or prepare the dataset again elsewhere")


def _checksum(content: Mapping[str, Any]) -> str:
    plain = {key: value for key, value in content.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _parse(data: bytes, url: str) -> Manifest:
    where = objects.join(url, NAME)
    content = documents.parse_json(data, where, max_bytes=MAX_BYTES, remedy=_REMEDY)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{where} is not a dataset manifest; {_REMEDY}")
    if content.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{where} has format version {documents.excerpt(content.get('format_version'))}, this normfree reads "
            f"{FORMAT_VERSION}: prepare the dataset again, or use the normfree that wrote it"
        )
    damaged = f"{where} does not verify (edited or damaged): {_REMEDY}"
    if content.get("checksum") != _checksum(content):
        raise UserError(damaged)
    manifest = documents.convert({**content, "url": url}, Manifest, where, remedy=_REMEDY)
    for split in manifest.splits.values():
        held = sum(shard.num_samples for shard in split.shards)
        if set(split.index.column_sha256) != set(COLUMNS) or held != split.num_samples:
            raise UserError(damaged)
    if manifest.digest != dataset_digest(manifest.classes, manifest.splits):
        raise UserError(damaged)
    return manifest
