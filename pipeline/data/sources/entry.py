"""What every source gives: entries without bytes, and a reader that brings the bytes in any order, in any process."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pipeline.data.format.boxes import ListedBoxes

IMAGES = "images"
"""The class of images whose pixels or boxes have classes."""
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
}


@dataclass(frozen=True, slots=True)
class ImageEntry:
    """A sample before its bytes are read. `locator` is whatever the source's reader needs."""

    split: str
    class_name: str
    key: str
    """Path below the class folder without extension; unique in (split, class) together with the extension."""
    extension: str
    """Lower case, without dot."""
    locator: Any
    size: int = -1
    """Bytes; -1 where the listing does not tell."""
    mask: Any = None
    """Locator of its mask, a PNG (`pipeline.data.format.masks`); None = it has none."""
    boxes: ListedBoxes | None = None
    """None = it has no list of them."""
    beside_name: str = ""
    """What the list calls the mask, and its bytes, or a digest of its boxes: what a fingerprint of the source sees of them."""

    @property
    def raw_name(self) -> str:
        return f"{self.class_name}/{self.key}.{self.extension}"


class Unreadable(Exception):
    """One image is not there or not to be had; the message is the reason. Counted like one that does not decode."""


class Reader(Protocol):
    """Bytes of entries. Can be sent to a worker process, and opens its files there."""

    def read(self, entries: Sequence[ImageEntry]) -> "Iterator[bytes | Unreadable]":
        """Bytes of the given entries, in order, one at a time."""


@dataclass(frozen=True)
class ImageSource:
    """What a source holds, and the way to its bytes."""

    entries: tuple[ImageEntry, ...]
    classes: tuple[str, ...]
    """In label order; empty where the source does not say: then the sorted names under train."""
    fingerprint: str
    """Changes when the source does (names and sizes, not every byte)."""
    note: str
    """What a reader of the dataset should know about how the source was taken; may be empty."""
    reader: Reader
    labels: tuple[str, ...] = ()
    """In order, where an image has several: the classes are then sets of them (`pipeline.data.format.label_sets`)."""
    masks: tuple[str, ...] = ()
    """Classes of pixels in order, where entries have masks."""
    boxes: tuple[str, ...] = ()
    """Classes of boxes in order, where entries have boxes."""

    @property
    def several(self) -> dict[str, tuple[str, ...]]:
        """What the manifest says besides the classes."""
        return {"labels": self.labels, "masks": self.masks, "boxes": self.boxes}
