"""The files inside a folder, a tar or a zip, local or in a store: listed, to be read in place in any order.

Nothing is ever extracted by a member's name. A compressed tar cannot be read from the middle: it is unpacked once, as one
plain tar, into the spool folder.
"""

import os
import stat
from pathlib import Path

from pipeline import documents
from pipeline.data.images.formats import ending_of, other_file
from pipeline.data.sources.archives.locators import BROKEN_LINK, HIDDEN, SPECIAL, FoundFile, Listing, Whole, is_hidden
from pipeline.data.sources.archives.tar_files import list_tar
from pipeline.data.sources.archives.unpack import MAGICS, unpacked
from pipeline.data.sources.archives.zip_files import list_zip
from pipeline.errors import UserError
from pipeline.storage import objects


def list_files(source: str, spool: Path | None = None) -> Listing | None:
    """All visible regular files of a folder, tar or zip; None: nothing is at `source`.

    Links are followed: of a folder wherever they lead, in an archive to other members.

    Args:
        spool: local folder for the plain form of a compressed tar; it is left there, whole, for the next time.
    Raises:
        UserError: a file that is no whole tar or zip, or an archive with members outside itself.
    """
    if is_folder(source):
        return _list_local(source) if objects.is_local(source) else _list_prefix(source)
    if not objects.is_file(source):
        return None
    with objects.open_read(source) as file:
        start = file.read(64)
    if start.startswith(b"PK\x03\x04"):
        return list_zip(source)
    if start[:2] in MAGICS:
        return list_tar(unpacked(source, start[:2], spool))
    what = other_file(start) or (f"one image ({ending_of(start)})" if ending_of(start) else None)
    if what:
        raise UserError(
            f"the source {source} is {what}, which is not read: give a folder, a tar or a zip of the images"
        )
    return list_tar(source)


def compression(source: str) -> bytes | None:
    """The first bytes of a compressed tar, as `unpacked` wants them; None where `source` is none."""
    if not objects.is_file(source):
        return None
    with objects.open_read(source) as file:
        start = file.read(2)
    return start if start in MAGICS else None


def is_folder(source: str) -> bool:
    """Whether `source` is a folder; in a store, which has none, whether it is no object."""
    if objects.is_local(source):
        return objects.local_path(source).is_dir()
    return not objects.is_file(source)


def _list_prefix(source: str) -> Listing:
    found = Listing()
    root = objects.join(source) + "/"
    for url in objects.list_urls(source):
        name = url.removeprefix(root)
        if is_hidden(name):
            found.skip(name, HIDDEN)
        elif not name.endswith("/"):  # the mark of a folder, which some consoles write
            found.files.append(FoundFile(name, -1, Whole(url)))
    return found


def _list_local(source: str) -> Listing:
    """Files of a folder and of what its links lead to, in the order of their paths."""
    found = Listing()
    root = objects.local_path(source)
    inside = os.path.realpath(root) + os.sep
    num_outside = 0
    first = os.stat(root)
    pending: list[tuple[str, str, tuple[tuple[int, int], ...]]] = [(str(root), "", ((first.st_dev, first.st_ino),))]
    while pending:
        path, name, above = pending.pop()
        for entry in _entries(path, source):
            at = f"{name}/{entry.name}" if name else entry.name
            if is_hidden(entry.name):
                found.skipped[HIDDEN] += _num_files(entry)
                continue
            try:
                status = os.stat(entry.path)
            except OSError:  # broken, in a circle, or gone since
                found.skip(at, BROKEN_LINK)
                continue
            place = (status.st_dev, status.st_ino)
            if stat.S_ISDIR(status.st_mode) and place not in above:
                found.folders.add(at)
                pending.append((entry.path, at, (*above, place)))
            elif stat.S_ISREG(status.st_mode):
                found.files.append(FoundFile(at, status.st_size, Whole(entry.path)))
            else:
                found.skip(at, BROKEN_LINK if stat.S_ISDIR(status.st_mode) else SPECIAL)
            if entry.is_symlink():
                num_outside += not os.path.realpath(entry.path).startswith(inside)
    if num_outside:
        found.notes.append(f"{num_outside} links that lead out of the source were followed")
    found.files.sort(key=lambda file: file.locator)
    return found


def _num_files(entry: os.DirEntry[str]) -> int:
    """In a hidden folder, as archives and stores count them; 1 for a file."""
    if not entry.is_dir(follow_symlinks=False):
        return 1
    return sum(len(names) for _, _, names in os.walk(entry.path))


def _entries(path: str, source: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except OSError as error:
        raise UserError(
            f"the source {source} has a folder that cannot be read ({documents.excerpt(path, 200)}: {error.strerror}): "
            "give this account the right to read it, or remove it"
        ) from error
