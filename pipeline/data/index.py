"""The index of a split: where in which shard each image lies. Written as parquet, read as arrays."""

import functools
import io
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.errors import UserError


@dataclass(frozen=True)
class Shard:
    name: str
    size_bytes: int
    sha256: str
    num_samples: int


@dataclass(frozen=True, eq=False)
class SplitIndex:
    """Where each sample of a split lies. Arrays of one length, in the order of the shards."""

    name: str
    shards: tuple[Shard, ...]
    num_classes: int
    shard: np.ndarray
    """int32, number of the shard in `shards`; never falls."""
    offset: np.ndarray
    """int64, byte at which the image starts in its tar."""
    size: np.ndarray
    """int32, bytes of the image."""
    label: np.ndarray
    """int32, number of the class in the manifest's `classes`."""
    _parquet: bytes = field(repr=False)

    @property
    def num_samples(self) -> int:
        return len(self.label)

    @functools.cached_property
    def keys(self) -> np.ndarray:
        """WebDataset keys, (num_samples,) of str; read when first asked for."""
        return np.asarray(read_columns(self._parquet, ["key"])["key"].to_numpy(zero_copy_only=False))

    def class_counts(self) -> np.ndarray:
        """Samples of each class, (num_classes,) int64."""
        return np.bincount(self.label, minlength=self.num_classes)


def index_bytes(shard: np.ndarray, offset: np.ndarray, size: np.ndarray, label: np.ndarray, keys: list[str]) -> bytes:
    """The parquet file of a split's index; the arrays as in `SplitIndex`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(
        {
            "shard": pa.array(shard, pa.int32()),
            "offset": pa.array(offset, pa.int64()),
            "size": pa.array(size, pa.int32()),
            "label": pa.array(label, pa.int32()),
            "key": pa.array(keys, pa.string()),
        }
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", use_dictionary=["shard", "label"])
    return buffer.getvalue()


def read_columns(data: bytes, names: list[str]) -> dict[str, Any]:
    """Columns of an index file as pyarrow arrays by name; UserError if it is no such file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(pa.BufferReader(data), columns=names, use_threads=False)
        return {name: table.column(name) for name in names}
    except (pa.ArrowException, KeyError) as error:
        raise UserError(
            f"an index is not the parquet file it should be ({error}): prepare the dataset again"
        ) from error


def index_problem(index: SplitIndex) -> str | None:
    """What in an index contradicts the shards that it speaks of, or None."""
    counts = np.bincount(index.shard, minlength=len(index.shards)) if index.num_samples else np.zeros(0, np.int64)
    if counts.tolist() != [shard.num_samples for shard in index.shards]:
        return "other numbers of samples in the shards"
    if (np.diff(index.shard) < 0).any():
        return "shards out of order"
    ends = np.array([shard.size_bytes for shard in index.shards], dtype=np.int64)[index.shard]
    if (index.offset < 0).any() or (index.size < 0).any() or (index.offset + index.size > ends).any():
        return "images outside their shard"
    if index.num_samples and (index.label.min() < 0 or index.label.max() >= index.num_classes):
        return "labels outside the classes"
    return None
