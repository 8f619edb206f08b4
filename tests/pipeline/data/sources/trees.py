"""Small sets of images as folders and archives, for the tests of sources."""

import functools
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline import places
from pipeline.data.sources.cards import Card, load_card
from pipeline.data.sources.entry import Unreadable
from pipeline.data.sources.open_source import open_source

CARD = load_card("images")
TREE = [f"{split}/{name}/{number}.png" for split in ("train", "val") for name in ("ant", "bee") for number in range(2)]


@dataclass(frozen=True)
class RawSample:
    """One image as it was found; nothing has been decoded."""

    split: str
    class_name: str
    key: str
    """Path below the class folder without extension; unique in (split, class) together with the extension."""
    data: bytes
    extension: str
    """Lower case, without dot."""


def iterate(
    card: Card, source: str | None = None, *, val_share: float | None = None, allow_roots: Sequence[str] = ()
) -> Iterator[RawSample]:
    """All samples of a source; those that are not there are left out. UserError: see `open_source`."""
    with places.temporary_folder("source") as spool:
        opened = open_source(card, source, val_share=val_share, allow_roots=allow_roots, spool=spool)
        for entry, data in zip(opened.entries, opened.reader.read(opened.entries), strict=True):
            if not isinstance(data, Unreadable):
                yield RawSample(entry.split, entry.class_name, entry.key, data, entry.extension)


@functools.cache
def image_bytes(name: str, kind: str = "PNG") -> bytes:
    """An image of its own for each name."""
    noise = np.random.default_rng(list(name.encode("utf-8", "surrogateescape"))).integers(0, 255, (8, 8, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, kind)
    return buffer.getvalue()


def folder_of(root: Path, names: list[str]) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(image_bytes(name))
    return root


def found(source: Path | str, **options: object) -> list[str]:
    """`<split>/<class>/<key>.<extension>` of all images of a source, sorted; that each has its bytes is checked."""
    samples = list(iterate(CARD, str(source), **options))  # type: ignore[arg-type]
    assert all(sample.data for sample in samples)
    return sorted(f"{s.split}/{s.class_name}/{s.key}.{s.extension}" for s in samples)


def note(source: Path | str, **options: object) -> str:
    return open_source(CARD, str(source), **options).note  # type: ignore[arg-type]
