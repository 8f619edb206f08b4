"""What a listing of a folder or archive says: files, where their bytes are, and what was skipped."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

HIDDEN = "hidden files"
BROKEN_LINK = "links that lead nowhere or out of the archive"
SPECIAL = "devices, pipes and other special files"
LOCAL_HEADER_BYTES = 30  # of a zip's member, before its name
_JUNK = frozenset(
    {
        "__macosx", "@eadir", "#recycle", "@recycle", "@tmp", "$recycle.bin", "system volume information", "lost+found",
        "__pycache__", "thumbs.db", "desktop.ini", "ehthumbs.db", "cvs",
    }
)  # fmt: skip


class Whole(NamedTuple):
    """A file or object of its own."""

    url: str


class Range(NamedTuple):
    """Bytes inside a file: a member of a tar."""

    url: str
    offset: int
    size: int


class Sparse(NamedTuple):
    """A member of a tar of which only parts are stored; the rest is zeros."""

    url: str
    offset: int
    size: int
    parts: tuple[tuple[int, int], ...]
    """(place in the file, bytes) of each stored part, in order; they lie one behind the other from `offset` on."""


class Zipped(NamedTuple):
    """A member of a zip."""

    url: str
    header: int
    packed_size: int
    size: int
    method: int
    crc: int


class Refused(NamedTuple):
    """A file that is named but not to be read, and why."""

    reason: str


Locator = Whole | Range | Sparse | Zipped | Refused


class FoundFile(NamedTuple):
    """A regular file inside a source."""

    name: str
    """Path inside the source, with `/`."""
    size: int
    """Bytes; -1 where the listing does not tell."""
    locator: Locator


@dataclass
class Listing:
    """The visible regular files of a source, in the order of the archive or of names."""

    files: list[FoundFile] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    """How many members were not taken, by what they are."""
    folders: set[str] = field(default_factory=set)
    """Folders that are known to be there, with whatever is in them."""
    notes: list[str] = field(default_factory=list)
    """How names and links were read."""

    def skip(self, name: str, what: str) -> None:
        self.skipped[what] += 1
        self.folders.add(visible_part(name.rpartition("/")[0]))

    def empty_folders(self) -> list[str]:
        """Folders in which no visible file lies at any depth, sorted."""
        filled: set[str] = set()
        for file in self.files:
            folder = file.name.rpartition("/")[0]
            while folder and folder not in filled:
                filled.add(folder)
                folder = folder.rpartition("/")[0]
        return sorted(self.folders - filled - {""})


def is_hidden(name: str) -> bool:
    """Whether a path is what people do not see: below a name with a dot in front, or what an operating system leaves."""
    return any(_is_junk(part) for part in name.split("/"))


def visible_part(folder: str) -> str:
    """A path up to, and without, the first hidden folder in it."""
    kept: list[str] = []
    for part in folder.split("/"):
        if _is_junk(part):
            break
        kept.append(part)
    return "/".join(kept)


def _is_junk(part: str) -> bool:
    return (part.startswith(".") and part not in (".", "..")) or part.lower() in _JUNK


def counts(skipped: Counter[str], of: Iterable[str]) -> str:
    """ "3 links that lead nowhere, 1 device" of the kinds that were met."""
    return ", ".join(f"{skipped[what]} {what}" for what in of if skipped[what])
