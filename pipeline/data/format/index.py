"""The index of a split: where in which shard each image lies, its class and checksum, its key and perceptual hash.

It lies in pieces of neighbouring shards (`pipeline.data.format.pieces`), so whoever reads a part of the dataset needs a part
of the index: the rows of a shard are read, and held against their digest, when a sample of it is wanted; out of an object
store once a host.
"""

import functools
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.format.keys import Keys
from pipeline.data.format.pieces import ROW, Piece, PieceFiles, PieceTable, Shard
from pipeline.storage import objects

PLACED = np.dtype([("shard", "<i4"), *ROW.descr])
"""A row, with the number of its shard in the split."""
_TABLES_HELD, _ROWS_HELD_BYTES = 64, 32 << 20
_FETCHERS = 32


class Shards(Sequence[Shard]):
    """The shards of a split; what is asked for is read piece by piece."""

    def __init__(self, index: "SplitIndex") -> None:
        self._index = index

    def __len__(self) -> int:
        return int(self._index.first_shards[-1])

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return tuple(self[i] for i in range(*number.indices(len(self))))
        piece, place = self._index.find(range(len(self))[int(number)])
        return self._index.table(piece).shards[place]

    def __iter__(self) -> Iterator[Shard]:
        for piece in range(len(self._index.pieces)):
            yield from self._index.table(piece).shards


