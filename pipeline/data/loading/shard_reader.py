"""Samples of shards, local or in an object store, in as few requests as their neighbourhood allows; what cannot be had, why.

A sample is proven before it is handed on: the tar header in front of it must be whole and state its size and its name, its
bytes must have the CRC-32 that the index states (where it states any), and each request must hit the version of the shard
that the run began with. So a cut, replaced or damaged shard costs exactly the samples that it lost, and no sample is ever
put together from two objects.
"""

import functools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.data.format.manifest import SplitIndex
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


@dataclass(frozen=True)
class ShardFault:
    """A shard that was not as its manifest says before the first sample was read."""

    shard: int
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
    versions: dict[str, ObjectVersion] = field(default_factory=dict)
    """Of the shards, as the run found them; see `find_versions`."""
    layout: LaneLayout | None = None
    """Of the order in lanes, whose blocks are read; None: blocks of `block_bytes`."""
    _blocks: Blocks | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_blocks": None}

    def find_versions(self) -> list[ShardFault]:
        """Look once which version of each shard is there, and what of them is not as the manifest says."""
        names = [shard.name for shard in self.index.shards]
        self.versions = range_reads.versions(self.url, names)
        faults = []
        for number, shard in enumerate(self.index.shards):
            found = self.versions.get(shard.name)
            if found is not None and found.size_bytes == shard.size_bytes:
                continue
            place = objects.join(self.url, shard.name)
            if found is None or found.size_bytes > shard.size_bytes:
                lost = shard.num_samples
            else:
                rows = slice(int(self._firsts[number]), int(self._firsts[number + 1]))
                ends = self.index.offset[rows] + self.index.size[rows]
                lost = int((ends > found.size_bytes).sum())
            has = "is missing" if found is None else f"has {found.size_bytes} bytes"
            faults.append(ShardFault(number, f"{place} {has}, its manifest says {shard.size_bytes} bytes", lost))
        return faults

    def requests(self, samples: Sequence[int]) -> list[Request]:
        """The requests that read these samples (each once), in the order of the first sample that each one serves.

        With a cache whole blocks are asked for, because other processes and epochs want the rest; without one only what
        lies between the first and the last sample, and nothing across wide gaps.
        """
        if self.cache is not None:
            return self._whole_blocks(samples)
        index = self.index
        numbers = np.asarray(samples)
        place = np.argsort(index.shard[numbers].astype(np.int64) << 44 | index.offset[numbers].astype(np.int64))
        found: list[tuple[int, Request]] = []
        useful = 0
        for i in place.tolist():
            sample, shard = int(numbers[i]), int(index.shard[numbers[i]])
            start = max(0, int(index.offset[sample]) - HEADER_BYTES)
            end = int(index.offset[sample]) + int(index.size[sample])
            if found:
                first, last = found[-1]
                near = start - last.end <= MAX_GAP_BYTES and end - last.start <= max(self.block_bytes, 1 << 16)
                dense = (
                    MIN_USEFUL_SHARE * (end - last.start) <= useful + end - start or start - last.end <= SMALL_GAP_BYTES
                )
                if last.shard == shard and near and dense:
                    useful += end - start
                    merged = Request(shard, last.start, max(end, last.end), (*last.samples, sample))
                    found[-1] = (min(first, i), merged)
                    continue
            useful = end - start
            found.append((i, Request(shard, start, end, (sample,))))
        return [request for _, request in sorted(found, key=lambda pair: pair[0])]

    def _whole_blocks(self, samples: Sequence[int]) -> list[Request]:
        wanted: dict[tuple[int, int, int], list[int]] = {}
        for sample, span in zip(samples, self._spans(np.asarray(samples, np.int64)), strict=True):
            wanted.setdefault(span, []).append(int(sample))
        found = []
        for (shard, first, stop), members in wanted.items():
            rows = slice(first, stop)
            start = max(0, int(self.index.offset[rows].min()) - HEADER_BYTES)
            end = int((self.index.offset[rows] + self.index.size[rows]).max())
            found.append(Request(shard, start, end, tuple(members)))
        return found

    def _spans(self, numbers: np.ndarray) -> list[tuple[int, int, int]]:
        """(shard, first, stop) of each sample: the samples of its block that lie in its shard."""
        firsts = self._firsts
        shards = (np.searchsorted(firsts, numbers, side="right") - 1).tolist()
        if self.layout is None:
            if self._blocks is None:
                self._blocks = cut_blocks(self.index.shard, self.index.offset, self.block_bytes)
            blocks = np.searchsorted(self._blocks.first, numbers, side="right") - 1
            begins = self._blocks.first[blocks]
            return list(zip(shards, begins.tolist(), (begins + self._blocks.count[blocks]).tolist(), strict=True))
        blocks = self.layout.block_of(numbers)
        spans = {block: self.layout.span(block) for block in np.unique(blocks).tolist() if block >= 0}
        found = []
        for number, shard, block in zip(numbers.tolist(), shards, blocks.tolist(), strict=True):
            first, stop = spans.get(block, (number, number + 1))
            found.append((shard, max(first, int(firsts[shard])), min(stop, int(firsts[shard + 1]))))
        return found

    @functools.cached_property
    def _firsts(self) -> np.ndarray:
        """Number of each shard's first sample, and the number of samples; int64."""
        return np.concatenate([[0], np.cumsum([s.num_samples for s in self.index.shards], dtype=np.int64)])

    def read(self, request: Request) -> dict[int, bytes | Unreadable]:
        """The samples of a request. UserError if the store refuses for a reason that the user can mend."""
        shard = self.index.shards[request.shard]
        place = objects.join(self.url, shard.name)
        expected = self.versions.get(shard.name)
        if expected is None:
            return dict.fromkeys(request.samples, Unreadable("its shard is missing"))
        length = request.end - request.start

        def fetch() -> bytes:
            return range_reads.read(place, request.start, length, expected)

        def fetched() -> dict[int, bytes | Unreadable]:
            data = fetch()
            return self._prove_all(request, lambda start, stop: data[start - request.start : stop - request.start])

        try:
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
        return {sample: self._proven(read, sample) for sample in request.samples}

    def _proven(self, read: Read, sample: int) -> bytes | Unreadable:
        offset, size = int(self.index.offset[sample]), int(self.index.size[sample])
        start = max(0, offset - HEADER_BYTES)
        data = read(start, offset + size)
        header, content = data[: offset - start], data[offset - start :]
        if len(content) != size:
            return Unreadable("its shard ends before it")
        problem = header_problem(header, size)
        if problem:
            return Unreadable(problem)
        if zlib.crc32(content) != int(self.index.crc32[sample]):
            return Unreadable("its bytes have changed (CRC-32 differs)")
        return content


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
