"""The pieces of an index: what lies in each, how they are written, and how a part of one is had and proven.

    <split>-00000.index.json     the shards, and the SHA-256 of the rows of each; itself in the manifest with its own
    <split>-00000.rows.npy       `ROW`, 20 bytes a sample in the order of the shards: what training reads, shard by shard
    <split>-00000.keys.parquet   keys and hashes, compressed, in groups of rows: what reports and `overlap` read

NumPy and any reader of parquet open the last two.
"""

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import documents, places
from pipeline.data.format import keys
from pipeline.documents import Count, FileName, RelativePath, Sha256
from pipeline.errors import UserError
from pipeline.storage import content_cache, objects
from pipeline.storage.block_cache import BlockCache

ROW = np.dtype([("offset", "<i8"), ("size", "<i4"), ("label", "<i4"), ("crc32", "<u4")])
"""Byte at which the image starts in its tar, its bytes, number of its class, checksum of its bytes."""
PIECE_SHARDS = 256
MIN_SAMPLE_BYTES = 1024
"""A header and a block of content: no tar holds a sample in less."""
CACHE_BYTES = 16 << 30
"""Of indices from object stores, on the disk of a host."""
_REMEDY = "restore it, or prepare the dataset again elsewhere"
_MAX_TABLE_BYTES = 16 << 20
_MAX_HEADER_BYTES = 4096  # of NumPy's format


@dataclass(frozen=True)
class Shard:
    name: RelativePath
    size_bytes: Count
    sha256: Sha256
    num_samples: Count


@dataclass(frozen=True)
class StoredFile:
    """An object next to the manifest, with its size in bytes and the hex SHA-256 of its content."""

    name: FileName
    size_bytes: Count
    sha256: Sha256

    @staticmethod
    def of(path: Path) -> "StoredFile":
        """What a local file will be there."""
        return StoredFile(path.name, path.stat().st_size, objects.sha256_file(path))


@dataclass(frozen=True)
class Summary:
    """What tables of the same shards and rows have in common, whatever their keys' file looks like."""

    num_shards: Count
    num_samples: Count
    num_bytes: Count
    """Of the shards."""
    shards_sha256: Sha256
    rows_sha256: Sha256
    """Over the digests of the shards, and of the rows of each, in order."""


@dataclass(frozen=True)
class Piece(Summary):
    """What the manifest says of some neighbouring shards."""

    table: StoredFile
    """Its content is a `PieceTable`."""


@dataclass(frozen=True)
class PieceTable:
    shards: tuple[Shard, ...]
    row_digests: tuple[Sha256, ...]
    """Of the rows of each shard."""
    rows: StoredFile
    keys: StoredFile

    def summary(self) -> Summary:
        return Summary(
            len(self.shards),
            sum(shard.num_samples for shard in self.shards),
            sum(shard.size_bytes for shard in self.shards),
            _digest([shard.sha256 for shard in self.shards]),
            _digest(self.row_digests),
        )


