"""A dataset of format 2 -> this format: its index in pieces and a new manifest. Its images are not read or touched.

Format 2 had two files a split, `<split>.index.arrow` and `<split>.keys.parquet`, and named all shards in the manifest.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import documents
from pipeline.data.format import manifest as manifests
from pipeline.data.format.manifest import Manifest, Skipped, Split, dataset_digest, write_skipped
from pipeline.data.format.pieces import PIECE_SHARDS, ROW, Piece, Shard, StoredFile, write_piece
from pipeline.data.prepare.output_folder import explain_full_disk, only_writer, publish, publish_manifest, staging
from pipeline.documents import Count, Sha256, Text
from pipeline.errors import UserError
from pipeline.storage import objects

_REMEDY = "restore it, or prepare the dataset again elsewhere"


@dataclass(frozen=True)
class _Files:
    columns: StoredFile
    keys: StoredFile


@dataclass(frozen=True)
class _Split:
    num_samples: Count
    shards: tuple[Shard, ...]
    index: _Files


@dataclass(frozen=True)
class _Manifest:
    name: Text
    classes: tuple[Text, ...]
    digest: Sha256
    splits: Mapping[str, _Split]
    skipped: tuple[Skipped, ...]
    recipe: Mapping[str, Any]
    source_note: Text
    created_with: Mapping[str, Text]


def convert(url: str) -> Manifest | None:
    """The dataset at `url` in this format; None where there is no dataset of format 2. Killed, it is what it was before.

    Raises:
        UserError: it does not verify.
    """
    where = objects.join(url, manifests.NAME)
    try:
        content = documents.read_json(where, max_bytes=manifests.MAX_BYTES, remedy=_REMEDY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not isinstance(content, dict) or (content.get("format"), content.get("format_version")) != (manifests.FORMAT, 2):
        return None
    if content.get("checksum") != manifests.checksum(content):
        raise UserError(f"{where} does not verify (edited or damaged): {_REMEDY}")
    old = documents.convert(content, _Manifest, where, remedy=_REMEDY)
    with explain_full_disk(url), only_writer(url, None, replaces=True), staging(url) as folders:
        folders.work.mkdir(parents=True, exist_ok=True)
        splits = {}
        for name, split in old.splits.items():
            splits[name] = Split(split.num_samples, _pieces(url, name, split, folders.work))
        made = Manifest(
            url,
            old.name,
            old.classes,
            dataset_digest(old.classes, splits),
            splits,
            write_skipped(folders.work, old.skipped),
            old.recipe,
            old.source_note,
            old.created_with,
            former_digest=old.digest,
        )
        publish_manifest(made, folders.work)
        for split in old.splits.values():
            for file in (split.index.columns, split.index.keys):
                objects.remove(objects.join(url, file.name))
    return Manifest.open(url)


def _pieces(url: str, name: str, split: _Split, work: Path) -> tuple[Piece, ...]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    local = [_fetched(url, file, work) for file in (split.index.columns, split.index.keys)]
    try:
        columns = pa.ipc.open_file(pa.memory_map(str(local[0]))).read_all()
        arrays = {column: columns.column(column).to_numpy() for column in (*(ROW.names or ()), "phash")}
        keys = pq.read_table(local[1], columns=["key"]).column("key")
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise UserError(f"the index of {name} in {url} does not verify: {_REMEDY}") from error
    counts = [shard.num_samples for shard in split.shards]
    if {len(keys), sum(counts), *map(len, arrays.values())} != {split.num_samples}:
        raise UserError(f"the index of {name} in {url} has other numbers of samples than its manifest: {_REMEDY}")
    ends, pieces = np.cumsum([0, *counts]), []
    for begin in range(0, len(counts), PIECE_SHARDS):
        shards = split.shards[begin : begin + PIECE_SHARDS]
        part = slice(int(ends[begin]), int(ends[begin + len(shards)]))
        rows = np.empty(part.stop - part.start, ROW)
        for column in ROW.names or ():
            rows[column] = arrays[column][part]
        texts = keys.slice(part.start, len(rows))
        piece, names = write_piece(work, name, begin // PIECE_SHARDS, shards, rows, texts, arrays["phash"][part])
        for made in names:
            publish(work / made, objects.join(url, made))
        pieces.append(piece)
    return tuple(pieces)


def _fetched(url: str, file: StoredFile, work: Path) -> Path:
    """A local file with the content that the manifest states."""
    where = objects.join(url, file.name)
    path = objects.local_path(where) if objects.is_local(url) else work / file.name
    try:
        if not objects.is_local(url):
            objects.download(where, path)
        if path.stat().st_size == file.size_bytes and objects.sha256_file(path) == file.sha256:
            return path
    except FileNotFoundError:
        raise UserError(f"the index {where} is missing: {_REMEDY}") from None
    raise UserError(f"the index {where} does not verify: {_REMEDY}")