class SplitIndex:
    """Where each sample of a split lies. Threads may share it; to a worker only the names of its pieces travel.

    `rows` gives what some samples need. The columns as a whole (`label`, `offset`, ...) are arrays of the length of the split,
    read-only. What does not verify is a UserError where it is first used.
    """

    def __init__(self, url: str, name: str, num_classes: int, pieces: Sequence[Piece]) -> None:
        self.url, self.name, self.num_classes, self.pieces = url, name, num_classes, tuple(pieces)
        self.first_samples = np.cumsum([0, *(piece.num_samples for piece in pieces)], dtype=np.int64)
        self.first_shards = np.cumsum([0, *(piece.num_shards for piece in pieces)], dtype=np.int64)
        self.num_samples = int(self.first_samples[-1])
        self.num_bytes = sum(piece.num_bytes for piece in pieces)
        self._files = PieceFiles(url)
        self._lock = threading.Lock()
        self._tables: OrderedDict[int, tuple[PieceTable, np.ndarray]] = OrderedDict()
        self._rows: OrderedDict[int, np.ndarray] = OrderedDict()
        self._held_bytes = 0

    def __getstate__(self) -> tuple[str, str, int, tuple[Piece, ...]]:
        return self.url, self.name, self.num_classes, self.pieces

    def __setstate__(self, state: tuple[str, str, int, tuple[Piece, ...]]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    @property
    def shards(self) -> Shards:
        return Shards(self)

    @functools.cached_property
    def keys(self) -> Keys:
        return Keys(self.first_samples, self.keys_file)

    def keys_file(self, piece: int) -> Path:
        return self._files.keys_file(self.table(piece))

    # --- a part of it -------------------------------------------------------------------------------------------------

    def rows(self, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
        """What is known of some samples, (n,) `PLACED`."""
        numbers = np.asarray(numbers, np.int64)
        pieces = np.searchsorted(self.first_samples, numbers, side="right") - 1
        which = np.unique(pieces).tolist()
        self._at_once(self._table, [piece for piece in which if piece not in self._tables])
        shards, inside = np.empty(len(numbers), np.int64), np.empty(len(numbers), np.int64)
        for piece in which:
            mine, begins = pieces == piece, self._table(piece)[1]
            places = np.searchsorted(begins, numbers[mine], side="right") - 1
            shards[mine], inside[mine] = places + self.first_shards[piece], numbers[mine] - begins[places]
        wanted, group = np.unique(shards, return_inverse=True)
        self._at_once(self.shard_rows, [shard for shard in wanted.tolist() if shard not in self._rows])
        found = np.empty(len(numbers), PLACED)
        found["shard"] = shards
        members = np.split(np.argsort(group, kind="stable"), np.cumsum(np.bincount(group))[:-1]) if len(group) else []
        for shard, mine in zip(wanted.tolist(), members, strict=True):
            rows = self.shard_rows(shard)[inside[mine]]
            for name in ROW.names or ():
                found[name][mine] = rows[name]
        return found

    def shard_rows(self, shard: int) -> np.ndarray:
        """Of one shard, (num_samples,) `ROW`, read-only."""
        with self._lock:
            if shard in self._rows:
                self._rows.move_to_end(shard)
                return self._rows[shard]
        piece, place = self.find(shard)
        table, begins = self._table(piece)
        before = int(begins[place] - begins[0])
        rows = self._files.shard_rows(self.pieces[piece], table, place, before, self.num_classes)
        with self._lock:
            if shard not in self._rows:
                self._held_bytes += rows.nbytes
            self._rows[shard] = rows
            while self._held_bytes > _ROWS_HELD_BYTES and len(self._rows) > 1:
                self._held_bytes -= self._rows.popitem(last=False)[1].nbytes
        return rows

    def samples_of(self, shard: int) -> range:
        """Numbers of a shard's samples."""
        piece, place = self.find(shard)
        begins = self._table(piece)[1]
        return range(int(begins[place]), int(begins[place + 1]))

    def find(self, shard: int) -> tuple[int, int]:
        """The piece that a shard is in, and its place there."""
        piece = int(np.searchsorted(self.first_shards, shard, side="right")) - 1
        return piece, shard - int(self.first_shards[piece])

    def table(self, piece: int) -> PieceTable:
        return self._table(piece)[0]

    def _table(self, piece: int) -> tuple[PieceTable, np.ndarray]:
        """The table of a piece, and the numbers of its shards' first samples with the one after the last."""
        with self._lock:
            if piece in self._tables:
                self._tables.move_to_end(piece)
                return self._tables[piece]
        table = self._files.table(self.pieces[piece])
        counts = [shard.num_samples for shard in table.shards]
        made = table, np.cumsum([self.first_samples[piece], *counts], dtype=np.int64)
        with self._lock:
            self._tables[piece] = made
            if len(self._tables) > _TABLES_HELD:
                self._tables.popitem(last=False)
        return made

    def _at_once(self, load: Callable[[int], object], wanted: list[int]) -> None:
        """Several things from a store together: each is a request, and a request takes its time."""
        if len(wanted) > 1 and not objects.is_local(self.url):
            list(_fetchers().map(load, wanted))

    # --- all of it ----------------------------------------------------------------------------------------------------

    @functools.cached_property
    def shard(self) -> np.ndarray:
        """int32, number of the shard in `shards`; never falls."""
        counts = [shard.num_samples for piece in self._checked_pieces for shard in self.table(piece).shards]
        return _frozen(np.repeat(np.arange(len(counts), dtype=np.int32), counts))

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
    def crc32(self) -> np.ndarray:
        """uint32, of the image's bytes: what a reader of a part of a shard holds them against."""
        return self._column("crc32")

    @functools.cached_property
    def phash(self) -> np.ndarray:
        """uint64, perceptual hash of the pixels (`pipeline.data.images.perceptual_hash`)."""
        return _frozen(self._whole(np.dtype(np.uint64), self.keys.hashes))

    @functools.cached_property
    def _checked_pieces(self) -> range:
        """Numbers of all pieces, whose rows are as many as their tables say: looked at once, before anything as long as the
        index is allocated."""

        def check(piece: int) -> None:
            self._files.check_rows_size(self.table(piece))

        pieces = range(len(self.pieces))
        deque(map(check, pieces) if objects.is_local(self.url) else _fetchers().map(check, pieces), maxlen=0)
        return pieces

    def _column(self, name: str) -> np.ndarray:
        def of_piece(piece: int) -> np.ndarray:
            return self._files.all_rows(self.pieces[piece], self.table(piece), self.num_classes)[name]

        return _frozen(self._whole(ROW[name], of_piece))

    def _whole(self, kind: np.dtype[Any], of_piece: Callable[[int], np.ndarray]) -> np.ndarray:
        pieces, found = self._checked_pieces, np.empty(self.num_samples, kind)
        for piece in pieces:
            found[self.first_samples[piece] : self.first_samples[piece + 1]] = of_piece(piece)
        return found


@functools.cache
def _fetchers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_FETCHERS, thread_name_prefix="normfree-index")


def _frozen(values: np.ndarray) -> np.ndarray:
    values.flags.writeable = False
    return values
