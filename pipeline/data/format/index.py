"""The index of a split: where in which shard each image lies, its class, perceptual hash, checksum and key.

Two files a split. `<split>.index.arrow` (Arrow IPC, uncompressed, one batch) holds the columns of fixed width and is
mapped into memory: opening it costs nothing, all processes of a machine share its pages, and a column is held against
its digest when it is first used. `<split>.keys.parquet` holds the keys, compressed, in groups of rows that are read
when a key is asked for. Any Arrow reader opens both. 32 bytes a sample and the compressed key.
"""

import functools
import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.documents import Count, FileName, RelativePath, Sha256, excerpt
from pipeline.errors import UserError
from pipeline.storage import objects

COLUMNS = {
    "shard": "int32",
    "offset": "int64",
    "size": "int32",
    "label": "int32",
    "phash": "uint64",
    "crc32": "uint32",
}
_GROUP_ROWS = 8192
_GROUPS_HELD = 64
_MAX_GROUP_BYTES = 64 << 20  # of keys, uncompressed


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


@dataclass(frozen=True)
class IndexFiles:
    """The two files of a split's index, and the digest of each column's bytes."""

    columns: StoredFile
    column_sha256: Mapping[str, Sha256]
    keys: StoredFile


class Keys:
    """WebDataset keys of a split, read group by group: `keys[7]`, `keys[array]`, `len`, iteration, `np.asarray`."""

    def __init__(self, path: Path, num: int) -> None:
        self._path, self._num = path, num
        self._file: Any = None
        self._groups: OrderedDict[int, Any] = OrderedDict()

    def __len__(self) -> int:
        return self._num

    def __getstate__(self) -> tuple[Path, int]:
        return self._path, self._num

    def __setstate__(self, state: tuple[Path, int]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, (int, np.integer)):
            number = range(self._num)[int(place)]
            return self._group(number // _GROUP_ROWS)[number % _GROUP_ROWS].as_py()
        places = np.arange(self._num)[place]
        found = np.empty(len(places), dtype=object)
        for number in np.argsort(places, kind="stable").tolist():  # each group is read once, whatever the order
            found[number] = self[int(places[number])]
        return found

    def __iter__(self) -> Iterator[str]:
        for group in range(-(-self._num // _GROUP_ROWS)):
            yield from self._group(group).to_pylist()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(list(self), dtype=dtype or object)

    def _group(self, group: int) -> Any:
        if group in self._groups:
            self._groups.move_to_end(group)
            return self._groups[group]
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            if self._file is None:
                # As a dictionary where the file has one: one long key that stands 8,192 times is held once.
                self._file = pq.ParquetFile(
                    self._path, memory_map=True, page_checksum_verification=True, read_dictionary=["key"]
                )
            about = self._file.metadata.row_group(group)
            expected = min(_GROUP_ROWS, self._num - group * _GROUP_ROWS)
            if self._file.metadata.num_rows != self._num or about.num_rows != expected:
                raise ValueError("another number of keys than the manifest says")
            if about.total_byte_size > _MAX_GROUP_BYTES or self._file.schema_arrow.field("key").type != pa.dictionary(
                pa.int32(), pa.string()
            ):
                raise ValueError("no column of keys, or a huge one")
            rows = self._file.read_row_group(group, columns=["key"], use_threads=False).column("key")
            rows = rows.combine_chunks()
        except (pa.ArrowException, OSError, ValueError, KeyError, IndexError) as error:
            raise UserError(
                f"the keys {self._path} do not verify ({_line(error)}): restore them or prepare again"
            ) from error
        self._groups[group] = rows
        if len(self._groups) > _GROUPS_HELD:
            self._groups.popitem(last=False)
        return rows


class SplitIndex:
    """Where each sample of a split lies. Arrays of one length, in the order of the shards; read-only, mapped from disk.

    Cheap to send to a worker: only the places of the files travel. A column is checked against its digest when it is
    first used (UserError if it does not verify), once for an index and the copies that are sent on afterwards.
    """

    def __init__(
        self,
        name: str,
        shards: tuple[Shard, ...],
        num_classes: int,
        num_samples: int,
        path: Path,
        keys_path: Path,
        column_sha256: Mapping[str, str],
    ) -> None:
        self.name, self.shards, self.num_classes, self.num_samples = name, shards, num_classes, num_samples
        self.keys = Keys(keys_path, num_samples)
        self._path, self._column_sha256 = path, dict(column_sha256)
        self._checked: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in COLUMNS and key != "_batch"}

    @functools.cached_property
    def shard(self) -> np.ndarray:
        """int32, number of the shard in `shards`; never falls."""
        return self._column("shard")

    @functools.cached_property
    def offset(self) -> np.ndarray:
        """int64, byte at which the image starts in its tar."""
        return self._column("offset")

    @functools.cached_property
    def size(self) -> np.ndarray:
        """int32, bytes of the image."""
        return self._column("size")

    @functools.cached_property
    def label(self) -> np.ndarray:
        """int32, number of the class in the manifest's `classes`."""
        return self._column("label")

    @functools.cached_property
    def phash(self) -> np.ndarray:
        """uint64, perceptual hash of the pixels (`pipeline.data.images.perceptual_hash`)."""
        return self._column("phash")

    @functools.cached_property
    def crc32(self) -> np.ndarray:
        """uint32, of the image's bytes: what a reader of a part of a shard holds them against."""
        return self._column("crc32")

    def class_counts(self) -> np.ndarray:
        """Samples of each class, (num_classes,) int64."""
        return np.bincount(self.label, minlength=self.num_classes)

    @functools.cached_property
    def _batch(self) -> Any:
        import pyarrow as pa

        try:
            reader = pa.ipc.open_file(pa.memory_map(str(self._path)))
            fields = {field.name: str(field.type) for field in reader.schema}
            if fields != COLUMNS or reader.num_record_batches != 1:
                raise ValueError("its columns are others")
            batch = reader.get_batch(0)
            batch.validate()
            if batch.num_rows != self.num_samples:
                raise ValueError("another number of samples than its manifest says")
            return batch
        except (pa.ArrowException, OSError, ValueError) as error:
            raise UserError(
                f"the index {self._path} does not verify ({_line(error)}): restore it or prepare again"
            ) from error

    def _column(self, name: str) -> np.ndarray:
        try:
            values: np.ndarray = self._batch.column(name).to_numpy(zero_copy_only=True)
        except ValueError as error:  # pyarrow's own errors among them: a column with gaps
            raise UserError(
                f"the index {self._path} does not verify ({_line(error)}): restore it or prepare again"
            ) from error
        if name in self._checked:
            return values
        ends = {"shard": len(self.shards), "label": self.num_classes, "offset": 1 << 62, "size": 1 << 31}
        problem = None
        if hashlib.sha256(values.data).hexdigest() != self._column_sha256[name]:
            problem = f"its column {name} has changed"
        elif name in ends and len(values) and not 0 <= int(values.min()) <= int(values.max()) < ends[name]:
            problem = f"its column {name} has values outside 0 to {ends[name] - 1}"
        if problem:
            raise UserError(
                f"the index {self._path} does not verify ({problem}): restore it, or prepare the dataset again elsewhere"
            )
        self._checked.add(name)
        return values


def _line(error: BaseException) -> str:
    return excerpt(" ".join(str(error).split()), 200)


def write_index(folder: Path, split: str, arrays: Mapping[str, np.ndarray], keys: Any) -> IndexFiles:
    """Write the two files of a split's index into a local folder.

    Args:
        arrays: one of each name and type in `COLUMNS`, of one length.
        keys: list of str or pyarrow array of strings.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {name: np.ascontiguousarray(arrays[name], dtype=kind) for name, kind in COLUMNS.items()}
    digests = {name: hashlib.sha256(values.data).hexdigest() for name, values in columns.items()}
    batch = pa.record_batch({name: pa.array(values) for name, values in columns.items()})
    path = folder / f"{split}.index.arrow"
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    keys_path = folder / f"{split}.keys.parquet"
    pq.write_table(
        pa.table({"key": keys if isinstance(keys, (pa.Array, pa.ChunkedArray)) else pa.array(keys, pa.string())}),
        keys_path,
        compression="zstd",
        use_dictionary=False,
        write_statistics=False,
        row_group_size=_GROUP_ROWS,
        write_page_checksum=True,
    )
    return IndexFiles(_stored(path), digests, _stored(keys_path))


def _stored(path: Path) -> StoredFile:
    return StoredFile(path.name, path.stat().st_size, objects.sha256_file(path))


def index_problem(
    shards: Sequence[Shard],
    num_classes: int,
    shard: np.ndarray,
    offset: np.ndarray,
    size: np.ndarray,
    label: np.ndarray,
) -> str | None:
    """What in an index contradicts the shards that it speaks of, or None. Reads all of it."""
    counts = np.bincount(shard, minlength=len(shards)) if len(shard) else np.zeros(len(shards), np.int64)
    if counts.tolist() != [entry.num_samples for entry in shards]:
        return "other numbers of samples in the shards"
    if (np.diff(shard) < 0).any():
        return "shards out of order"
    ends = np.array([entry.size_bytes for entry in shards], dtype=np.int64)[shard]
    if (offset < 0).any() or (size < 0).any() or (offset + size > ends).any():
        return "images outside their shard"
    if len(label) and (label.min() < 0 or label.max() >= num_classes):
        return "labels outside the classes"
    return None
