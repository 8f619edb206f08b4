"""One pass over a WebDataset tar: what each sample has, whether its image decodes, and the digest of the whole file.

Samples are grouped as webdataset does, by the member's name up to the first dot of its last part; members may come in any
order. A name is only ever a key: nothing is written under it.
"""

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pipeline.data.format.tars import HashingStream, Member, printable, read_member, walk
from pipeline.data.images.decode import MAX_IMAGE_BYTES, DecodeError, decode_image
from pipeline.data.images.formats import ENDINGS
from pipeline.data.images.perceptual_hash import perceptual_hash
from pipeline.data.verify.wds_labels import LABEL_EXTENSIONS, MAX_LABEL_BYTES, label_text
from pipeline.storage import objects

DOTTED = "its name has a dot inside, and what follows the first one is its ending to webdataset: rename it"
_MEMBER = re.compile(r"((?:.*/|)[^./][^./]*)\.([^/]+)", re.DOTALL)
_HIDDEN = re.compile(r"(?:.*/)?(?:\.|__MACOSX/|@eaDir/).*", re.DOTALL)


@dataclass
class TarSample:
    """The members of one key."""

    key: str
    images: list[tuple[int, int]] = field(default_factory=list)
    """(offset, size) in bytes."""
    phash: int = 0
    """Of the last image."""
    crc32: int = 0
    """Of the last image's bytes."""
    labels: dict[str, bytes] = field(default_factory=dict)
    dotted: list[str] = field(default_factory=list)
    """Endings such as 00001.jpg: images of other samples, if a dot were allowed in a key."""
    problem: str | None = None

    def label(self, name: str | None) -> str:
        """Label text; ValueError with the reason why this sample cannot be used."""
        if self.problem:
            raise ValueError(self.problem)
        if len(self.images) != 1:
            raise ValueError("two images" if self.images else "no image (jpg, png, webp and the like)")
        return label_text(self.labels, name)


@dataclass
class TarScan:
    """What a tar holds; filled while `scan_tar` runs, so that what was found before a damage is there."""

    samples: dict[str, TarSample] = field(default_factory=dict)
    num_bytes: int = 0
    sha256: str = ""


def scan_tar(url: str, found: TarScan) -> None:
    """Read a tar once, forwards, and decode every image in it.

    Raises:
        BadTar: it is damaged or cut short; `found` holds what lies before.
    """
    with objects.open_read(url) as file:
        stream: Any = HashingStream(file)
        try:
            for member, tar, info in walk(stream, stream=True):
                _take(found, member, lambda tar=tar, info=info: read_member(tar, info))
        finally:
            while stream.read(1 << 20):  # the digest is of the whole file, damaged or not
                pass
            found.num_bytes, found.sha256 = stream.num_bytes, stream.sha256.hexdigest()


def _take(found: TarScan, member: Member, read: Any) -> None:
    split = _MEMBER.fullmatch(member.name)
    if split is None or _HIDDEN.fullmatch(member.name):
        return  # no extension or hidden: webdataset leaves it out, too
    key, extension = printable(split[1]), split[2].lower()
    sample = found.samples.setdefault(key, TarSample(key))
    stem, _, last = extension.rpartition(".")
    if extension in ENDINGS:
        sample.images.append((member.offset, member.size))
        if member.size > MAX_IMAGE_BYTES:
            sample.problem = f"an image of {member.size} bytes, more than the {MAX_IMAGE_BYTES} allowed"
            return
        data = read()
        sample.crc32 = zlib.crc32(data)
        try:
            sample.phash = perceptual_hash(decode_image(data))
        except DecodeError as error:
            sample.problem = str(error)
    elif last in ENDINGS and any(c.isdigit() for c in stem):  # seg.png is a mask of the sample, as webdataset writes it
        sample.dotted.append(extension)
    elif extension in LABEL_EXTENSIONS:
        if extension in sample.labels:
            sample.problem = f"two members {extension}"
        elif member.size > MAX_LABEL_BYTES:
            sample.problem = f"its {extension} has {member.size} bytes"
        else:
            sample.labels[extension] = read()


def in_order(found: TarScan) -> Iterator[TarSample]:
    """The samples in the order of their images in the tar."""
    return iter(sorted(found.samples.values(), key=lambda sample: (sample.images[:1] or [(0, 0)], sample.key)))