@dataclass(frozen=True)
class PieceFiles:
    """The objects of pieces, in a folder or a store. What is had from there is proven; UserError where it does not verify."""

    url: str

    def table(self, piece: Piece) -> PieceTable:
        name = piece.table.name
        data = self.fetch(name, 0, piece.table.size_bytes, piece.table.sha256)
        where = objects.join(self.url, name)
        content = documents.parse_json(data, where, max_bytes=_MAX_TABLE_BYTES, remedy=_REMEDY)
        table = documents.convert(content, PieceTable, where, remedy=_REMEDY)
        header = table.rows.size_bytes - piece.num_samples * ROW.itemsize
        if not 0 < header <= _MAX_HEADER_BYTES or any(
            getattr(piece, k) != v for k, v in asdict(table.summary()).items()
        ):
            raise self.damaged(name)
        if any(shard.num_samples * MIN_SAMPLE_BYTES > shard.size_bytes for shard in table.shards):
            raise self.damaged(name, "a shard too small for its samples")
        return table

    def check_rows_size(self, table: PieceTable) -> None:
        """Before memory is taken for as many rows as the table speaks of."""
        try:
            if objects.size_bytes(objects.join(self.url, table.rows.name)) != table.rows.size_bytes:
                raise self.damaged(table.rows.name)
        except (FileNotFoundError, NotADirectoryError):
            raise self._missing(table.rows.name) from None

    def shard_rows(self, piece: Piece, table: PieceTable, place: int, before: int, num_classes: int) -> np.ndarray:
        """Rows of the shard at `place` of a piece, `before` samples from its start; (num_samples,) `ROW`, read-only."""
        start = table.rows.size_bytes - (piece.num_samples - before) * ROW.itemsize
        length = table.shards[place].num_samples * ROW.itemsize
        data = self.fetch(table.rows.name, start, length, table.row_digests[place])
        return self._consistent(data, table, place, num_classes)

    def all_rows(self, piece: Piece, table: PieceTable, num_classes: int) -> np.ndarray:
        """Rows of all shards of a piece in one request, (num_samples,) `ROW`, read-only; not kept on the host's disk."""
        length = piece.num_samples * ROW.itemsize
        data = self._read(table.rows.name, table.rows.size_bytes - length, length)
        begin = 0
        for place, shard in enumerate(table.shards):
            part = data[begin : begin + shard.num_samples * ROW.itemsize]
            begin += len(part)
            if hashlib.sha256(part).hexdigest() != table.row_digests[place]:
                raise self.damaged(table.rows.name)
            self._consistent(part, table, place, num_classes)
        return np.frombuffer(data, ROW)

    def keys_file(self, table: PieceTable) -> Path:
        """A local copy, proven; for a local dataset the file itself, whose pages have checksums."""
        file, where = table.keys, objects.join(self.url, table.keys.name)
        try:
            if objects.size_bytes(where) != file.size_bytes:
                raise self.damaged(file.name)
            return content_cache.fetch(
                where, sha256=file.sha256, size_bytes=file.size_bytes, cache_dir=str(places.cache_folder() / "indices")
            )
        except FileNotFoundError:
            raise self._missing(file.name) from None
        except OSError as error:
            if error.errno is not None:  # the cache's disk, or the store: not the content
                raise
            raise self.damaged(file.name) from error

    def fetch(self, name: str, start: int, length: int, sha256: str) -> bytes:
        """Bytes that have this digest; from a store once a host."""
        if objects.is_local(self.url):
            data = self._read(name, start, length)
        else:
            with _cache().block(sha256, start, length, lambda: self._read(name, start, length)) as read:
                data = read(start, start + length)
            if hashlib.sha256(data).hexdigest() != sha256:  # the entry, or what it was made of?
                _cache().forget(sha256, start, length)
                data = self._read(name, start, length)
        if hashlib.sha256(data).hexdigest() != sha256:
            raise self.damaged(name)
        return data

    def _consistent(self, data: bytes, table: PieceTable, place: int, num_classes: int) -> np.ndarray:
        rows = np.frombuffer(data, ROW)
        ends = rows["offset"] + rows["size"].astype(np.int64)
        if len(rows) and ((rows["offset"] < 0) | (rows["size"] < 0) | (ends > table.shards[place].size_bytes)).any():
            raise self.damaged(table.rows.name, "images outside their shard")
        if len(rows) and not 0 <= int(rows["label"].min()) <= int(rows["label"].max()) < num_classes:
            raise self.damaged(table.rows.name, "labels outside the classes")
        return rows

    def _read(self, name: str, start: int, length: int) -> bytes:
        try:
            return objects.read_range(objects.join(self.url, name), start, length)
        except (FileNotFoundError, NotADirectoryError):
            raise self._missing(name) from None
        except OSError as error:
            if error.errno is not None:
                raise
            raise self.damaged(name) from error  # it is shorter

    def _missing(self, name: str) -> UserError:
        return UserError(f"the index {objects.join(self.url, name)} is missing: {_REMEDY}")

    def damaged(self, name: str, why: str = "") -> UserError:
        why = f" ({why})" if why else ""
        return UserError(f"the index {objects.join(self.url, name)} does not verify{why}: {_REMEDY}")


@functools.cache
def _cache() -> BlockCache:
    return BlockCache(str(places.cache_folder() / "indices"), CACHE_BYTES)


def write_piece(
    folder: Path, split: str, number: int, shards: Sequence[Shard], rows: np.ndarray, texts: Any, hashes: np.ndarray
) -> tuple[Piece, tuple[str, ...]]:
    """Write the objects of a piece into a local folder; what the manifest says of it, and their names.

    Args:
        rows: (num_samples,) `ROW`, in the order of the shards.
        texts: the keys, list of str or pyarrow array of strings; `hashes`: (num_samples,) uint64.
    """
    stem = f"{split}-{number:05d}"
    rows = np.ascontiguousarray(rows, ROW)
    np.save(folder / f"{stem}.rows.npy", rows, allow_pickle=False)
    keys.write(folder / f"{stem}.keys.parquet", texts, hashes)
    ends = np.cumsum([shard.num_samples for shard in shards], dtype=np.int64)
    parts = np.split(rows, ends[:-1])
    digests = tuple(hashlib.sha256(part.tobytes()).hexdigest() for part in parts)
    files = [StoredFile.of(folder / f"{stem}.{ending}") for ending in ("rows.npy", "keys.parquet")]
    table = PieceTable(tuple(shards), digests, *files)
    path = folder / f"{stem}.index.json"
    path.write_text(json.dumps(asdict(table), separators=(",", ":")) + "\n")
    piece = Piece(**asdict(table.summary()), table=StoredFile.of(path))
    return piece, (*(file.name for file in files), path.name)


def _digest(parts: Sequence[str]) -> str:
    return hashlib.sha256("".join(parts).encode()).hexdigest()
