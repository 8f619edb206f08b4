"""What every source gives: entries without bytes, and a reader that brings the bytes in any order, in any process."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


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
