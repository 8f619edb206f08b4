"""Sources that come with an installed package: `glyphs` and what is drawn of them, scikit-learn's digits, and what
torchvision downloads."""

import hashlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline import places
from pipeline.data.format.boxes import ListedBoxes
from pipeline.data.format.label_sets import NONE, set_name
from pipeline.data.sources import glyph_sets, glyphs, shapes
from pipeline.data.sources.cards import Card
from pipeline.data.sources.entry import IMAGES, ImageEntry
from pipeline.errors import UserError
from pipeline.storage import objects

GLYPHS_SEED = 0
DIGITS_TRAIN_SHARE = 1100 / 1797


@dataclass(frozen=True)
class Packaged:
    """What a package holds of a set."""

    samples: tuple[tuple[str, str, str, Any], ...]
    """(split, class, key, locator) of each image."""
    classes: tuple[str, ...]
    """In label order; of a set with several labels an image the labels."""
    fingerprint: str
    """Changes when the images do."""
    note: str
    read: Callable[[Any], bytes]
    """PNG of the image at a locator."""
    boxes: Callable[[Any], ListedBoxes] | None = None
    """Of the image at a locator, in a set that has them."""


def open_packaged(card: Card, source: str | None) -> Packaged:
    """The source of an embedded or torchvision card.

    Args:
        source: for torchvision, the local folder where the download lies or goes; None: ~/.cache/normfree/torchvision.
    Raises:
        UserError: no such set, or it is not there and cannot be downloaded.
    """
    if card.kind == "torchvision":
        return _torchvision(card, source)
    makers = {"digits": _digits, "glyphs": _glyphs, "glyph_sets": _glyph_sets, "shapes": _shapes}
    if card.member not in makers:
        raise UserError(f"the card '{card.name}' names an embedded set '{card.member}': choose {' or '.join(makers)}")
    return makers[card.member]()


class PackagedReader:
    """PNG bytes of the entries of a packaged set; opens the set anew in each process."""

    def __init__(self, card: Card, source: str | None) -> None:
        self._card, self._source = card, source
        self._opened: Packaged | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_card": self._card, "_source": self._source, "_opened": None}

    def read(self, entries: Sequence[ImageEntry]) -> Iterator[bytes]:
        self._opened = self._opened or open_packaged(self._card, self._source)
        for entry in entries:
            yield self._opened.read(entry.locator)


def png_bytes(pixels: np.ndarray) -> bytes:
    """Pixels, (H, W) or (H, W, 3) uint8, as a PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _splits(counts: Mapping[str, int]) -> Iterator[tuple[int, str]]:
    """(number, split) of each drawn image: one row of numbers, so that no image of val is one of train."""
    return enumerate(split for split, num in counts.items() for _ in range(num))


def _glyphs() -> Packaged:
    names = glyphs.class_names()
    counts = {"train": glyphs.NUM_TRAIN_PER_CLASS, "val": glyphs.NUM_VAL_PER_CLASS}
    samples = tuple(
        (split, name, f"{index:05d}", (label, index))
        for label, name in enumerate(names)
        for index, split in _splits(counts)
    )

    def read(locator: tuple[int, int]) -> bytes:
        return png_bytes(glyphs.render(GLYPHS_SEED, *locator))

    return Packaged(samples, names, f"glyphs-{glyphs.VERSION}-{GLYPHS_SEED}", "", read)


def _glyph_sets() -> Packaged:
    samples = tuple(
        (split, set_name(glyph_sets.shown(index)), f"{index:05d}", index) for index, split in _splits(glyph_sets.COUNTS)
    )
    note = "; ".join(
        f"{sum(s == split and name == NONE for s, name, *_ in samples)} images of {split} have no label"
        for split in glyph_sets.COUNTS
    )

    def read(index: int) -> bytes:
        return png_bytes(glyph_sets.render(index))

    return Packaged(samples, glyph_sets.LABELS, f"glyph_sets-{glyph_sets.VERSION}", note, read)


def _shapes() -> Packaged:
    samples = tuple((split, IMAGES, f"{index:05d}", index) for index, split in _splits(shapes.COUNTS))

    def read(locator: int | tuple[int]) -> bytes:
        """The picture of a number, or in a tuple its mask."""
        pixels, mask, _ = shapes.render(locator[0] if isinstance(locator, tuple) else locator)
        return png_bytes(mask if isinstance(locator, tuple) else pixels)

    def boxes(number: int) -> ListedBoxes:
        return ListedBoxes.of(shapes.render(number)[2], f"shapes, picture {number}")

    return Packaged(samples, shapes.LABELS, f"shapes-{shapes.VERSION}", "", read, boxes)


def _digits() -> Packaged:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    by_hash = sorted(range(len(images)), key=lambda number: hashlib.sha256(f"digits/{number}".encode()).digest())
    samples: list[tuple[str, str, str, Any]] = []
    for label in range(10):
        members = [number for number in by_hash if bunch.target[number] == label]
        num_train = round(DIGITS_TRAIN_SHARE * len(members))
        for rank, number in enumerate(members):
            split = "train" if rank < num_train else "val"
            samples.append((split, str(label), f"{number:04d}", number))

    def read(number: int) -> bytes:
        return png_bytes(images[number])

    fingerprint = hashlib.sha256(images.tobytes()).hexdigest()
    return Packaged(tuple(samples), tuple(str(label) for label in range(10)), fingerprint, "", read)


def _torchvision(card: Card, source: str | None) -> Packaged:
    """Sets that hold all pixels in `.data`, labels in `.targets` and names in `.classes` (the CIFAR family)."""
    import torchvision.datasets

    folder = objects.local_path(source or places.cache_folder() / "torchvision")
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
    samples = [
        (split, classes[label], f"{number:06d}", (split, number))
        for split, images in sets.items()
        for number, label in enumerate(images.targets)
    ]

    def read(locator: tuple[str, int]) -> bytes:
        split, number = locator
        return png_bytes(np.asarray(sets[split].data[number]))

    num = "-".join(str(len(images.targets)) for images in sets.values())
    return Packaged(
        tuple(samples), classes, f"torchvision-{card.member}-{num}", "val is the published test split", read
    )
