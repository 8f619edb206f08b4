"""The manifest: what a prepared dataset is, byte by byte. A dataset exists if and only if its manifest.json does.

`manifest.json` names every shard with size and SHA-256; beside it lies one index a split (parquet) that says where in
which shard each image lies. All of it is checked against its digest when it is opened, except the shards: `verify`
reads those.
"""

import contextlib
import hashlib
import json
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import storage
from pipeline.data.index import Shard, SplitIndex, index_problem, read_columns
from pipeline.errors import UserError

__all__ = ["Manifest", "Shard", "Skipped", "Split", "SplitIndex", "Verification", "verify"]

NAME = "manifest.json"
FORMAT, FORMAT_VERSION = "normfree-dataset", 1


@dataclass(frozen=True)
class IndexFile:
    name: str
    sha256: str


@dataclass(frozen=True)
class Split:
    """What the manifest says of one split."""

    num_samples: int
    shards: tuple[Shard, ...]
    index: IndexFile


@dataclass(frozen=True)
class Skipped:
    """A raw image that is in no shard, and why."""

    split: str
    key: str
    reason: str


@dataclass(frozen=True)
class Manifest:
    url: str
    name: str
    classes: tuple[str, ...]
    digest: str
    """SHA-256 over the classes and the digests of all shards: two datasets with one digest hold the same bytes."""
    splits: Mapping[str, Split]
    skipped: tuple[Skipped, ...]
    recipe: Mapping[str, Any]
    """What was asked of `prepare`: decides whether asking again is the same dataset."""
    source_note: str
    created_with: Mapping[str, str]
    _indices: Mapping[str, bytes] = field(repr=False, compare=False, default_factory=dict)

    @staticmethod
    def open(url: str) -> "Manifest":
        """Read manifest and indices, and check them against their digests.

        Raises:
            UserError: there is no dataset at `url`, or what is there does not verify.
        """
        url = str(url)
        try:
            manifest = _parse(storage.read_bytes(storage.join(url, NAME)), url)
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"there is no dataset at {url} (no {NAME}): run 'normfree data prepare CARD --out {url}', "
                "or again if it was interrupted"
            ) from None
        return replace(manifest, _indices={name: _read_index(url, split) for name, split in manifest.splits.items()})

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def split(self, name: str) -> SplitIndex:
        """The index of a split; UserError if there is none of that name."""
        if name not in self.splits:
            raise UserError(f"the dataset {self.url} has no split '{name}': choose {' or '.join(self.splits)}")
        data, shards = self._indices[name], self.splits[name].shards
        columns = read_columns(data, ["shard", "offset", "size", "label"])
        arrays = {key: column.to_numpy() for key, column in columns.items()}
        index = SplitIndex(name=name, shards=shards, num_classes=self.num_classes, _parquet=data, **arrays)
        problem = index_problem(index)
        if problem:
            raise UserError(f"the index of {name} in {self.url} contradicts its manifest ({problem}): prepare it again")
        return index

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


