"""The journal of a preparation: one small object a finished shard, in the output itself.

A record is written after its shard is there for good (on a disk: synced), whole or not at all, so that whoever is killed
at any moment, and whichever machine goes on, no finished shard is written again. All of it goes when the manifest is
there.
"""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline import documents
from pipeline.data.format.manifest import Skipped
from pipeline.data.format.pieces import Shard
from pipeline.documents import Count
from pipeline.errors import UserError
from pipeline.storage import objects

FOLDER = "PREPARING"
_MAX_BYTES = 1 << 30


@dataclass(frozen=True)
class Record:
    """A finished shard: what is in it, and what was skipped of it."""

    plan: str
    """Digest of what decides the content; another one means that the record is of another preparation."""
    split: str
    shard: Shard
    """`num_samples` may be 0: then there is no such object."""
    keys: tuple[str, ...]
    offset: np.ndarray
    size: np.ndarray
    label: np.ndarray
    phash: np.ndarray
    crc32: np.ndarray
    skipped: tuple[Skipped, ...]
    label_texts: tuple[str, ...] = ()
    """Of an adopted tar, whose class numbers are known only when all tars are: the labels as they stand there."""

    @property
    def num_planned(self) -> int:
        return len(self.keys) + len(self.skipped)

    def to_json(self) -> bytes:
        content = {
            "plan": self.plan,
            "split": self.split,
            "shard": vars(self.shard),
            "keys": list(self.keys),
            **{name: getattr(self, name).tolist() for name in _ARRAYS},
            "skipped": [vars(entry) for entry in self.skipped],
            "label_texts": list(self.label_texts),
        }
        return json.dumps(content, separators=(",", ":")).encode()


_ARRAYS: dict[str, type] = {
    "offset": np.int64,
    "size": np.int32,
    "label": np.int32,
    "phash": np.uint64,
    "crc32": np.uint32,
}


def write_record(out: str, record: Record) -> None:
    objects.write_bytes(url_of(out, record.shard.name), record.to_json())


def read_record(out: str, name: str, plan: str) -> Record | None:
    """The record of a shard, if there is one of this preparation (`Record.plan`) and the shard is there."""
    record = _read(url_of(out, name))
    if record is None or (record.plan, record.shard.name) != (plan, name) or not _has_shard(out, record.shard):
        return None
    return record


def parts_folder(out: str) -> str:
    """Where the parts of a job array record that they are done."""
    return objects.join(out, FOLDER, "parts")


def remove_records(out: str) -> None:
    """Take the whole journal away."""
    objects.remove_tree(objects.join(out, FOLDER))


def _has_shard(out: str, shard: Shard) -> bool:
    if not shard.num_samples:
        return True
    try:
        return objects.size_bytes(objects.join(out, shard.name)) == shard.size_bytes
    except FileNotFoundError:
        return False


@dataclass(frozen=True)
class _Content:
    """A record as it lies in the output, which others may write to."""

    plan: str
    split: str
    shard: Shard
    keys: tuple[str, ...]
    offset: list[Count]
    size: list[Count]
    label: list[int]  # -1 in records of adopted tars
    phash: list[int]
    crc32: list[Count]
    skipped: tuple[Skipped, ...]
    label_texts: tuple[str, ...]


def _read(url: str) -> Record | None:
    """None where there is none, or one that is damaged or of another version: its shard is written again."""
    try:
        content = documents.read(url, _Content, max_bytes=_MAX_BYTES)
        arrays: dict[str, Any] = {name: np.array(getattr(content, name), dtype=kind) for name, kind in _ARRAYS.items()}
    except (UserError, OverflowError, FileNotFoundError, NotADirectoryError):
        return None
    if {len(content.keys), *map(len, arrays.values())} != {content.shard.num_samples}:
        return None
    others = {name: getattr(content, name) for name in ("plan", "split", "shard", "keys", "skipped", "label_texts")}
    return Record(**others, **arrays)


def url_of(out: str, shard: str) -> str:
    """Where the record of a shard lies."""
    return objects.join(out, FOLDER, shard.replace("/", "%2F") + ".json")
