"""One planned shard: read, check, perhaps re-encode, write, publish, record. Runs in worker processes."""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.data.format import boxes, masks
from pipeline.data.format.manifest import Skipped
from pipeline.data.format.masks import check_mask, decode_mask
from pipeline.data.format.pieces import Shard
from pipeline.data.format.shards import ShardSample, write_shard
from pipeline.data.format.tars import printable
from pipeline.data.images.decode import DecodeError, decode_image
from pipeline.data.images.formats import ENDINGS, JPEG, ending_of
from pipeline.data.images.perceptual_hash import perceptual_hash
from pipeline.data.prepare.journal import Record, read_record, write_record
from pipeline.data.prepare.output_folder import explain_full_disk, publish
from pipeline.data.prepare.reencode import Reencode
from pipeline.data.prepare.shard_plan import PlannedShard
from pipeline.data.sources.entry import ImageEntry, Reader, Unreadable
from pipeline.errors import UserError
from pipeline.storage import objects


class _Taken(NamedTuple):
    """A sample that is written; `place` in the plan."""

    place: int
    size: int
    phash: int
    crc32: int


@dataclass(frozen=True)
class Finished:
    """A shard that is there, with its record."""

    num_planned: int
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True)
class ShardWriter:
    """Writes planned shards to `out`; what is sent to a worker process."""

    reader: Reader
    out: str
    work: Path
    """Local folder for the unfinished tar."""
    reencode: Reencode
    num_mask_classes: int = 0
    """Of pixels, where images have masks."""
    mask_of_first: int = 0
    """Of the card."""

    def plan(self, planned: PlannedShard) -> str:
        return planned.digest(str(self.reencode.to_recipe()))

    def is_done(self, planned: PlannedShard) -> bool:
        return read_record(self.out, planned.name, self.plan(planned)) is not None

    def __call__(self, planned: PlannedShard) -> Finished:
        """The shard is there afterwards; OSError or UserError where reading or writing fails."""
        plan = self.plan(planned)
        record = read_record(self.out, planned.name, plan)
        if record is None:
            with explain_full_disk(self.out):
                record = self._write(planned, plan)
        return Finished(record.num_planned, record.skipped)

    def _write(self, planned: PlannedShard, plan: str) -> Record:
        self.work.mkdir(parents=True, exist_ok=True)
        taken: list[_Taken] = []
        skipped: list[Skipped] = []
        path = self.work / planned.name
        written = write_shard(self._samples(planned, taken, skipped), path)
        if taken:
            publish(path, objects.join(self.out, planned.name))
        else:
            path.unlink()
        record = Record(
            plan,
            planned.split,
            Shard(planned.name, written.size_bytes, written.sha256, len(taken)),
            tuple(planned.keys[t.place] for t in taken),
            np.array(written.offsets, np.int64),
            np.array([t.size for t in taken], np.int32),
            np.array([planned.labels[t.place] for t in taken], np.int32),
            np.array([t.phash for t in taken], np.uint64),
            np.array([t.crc32 for t in taken], np.uint32),
            tuple(skipped),
        )
        write_record(self.out, record)
        return record

    def mean_bytes(self, entries: Sequence[ImageEntry]) -> float:
        """Mean size of the given images as they would be written, in bytes; of those that can be."""
        sizes = []
        for entry, data in zip(entries, self.reader.read(entries), strict=True):
            found = self._usable(entry, data)
            if not isinstance(found, str):
                sizes.append(len(found[0]))
        return sum(sizes) / len(sizes) if sizes else 1.0

    def _samples(self, planned: PlannedShard, taken: list[_Taken], skipped: list[Skipped]) -> Iterator[ShardSample]:
        contents = self.reader.read(planned.entries)
        for place, (entry, data) in enumerate(zip(planned.entries, contents, strict=True)):
            found = self._usable(entry, data)
            if isinstance(found, str):
                skipped.append(Skipped(entry.split, printable(entry.raw_name), found))
                continue
            content, extension, pixels = found
            taken.append(_Taken(place, len(content), perceptual_hash(pixels), zlib.crc32(content)))
            yield ShardSample(
                planned.keys[place], planned.labels[place], content, extension, self._beside(entry, pixels)
            )

    def _beside(self, entry: ImageEntry, pixels: np.ndarray) -> tuple[str, bytes] | None:
        """Ending and bytes of what an image has besides its label. UserError where it does not fit to the image."""
        if self.reencode.scales and (entry.boxes is not None or entry.mask is not None):
            raise UserError(
                "masks and boxes are of the images as they are; leave out --resize-shortest and --resize-longest"
            )
        if entry.boxes is not None:
            return boxes.ENDING, entry.boxes.encode(*pixels.shape[:2])
        return None if entry.mask is None else (masks.ENDING, self._mask(entry, pixels))

    def _mask(self, entry: ImageEntry, pixels: np.ndarray) -> bytes:
        """Bytes of an image's mask. UserError where it cannot be had or does not fit: a wrong one is mended, not left out."""
        (data,) = self.reader.read([replace(entry, locator=entry.mask)])
        where = f"{entry.split}/{entry.key}.{entry.extension}"
        if isinstance(data, Unreadable):
            raise UserError(f"{where}: its mask cannot be read ({data}); restore it")
        _refuse_changed(f"{where}: its mask", data, entry.mask_size)
        mask = decode_mask(data, where)
        if self.mask_of_first:
            mask, data = masks.from_first(mask, self.mask_of_first)
        check_mask(mask, pixels.shape[:2], self.num_mask_classes, where, self.mask_of_first)
        return data

    def _usable(self, entry: ImageEntry, data: bytes | Unreadable) -> tuple[bytes, str, np.ndarray] | str:
        """(bytes, extension, pixels) as they are written, or the reason why not."""
        if isinstance(data, Unreadable):
            return str(data)
        _refuse_changed(f"{entry.split}/{printable(entry.raw_name)}", data, entry.size)
        try:
            pixels = decode_image(data)
        except DecodeError as error:
            return str(error)
        extension = entry.extension if entry.extension in ENDINGS else ending_of(data)
        if extension is None:
            return "no image of a format that is read"
        return self.reencode.apply(data, "jpg" if extension in JPEG.endings else extension, pixels)


def _refuse_changed(what: str, data: bytes, size: int) -> None:
    if size not in (-1, len(data)):
        raise UserError(
            f"{what} has {len(data)} bytes, and {size} when the source was listed: leave the source as it is, and prepare it "
            "into an empty --out"
        )
