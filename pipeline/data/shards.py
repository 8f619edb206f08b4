"""Samples -> WebDataset tars whose bytes depend on nothing but the samples."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline import storage

SHARD_BYTES = 64 << 20
"""Default size at which a shard is closed: an object store sends it in about a second."""
_BLOCK = 512  # tar: a header, and the unit of a member
_RECORD = 10240  # tar: the end mark fills up to a whole one


@dataclass(frozen=True)
class ShardSample:
    """A sample as it is written."""

    key: str
    label: int
    data: bytes
    extension: str


@dataclass(frozen=True)
class IndexRow:
    """Where the image bytes of a sample lie in its tar, in bytes."""

    key: str
    label: int
    offset: int
    size: int


@dataclass(frozen=True)
class WrittenShard:
    """A finished tar in the staging folder."""

    path: Path
    size_bytes: int
    sha256: str
    rows: tuple[IndexRow, ...]


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:06d}.tar"


def write_shards(samples: Iterable[ShardSample], folder: Path, split: str, shard_bytes: int) -> Iterator[WrittenShard]:
    """Write tars of about `shard_bytes` each into `folder`, in the order of the samples; yield each when it is closed.

    A shard holds at least one sample, and ends before the sample that would make it larger than `shard_bytes`.
    """
    pending: list[ShardSample] = []
    pending_bytes = 0
    number = 0
    for sample in samples:
        num_bytes = _tar_bytes(len(sample.data)) + _tar_bytes(len(str(sample.label)))
        if pending and pending_bytes + num_bytes + _RECORD > shard_bytes:
            yield write_shard(pending, folder / shard_name(split, number))
            pending, pending_bytes, number = [], 0, number + 1
        pending.append(sample)
        pending_bytes += num_bytes
    if pending:
        yield write_shard(pending, folder / shard_name(split, number))


def write_shard(samples: Iterable[ShardSample], path: Path) -> WrittenShard:
    """One tar with the members `<key>.<extension>` (bytes unchanged) and `<key>.cls` (the label as text) a sample."""
    import webdataset

    rows = []
    with (
        path.open("wb") as file,
        webdataset.TarWriter(file, mtime=0, encoder=False, user="root", group="root") as writer,
    ):
        for sample in samples:
            label = str(sample.label).encode()
            members = {sample.extension: sample.data, "cls": label}
            # TarWriter writes the members by name; the one before the image shifts it.
            before = _tar_bytes(len(label)) if sample.extension > "cls" else 0
            offset = writer.tarstream.offset + before + _BLOCK
            rows.append(IndexRow(sample.key, sample.label, offset, len(sample.data)))
            writer.write({"__key__": sample.key, **members})
    return WrittenShard(path, path.stat().st_size, storage.sha256_file(path), tuple(rows))


def _tar_bytes(size: int) -> int:
    """What a member of `size` bytes takes in a tar: its header and itself, in whole blocks."""
    return _BLOCK + -(-size // _BLOCK) * _BLOCK