def dataset_digest(classes: tuple[str, ...], splits: Mapping[str, Split]) -> str:
    """Hex SHA-256 over the class names in order and the shard digests of each split in order."""
    content = [
        list(classes),
        {name: [shard.sha256 for shard in split.shards] for name, split in sorted(splits.items())},
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@dataclass(frozen=True)
class Verification:
    """What `verify` found."""

    num_shards: int
    num_samples: int
    num_bytes: int
    """Read and hashed."""
    problems: tuple[str, ...]
    """One sentence for each shard or sample that is not as the manifest says; empty if all is well."""


def verify(url: str) -> Verification:
    """Read every byte of every shard and hold it against the manifest: digest, members, offsets, labels, counts.

    Raises UserError where manifest or index do not verify; what is wrong with shards is in the answer, all of it.
    """
    manifest = Manifest.open(url)
    problems: list[str] = []
    num_shards = num_samples = num_bytes = 0
    for name in manifest.splits:
        index = manifest.split(name)
        if len(np.unique(index.keys)) != index.num_samples:
            problems.append(f"{name}: a key occurs twice")
        for number, shard in enumerate(index.shards):
            num_shards, num_samples, num_bytes = (
                num_shards + 1,
                num_samples + shard.num_samples,
                num_bytes + shard.size_bytes,
            )
            problem = _shard_problem(storage.join(manifest.url, shard.name), index, number)
            problems += [f"{shard.name}: {problem}"] if problem else []
    return Verification(num_shards, num_samples, num_bytes, tuple(problems))


def _shard_problem(url: str, index: SplitIndex, number: int) -> str | None:
    """The first thing wrong with a shard, or None."""
    shard = index.shards[number]
    if not storage.exists(url):
        return "missing"
    with contextlib.ExitStack() as stack:
        path = storage.local_path(url) if storage.is_local(url) else None
        if path is None:
            path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="normfree-verify-"))) / "shard"
            storage.download(url, path)
        if path.stat().st_size != shard.size_bytes:
            return f"{path.stat().st_size} bytes where {shard.size_bytes} should be"
        if storage.sha256_file(path) != shard.sha256:
            return "its bytes have changed (SHA-256 differs)"
        rows = np.flatnonzero(index.shard == number)
        stored: dict[str, dict[str, tuple[int, int]]] = {}
        with tarfile.open(path) as tar, path.open("rb") as file:
            for member in tar:
                key, _, extension = member.name.partition(".")
                stored.setdefault(key, {})[extension] = (member.offset_data, member.size)
            if len(stored) != len(rows):
                return f"{len(stored)} samples where the index has {len(rows)}"
            for row in rows:
                places = dict(stored.get(str(index.keys[row]), {}))
                label_offset, label_size = places.pop("cls", (0, 0))
                file.seek(label_offset)
                if file.read(label_size) != str(index.label[row]).encode():
                    return f"sample {index.keys[row]} has another label than its index"
                if list(places.values()) != [(index.offset[row], index.size[row])]:
                    return f"sample {index.keys[row]} lies elsewhere than its index says"
    return None


def _read_index(url: str, split: Split) -> bytes:
    where = storage.join(url, split.index.name)
    try:
        data = storage.read_bytes(where)
    except FileNotFoundError:
        raise UserError(f"the index {where} is missing: restore it, or prepare the dataset again elsewhere") from None
    if hashlib.sha256(data).hexdigest() != split.index.sha256:
        raise UserError(f"the index {where} does not verify: restore it, or prepare the dataset again elsewhere")
    return data


def _checksum(content: Mapping[str, Any]) -> str:
    plain = {key: value for key, value in content.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _parse(data: bytes, url: str) -> Manifest:
    where = storage.join(url, NAME)
    try:
        content = json.loads(data)
        known = content["format"] == FORMAT
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise UserError(
            f"{where} is not a dataset manifest, or it is damaged: restore it or prepare the dataset again elsewhere"
        )
    if content.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{where} has format version {content.get('format_version')}, this normfree reads {FORMAT_VERSION}: "
            "prepare the dataset again, or use the normfree that wrote it"
        )
    damaged = f"{where} does not verify (edited or damaged): restore it, or prepare the dataset again elsewhere"
    if content.get("checksum") != _checksum(content):
        raise UserError(damaged)
    try:
        splits = {
            name: Split(
                num_samples=split["num_samples"],
                shards=tuple(Shard(**shard) for shard in split["shards"]),
                index=IndexFile(**split["index"]),
            )
            for name, split in content["splits"].items()
        }
        manifest = Manifest(
            url=url,
            name=content["name"],
            classes=tuple(content["classes"]),
            digest=content["digest"],
            splits=splits,
            skipped=tuple(Skipped(**entry) for entry in content["skipped"]),
            recipe=content["recipe"],
            source_note=content["source_note"],
            created_with=content["created_with"],
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(damaged) from error
    if manifest.digest != dataset_digest(manifest.classes, splits):
        raise UserError(damaged)
    return manifest
