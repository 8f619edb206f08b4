"""What every source gives: entries without bytes, and a reader that brings the bytes in any order, in any process."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pipeline.data.format.boxes import ListedBoxes
from pipeline.errors import UserError

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
_NOT_TRAINED_ON = {"eval", "evaluation", "holdout", "heldout", "held", "query", "gallery", "unlabeled", "unlabelled"}


def splits_of_names(names: Iterable[str], remedy: str) -> dict[str, str | None]:
    """The splits of files, by the words in their names or in their folders'; None for all where no name says one.

    Raises:
        UserError: words of two splits in one name, or one like trainval, which is two or none; names that say a split next to
            some that say none, or say that the set is not trained on; with the remedy.
    """
    found = {name: _split_of_name(name, remedy) for name in names}
    odd = [name for name, split in found.items() if split is None]
    held_out = [name for name in odd if not _NOT_TRAINED_ON.isdisjoint(_words(name))]
    if odd and (held_out or len(odd) < len(found)):
        raise UserError(f"it is not clear which split {(held_out or odd)[0]} belongs to: {remedy}")
    return found


def _split_of_name(name: str, remedy: str) -> str | None:
    for part in reversed(name.split("/")):
        words = _words(part)
        splits = {SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS}
        mixed = [
            word for word in words if word not in SPLIT_WORDS and sum(s in word for s in ("train", "val", "test")) > 1
        ]
        if len(splits) > 1 or mixed:
            raise UserError(f"the name {name} is of more than one split: {remedy}")
        if splits:
            return splits.pop()
    return None


def _words(name: str) -> list[str]:
    return [word.lower() for word in re.findall("[A-Z]?[a-z]+|[A-Z]+", name)]


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
    mask_size: int = -1
    """Bytes; -1 where the listing does not tell."""

    @property
    def raw_name(self) -> str:
        return f"{self.class_name}/{self.key}.{self.extension}"

    @property
    def beside_mark(self) -> str:
        """For digests. Nothing without masks or boxes: those of such sources stay what they were."""
        return f"\0{self.beside_name}" if self.beside_name else ""


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
