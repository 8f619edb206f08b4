"""Samples of shards, local or in an object store, in as few requests as their neighbourhood allows; what cannot be had, why.

A sample is proven before it is handed on: the tar header in front of it must be whole and state its size and its name, its
bytes must have the CRC-32 that the index states (where it states any), and each request must hit the version of the shard
that the run began with. So a cut, replaced or damaged shard costs exactly the samples that it lost, and no sample is ever
put together from two objects.
"""

import threading
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.data.format.index import SplitIndex
from pipeline.data.sampling.lanes import LaneLayout
from pipeline.data.sampling.order import Blocks, cut_blocks
from pipeline.errors import UserError
from pipeline.storage import objects, range_reads
from pipeline.storage.block_cache import BlockCache, Read
from pipeline.storage.range_reads import ObjectVersion

HEADER_BYTES = 512
MAX_GAP_BYTES = 64 << 10
"""A request reads over gaps up to this: less than what a store sends while a new request is on its way."""
SMALL_GAP_BYTES = 4 << 10
MIN_USEFUL_SHARE = 0.15
"""... and only while this much of what it brings was asked for; gaps of a page or less are not worth a question."""
MAX_LISTED = 10_000
"""Shards that are looked at before a run's first step; each listing brings a thousand. Of more, each is when it is opened."""


@dataclass(frozen=True)
class Unreadable:
    """A sample that cannot be had, and why."""

    reason: str


@dataclass(frozen=True)
class Request:
    """Bytes start ... end of a shard, and the samples that lie in them."""

    shard: int
    start: int
    end: int
    samples: tuple[int, ...]
    rows: np.ndarray
    """What the index says of each, (n,) `PLACED`."""


@dataclass(frozen=True)
class ShardFault:
    """A shard that was not as its manifest says before the first sample was read."""

    reason: str
    num_samples: int
    """Samples that are lost with it."""


