"""Sources that come with an installed package: `glyphs`, scikit-learn's digits, and the sets that torchvision downloads."""

import hashlib
import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from pipeline import storage
from pipeline.data import glyphs
from pipeline.data.cards import Card
from pipeline.data.sources import Entry, Source
from pipeline.errors import UserError

GLYPHS_SEED = 0
DIGITS_TRAIN_SHARE = 1100 / 1797


def open_packaged(card: Card, source: str | None) -> Source:
    """The source of an embedded or torchvision card.

    Args:
        source: for torchvision, the local folder where the download lies or goes; None: ~/.cache/normfree/torchvision.
    Raises:
        UserError: no such set, or it is not there and cannot be downloaded.
    """
    if card.kind == "torchvision":
        return _torchvision(card, source)
    makers = {"digits": _digits, "glyphs": _glyphs}
    if card.member not in makers:
        raise UserError(f"the card '{card.name}' names an embedded set '{card.member}': choose {' or '.join(makers)}")
    return makers[card.member]()


def png_bytes(pixels: np.ndarray) -> bytes:
    """Pixels, (H, W) or (H, W, 3) uint8, as a PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _glyphs() -> Source:
    names = glyphs.class_names()
    counts = {"train": glyphs.NUM_TRAIN_PER_CLASS, "val": glyphs.NUM_VAL_PER_CLASS}
    entries = []
    for label, name in enumerate(names):
        index = 0
        for split, num in counts.items():  # one row of indices, so that no sample of val is one of train
            for _ in range(num):
                entries.append(Entry(split, name, f"{index:05d}", "png", (label, index)))
                index += 1

    def read(chosen: Sequence[Entry]) -> Iterator[bytes]:
        for entry in chosen:
            yield glyphs.render_png(GLYPHS_SEED, *entry.locator)

    return Source(tuple(entries), names, f"glyphs-{glyphs.VERSION}-{GLYPHS_SEED}", "", read)


def _digits() -> Source:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    by_hash = sorted(range(len(images)), key=lambda number: hashlib.sha256(f"digits/{number}".encode()).digest())
    entries = []
    for label in range(10):
        members = [number for number in by_hash if bunch.target[number] == label]
        num_train = round(DIGITS_TRAIN_SHARE * len(members))
        for rank, number in enumerate(members):
            split = "train" if rank < num_train else "val"
            entries.append(Entry(split, str(label), f"{number:04d}", "png", number))

    def read(chosen: Sequence[Entry]) -> Iterator[bytes]:
        for entry in chosen:
            yield png_bytes(images[entry.locator])

    fingerprint = hashlib.sha256(images.tobytes()).hexdigest()
    return Source(tuple(entries), tuple(str(label) for label in range(10)), fingerprint, "", read)


def _torchvision(card: Card, source: str | None) -> Source:
    """Sets that hold all pixels in `.data`, labels in `.targets` and names in `.classes` (the CIFAR family)."""
    import torchvision.datasets

    folder = storage.local_path(source or "~/.cache/normfree/torchvision")
    maker: Any = getattr(torchvision.datasets, str(card.member), None)
    if maker is None:
        raise UserError(f"the card '{card.name}' names '{card.member}', which torchvision.datasets does not have")
    try:
        sets = {split: maker(str(folder), train=split == "train", download=True) for split in ("train", "val")}
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"torchvision could not bring {card.member} to {folder} ({error}): "
            "this needs a network once; or give a folder that holds its download"
        ) from error
    classes = tuple(str(name).replace("/", "_") for name in sets["train"].classes)
    entries = [
        Entry(split, classes[label], f"{number:06d}", "png", (split, number))
        for split, images in sets.items()
        for number, label in enumerate(images.targets)
    ]

    def read(chosen: Sequence[Entry]) -> Iterator[bytes]:
        for entry in chosen:
            split, number = entry.locator
            yield png_bytes(np.asarray(sets[split].data[number]))

    num = "-".join(str(len(images.targets)) for images in sets.values())
    return Source(tuple(entries), classes, f"torchvision-{card.member}-{num}", "val is the published test split", read)
