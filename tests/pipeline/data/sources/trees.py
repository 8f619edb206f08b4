"""Small sets of images as folders and archives, for the tests of sources."""

import functools
import io
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.data.sources.cards import load_card
from pipeline.data.sources.open_source import iterate, open_source

CARD = load_card("images")
TREE = [f"{split}/{name}/{number}.png" for split in ("train", "val") for name in ("ant", "bee") for number in range(2)]


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