@dataclass
class ShardReader:
    """Reads samples of one split by number. Threads may share it; sent to another process it connects anew there."""

    index: SplitIndex
    url: str
    block_bytes: int
    cache: BlockCache | None = None
    layout: LaneLayout | None = None
    """Of the order in lanes, whose blocks are read; None: blocks of `block_bytes`."""
    versions: dict[str, ObjectVersion | None] = field(default_factory=dict)
    """Of the shards: as the run found them at its start (`find_versions`), else as they were when one was first opened here."""
    _blocks: Blocks | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_blocks": None}

    def find_versions(self) -> dict[str, ObjectVersion | None]:
        """Which version of each shard is there, None where it is missing; nothing for more shards than are worth a listing."""
        if len(self.index.shards) > MAX_LISTED:
            return {}
        names = [shard.name for shard in self.index.shards]
        found = range_reads.versions(self.url, names)
        return {name: found.get(name) for name in names}

    def faults(self) -> list[ShardFault]:
        """What of the shards whose versions are known is not as the manifest says."""
        faults = []
        for number, shard in enumerate(self.index.shards if self.versions else ()):
            found = self.versions[shard.name]
            if found is not None and found.size_bytes == shard.size_bytes:
                continue
            place = objects.join(self.url, shard.name)
            if found is None or found.size_bytes > shard.size_bytes:
                lost = shard.num_samples
            else:
                rows = self.index.shard_rows(number)
                lost = int((rows["offset"] + rows["size"] > found.size_bytes).sum())
            has = "is missing" if found is None else f"has {found.size_bytes} bytes"
            faults.append(ShardFault(f"{place} {has}, its manifest says {shard.size_bytes} bytes", lost))
        return faults

    def requests(self, samples: Sequence[int], rows: np.ndarray | None = None) -> list[Request]:
        """The requests that read these samples (each once), in the order of the first sample that each one serves.

        With a cache whole blocks are asked for, because other processes and epochs want the rest; without one only what
        lies between the first and the last sample, and nothing across wide gaps.

        Args:
            rows: of the samples, where they are at hand.
        """
        rows = self.index.rows(samples) if rows is None else rows
        spans = self._near(rows) if self.cache is None else self._whole_blocks(np.asarray(samples, np.int64), rows)
        return [
            Request(int(rows["shard"][members[0]]), start, end, tuple(int(samples[i]) for i in members), rows[members])
            for start, end, members in sorted(spans, key=lambda span: min(span[2]))
        ]

    def _near(self, rows: np.ndarray) -> list[tuple[int, int, list[int]]]:
        """(start, end, places in `rows`) of samples that lie near each other in one shard."""
        order = np.lexsort((rows["offset"], rows["shard"])).tolist()
        shards, offsets, sizes = (rows[name].tolist() for name in ("shard", "offset", "size"))
        found: list[tuple[int, int, list[int]]] = []
        useful = 0
        for i in order:
            start, end = max(0, offsets[i] - HEADER_BYTES), offsets[i] + sizes[i]
            if found:
                begin, last_end, members = found[-1]
                gap, useful_share = start - last_end, (useful + end - start) / max(end - begin, 1)
                near = gap <= MAX_GAP_BYTES and end - begin <= max(self.block_bytes, 1 << 16)
                dense = useful_share >= MIN_USEFUL_SHARE or gap <= SMALL_GAP_BYTES
                if shards[members[0]] == shards[i] and near and dense:
                    useful += end - start
                    members.append(i)
                    found[-1] = (begin, max(end, last_end), members)
                    continue
            useful = end - start
            found.append((start, end, [i]))
        return found

    def _whole_blocks(self, numbers: np.ndarray, rows: np.ndarray) -> list[tuple[int, int, list[int]]]:
        """(start, end, places in `rows`) of the blocks that hold the samples."""
        wanted: dict[tuple[int, int, int], list[int]] = {}
        for i, (shard, span) in enumerate(zip(rows["shard"].tolist(), self._spans(numbers), strict=True)):
            wanted.setdefault((shard, *span), []).append(i)
        found = []
        for (shard, first, stop), members in wanted.items():
            samples = self.index.samples_of(shard)  # a block may go on in the next shard, by another request
            inside = slice(max(first, samples.start) - samples.start, min(stop, samples.stop) - samples.start)
            block = self.index.shard_rows(shard)[inside]
            end = int((block["offset"] + block["size"]).max())
            found.append((max(0, int(block["offset"].min()) - HEADER_BYTES), end, members))
        return found

    def _spans(self, numbers: np.ndarray) -> list[tuple[int, int]]:
        """First sample of each sample's block, and the one after its last."""
        if self.layout is None:
            if self._blocks is None:
                self._blocks = cut_blocks(self.index.shard, self.index.offset, self.block_bytes)
            blocks = np.searchsorted(self._blocks.first, numbers, side="right") - 1
            begins = self._blocks.first[blocks]
            return list(zip(begins.tolist(), (begins + self._blocks.count[blocks]).tolist(), strict=True))
        blocks = self.layout.block_of(numbers)
        spans = {block: self.layout.span(block) for block in np.unique(blocks).tolist() if block >= 0}
        return [
            spans.get(block, (number, number + 1))
            for number, block in zip(numbers.tolist(), blocks.tolist(), strict=True)
        ]

    def _version(self, name: str, place: str) -> ObjectVersion | None:
        if name not in self.versions:
            try:
                self.versions[name] = range_reads.version(place)
            except (FileNotFoundError, NotADirectoryError):
                self.versions[name] = None
        return self.versions[name]

    def read(self, request: Request) -> dict[int, bytes | Unreadable]:
        """The samples of a request. UserError if the store refuses for a reason that the user can mend."""
        shard = self.index.shards[request.shard]
        place = objects.join(self.url, shard.name)
        length = request.end - request.start

        def fetch() -> memoryview:
            assert expected is not None
            data = _buffer(max(0, min(length, expected.size_bytes - request.start)), self.block_bytes * 5 // 4)
            range_reads.read_into(place, request.start, data, expected)
            return data

        def fetched() -> dict[int, bytes | Unreadable]:
            data = fetch()
            return self._prove_all(
                request, lambda start, stop: bytes(data[start - request.start : stop - request.start])
            )

        try:
            expected = self._version(shard.name, place)
            if expected is None:
                return dict.fromkeys(request.samples, Unreadable("its shard is missing"))
            if self.cache is None or expected.size_bytes != shard.size_bytes:
                return fetched()
            with self.cache.block(shard.sha256, request.start, length, fetch) as read:
                found = self._prove_all(request, read)
            if any(isinstance(content, Unreadable) for content in found.values()):  # the entry, or the shard?
                self.cache.forget(shard.sha256, request.start, length)
                found = fetched()
            return found
        except range_reads.ObjectChanged:
            return dict.fromkeys(request.samples, Unreadable("its shard was replaced during the run"))
        except FileNotFoundError:
            return dict.fromkeys(request.samples, Unreadable("its shard is missing"))
        except UserError:
            raise
        except Exception as error:  # clients raise what they like; whatever it is, these samples did not come
            reason = f"its shard cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
            return dict.fromkeys(request.samples, Unreadable(reason))

    def _prove_all(self, request: Request, read: Read) -> dict[int, bytes | Unreadable]:
        return {sample: self._proven(read, row) for sample, row in zip(request.samples, request.rows, strict=True)}

    def _proven(self, read: Read, row: np.void) -> bytes | Unreadable:
        offset, size = int(row["offset"]), int(row["size"])
        start = max(0, offset - HEADER_BYTES)
        data = read(start, offset + size)
        header, content = data[: offset - start], data[offset - start :]
        if len(content) != size:
            return Unreadable("its shard ends before it")
        problem = header_problem(header, size)
        if problem:
            return Unreadable(problem)
        if zlib.crc32(content) != int(row["crc32"]):
            return Unreadable("its bytes have changed (CRC-32 differs)")
        return content


_buffers = threading.local()


def _buffer(num_bytes: int, usual_bytes: int) -> memoryview:
    """This thread's, until it asks again: new pages for each request cost as much as the request. It hardly ever grows."""
    if len(held := getattr(_buffers, "bytes", b"")) < num_bytes:
        held = _buffers.bytes = bytearray(max(num_bytes, usual_bytes))
    return memoryview(held)[:num_bytes]


def header_problem(header: bytes, size: int) -> str | None:
    """Why these 512 bytes are not the tar header of a member of this size, or None: a reason to give; CRC-32 is the proof."""
    if len(header) != HEADER_BYTES:
        return "no tar header stands before it"
    try:
        recorded = int(header[148:156].strip(b"\0 "), 8)
        length = _number(header[124:136])
    except ValueError:
        return "the tar header before it is damaged"
    if recorded != sum(header) - sum(header[148:156]) + 8 * 32:
        return "the tar header before it is damaged"
    if length != size:
        return f"the tar has a member of {length} bytes where the index has {size}"
    return None


def _number(field_: bytes) -> int:
    """A number of a tar header: octal text, or binary where it would not fit."""
    if field_[0] & 0x80:
        return int.from_bytes(field_[1:], "big")
    return int(field_.strip(b"\0 ") or b"0", 8)
