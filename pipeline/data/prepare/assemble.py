"""Records of finished shards -> index files and the manifest's content."""

import contextlib
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.format.index import index_problem, write_index
from pipeline.data.format.manifest import Manifest, Split, dataset_digest
from pipeline.data.prepare.journal import Record


def assemble(
    name: str,
    url: str,
    classes: tuple[str, ...],
    records: Sequence[Record],
    recipe: Mapping[str, Any],
    note: str,
    folder: Path,
) -> Manifest:
    """The manifest of a dataset at `url`, in the order of the records; its index files are written into `folder`.

    Raises:
        RuntimeError: the records contradict each other, which would be a fault of ours.
    """
    splits: dict[str, Split] = {}
    for split in sorted({record.split for record in records}):
        kept = [record for record in records if record.split == split and record.shard.num_samples]
        if kept:
            splits[split] = _split(split, kept, len(classes), folder)
    skipped = sorted(
        (entry for record in records for entry in record.skipped), key=lambda entry: (entry.split, entry.key)
    )
    versions = {"python": platform.python_version()}
    for package in ("normfree", "webdataset", "pillow", "pyarrow"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    digest = dataset_digest(classes, splits)
    return Manifest(url, name, classes, digest, splits, tuple(skipped), dict(recipe), note, versions)


def _split(split: str, records: Sequence[Record], num_classes: int, folder: Path) -> Split:
    import pyarrow as pa

    shards = tuple(record.shard for record in records)
    counts = [shard.num_samples for shard in shards]
    names = ("offset", "size", "label", "phash", "crc32")
    columns = {name: np.concatenate([getattr(r, name) for r in records]) for name in names}
    columns["shard"] = np.repeat(np.arange(len(records), dtype=np.int32), counts)
    places = {name: columns[name] for name in ("shard", "offset", "size", "label")}
    problem = index_problem(shards, num_classes, **places)
    if problem:
        raise RuntimeError(f"the records of {split} contradict each other: {problem}")
    keys = pa.chunked_array([pa.array(record.keys, pa.string()) for record in records])
    return Split(sum(counts), shards, write_index(folder, split, columns, keys))
