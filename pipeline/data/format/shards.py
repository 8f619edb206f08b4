"""Samples -> WebDataset tars whose bytes depend on nothing but the samples.

Any WebDataset reader takes them. Ours reads samples by offset, not through a tar stream: any position is reached at once.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pipeline.storage import objects

SHARD_BYTES = 64 << 20
"""Default size at which a shard is closed: an object store sends it in about a second."""
RECORD_BYTES = 10240
"""Tar: the end mark fills up to a whole one."""
_BLOCK = 512  # tar: a header, and the unit of a member


@dataclass(frozen=True)
class ShardSample:
    """A sample as it is written."""

    key: str
    label: int
    data: bytes
    extension: str
    beside: tuple[str, bytes] | None = None
    """Ending and bytes of what lies beside it (`pipeline.data.format.masks`, `pipeline.data.format.boxes`)."""


@dataclass(frozen=True)
class WrittenShard:
    """A finished tar in the staging folder; `offsets` says where the image bytes of each sample lie in it."""

    path: Path
    size_bytes: int
    sha256: str
    offsets: tuple[int, ...]


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:06d}.tar"


def write_shard(samples: Iterable[ShardSample], path: Path) -> WrittenShard:
    """One tar with the members `<key>.<extension>` (bytes unchanged) and `<key>.cls` (the label as text) a sample, and
    `<key>.seg.png` or `<key>.boxes.json` where it has a mask or boxes.

    Samples are taken one at a time: no more than one is in memory.
    """
    import webdataset

    offsets = []
    with (
        path.open("wb") as file,
        webdataset.TarWriter(file, mtime=0, encoder=False, user="root", group="root") as writer,
    ):
        for sample in samples:
            members = {sample.extension: sample.data, "cls": str(sample.label).encode()}
            if sample.beside is not None:
                ending, data = sample.beside
                members[ending] = data
            # TarWriter writes the members by name; those before the image shift it.
            before = sum(member_bytes(len(data)) for name, data in members.items() if name < sample.extension)
            offsets.append(writer.tarstream.offset + before + _BLOCK)
            writer.write({"__key__": sample.key, **members})
    return WrittenShard(path, path.stat().st_size, objects.sha256_file(path), tuple(offsets))


def member_bytes(size: int) -> int:
    """What a member of `size` bytes takes in a tar: its header and itself, in whole blocks."""
    return _BLOCK + -(-size // _BLOCK) * _BLOCK


def sample_bytes(size: int) -> int:
    """What a sample with an image of `size` bytes takes in a shard: the image and its label."""
    return member_bytes(size) + 2 * _BLOCK
