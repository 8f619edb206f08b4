"""Keys and perceptual hashes of the samples of a split, in files of parquet that are read group by group."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.documents import excerpt
from pipeline.errors import UserError

_GROUP_ROWS = 8192
_GROUPS_HELD, _FILES_HELD = 64, 16
_MAX_GROUP_BYTES = 64 << 20  # of keys, uncompressed


class Keys:
    """WebDataset keys of a split: `keys[7]`, `keys[array]`, `len`, iteration, `np.asarray`.

    Args:
        first_samples: (num_files + 1,) number of the first sample of each file, and the number of samples.
        path_of: number of a file -> its path.
    """

    def __init__(self, first_samples: np.ndarray, path_of: Callable[[int], Path]) -> None:
        self._firsts, self._path_of = first_samples, path_of
        self._files: OrderedDict[int, Any] = OrderedDict()
        self._groups: OrderedDict[tuple[int, int], Any] = OrderedDict()

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, (int, np.integer)):
            number = range(len(self))[int(place)]
            file = int(np.searchsorted(self._firsts, number, side="right")) - 1
            group, row = divmod(number - int(self._firsts[file]), _GROUP_ROWS)
            return self._group(file, group)[row].as_py()
        places = np.arange(len(self))[place]
        found = np.empty(len(places), dtype=object)
        for number in np.argsort(places, kind="stable").tolist():  # each group is read once, whatever the order
            found[number] = self[int(places[number])]
        return found

    def __iter__(self) -> Iterator[str]:
        for file in range(len(self._firsts) - 1):
            for group in range(-(-self._num_rows(file) // _GROUP_ROWS)):
                yield from self._group(file, group).to_pylist()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(list(self), dtype=dtype or object)

    def hashes(self, file: int) -> np.ndarray:
        """Perceptual hashes of a file's samples, (n,) uint64."""
        groups = range(-(-self._num_rows(file) // _GROUP_ROWS))
        found = [self._read(file, group, "phash", "uint64").to_numpy() for group in groups]
        return np.concatenate([np.empty(0, np.uint64), *found])

    def hashes_of(self, numbers: np.ndarray) -> np.ndarray:
        """Perceptual hashes of some samples, (n,) uint64."""
        files = np.searchsorted(self._firsts, numbers, side="right") - 1
        found = np.empty(len(numbers), np.uint64)
        for file in np.unique(files).tolist():
            found[files == file] = self.hashes(file)[numbers[files == file] - self._firsts[file]]
        return found

    def _num_rows(self, file: int) -> int:
        return int(self._firsts[file + 1] - self._firsts[file])

    def _group(self, file: int, group: int) -> Any:
        if (file, group) in self._groups:
            self._groups.move_to_end((file, group))
            return self._groups[file, group]
        # As a dictionary where the file has one: one long key that stands 8,192 times is held once.
        rows = self._read(file, group, "key", "dictionary<values=string, indices=int32, ordered=0>")
        self._groups[file, group] = rows
        if len(self._groups) > _GROUPS_HELD:
            self._groups.popitem(last=False)
        return rows

    def _read(self, file: int, group: int, column: str, kind: str) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = self._path_of(file)
        try:
            if file not in self._files:
                self._files[file] = pq.ParquetFile(
                    path, memory_map=True, page_checksum_verification=True, read_dictionary=["key"]
                )
                if len(self._files) > _FILES_HELD:
                    self._files.popitem(last=False)
            opened = self._files[file]
            about = opened.metadata.row_group(group)
            num = self._num_rows(file)
            if opened.metadata.num_rows != num or about.num_rows != min(_GROUP_ROWS, num - group * _GROUP_ROWS):
                raise ValueError("another number of keys than the manifest says")
            if about.total_byte_size > _MAX_GROUP_BYTES or str(opened.schema_arrow.field(column).type) != kind:
                raise ValueError(f"no column {column}, or a huge one")
            rows = opened.read_row_group(group, columns=[column], use_threads=False).column(column).combine_chunks()
            if len(rows) != about.num_rows:  # its pages hold others than its foot says
                raise ValueError(f"{len(rows)} rows where its description says {about.num_rows}")
            if rows.null_count:
                raise ValueError(f"gaps in its column {column}")
            return rows
        except (pa.ArrowException, OSError, ValueError, KeyError, IndexError) as error:
            self._files.pop(file, None)
            line = excerpt(" ".join(str(error).split()), 200)
            raise UserError(f"the keys {path} do not verify ({line}): restore them or prepare again") from error


def write(path: Path, texts: Any, hashes: np.ndarray) -> None:
    """A file of keys (list of str or pyarrow array of strings) and their hashes, (n,) uint64."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = texts if isinstance(texts, (pa.Array, pa.ChunkedArray)) else pa.array(texts, pa.string())
    pq.write_table(
        pa.table({"key": texts, "phash": pa.array(np.ascontiguousarray(hashes, np.uint64))}),
        path,
        compression="zstd",
        use_dictionary=False,
        write_statistics=False,
        row_group_size=_GROUP_ROWS,
        write_page_checksum=True,
    )
