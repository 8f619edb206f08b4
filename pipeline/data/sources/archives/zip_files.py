"""The files of a zip, from its directory: nothing is unpacked by it."""

import contextlib
import itertools
import posixpath
import stat
import struct
import zipfile
import zlib

from pipeline import documents
from pipeline.data.sources.archives.links import add_links, target_of
from pipeline.data.sources.archives.locators import (
    HIDDEN,
    LOCAL_HEADER_BYTES,
    SPECIAL,
    FoundFile,
    Listing,
    Zipped,
    is_hidden,
)
from pipeline.errors import UserError
from pipeline.storage import objects

_UTF8_NAMES, _ENCRYPTED = 0x800, 1
_MAX_LINK_BYTES = 4096


def list_zip(source: str) -> Listing:
    """The files of a zip.

    Raises:
        UserError: no whole zip, one whose directory contradicts the file, or one with members outside itself.
    """
    found = Listing()
    links: dict[str, str] = {}
    num_guessed = num_code_page = 0
    try:
        total = objects.size_bytes(source)
        with objects.open_read(source) as file, zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                name, encoding = _name_of(info, source)
                num_guessed += encoding == "utf-8"
                num_code_page += encoding == "cp437"
                _check(info, name, source, total)
                kind = stat.S_IFMT(info.external_attr >> 16)
                if info.is_dir() or kind == stat.S_IFDIR:
                    continue
                if is_hidden(name):
                    found.skip(name, HIDDEN)
                elif kind == stat.S_IFLNK and info.file_size <= _MAX_LINK_BYTES:
                    links[name] = target_of(name, archive.read(info).decode("utf-8", "surrogateescape"))
                elif kind in (0, stat.S_IFREG):
                    place = Zipped(
                        source, info.header_offset, info.compress_size, info.file_size, info.compress_type, info.CRC
                    )
                    found.files.append(FoundFile(name, info.file_size, place))
                else:
                    found.skip(name, SPECIAL)
    except UserError:
        raise
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        zlib.error,
        struct.error,
        EOFError,
        ValueError,
        ArithmeticError,
        LookupError,
    ) as error:
        raise UserError(
            f"the source {source} is no readable zip, or is cut short ({documents.excerpt(str(error), 200)}): fetch it again"
        ) from error
    _refuse_overlaps(found, source)
    add_links(found, links, source)
    if num_guessed:
        found.notes.append(
            f"{num_guessed} names in the zip are not marked as UTF-8 but are UTF-8, and were read as that"
        )
    if num_code_page:
        found.notes.append(
            f"{num_code_page} names in the zip are not UTF-8 and do not say what they are; they were read as code page 437, the "
            "zip format's default: look at the class names"
        )
    return found


def _name_of(info: zipfile.ZipInfo, source: str) -> tuple[str, str]:
    """The normalised name of a member, and what encoding was guessed ("" where it is known)."""
    text, guessed = info.filename, ""
    if not info.flag_bits & _UTF8_NAMES and not text.isascii():
        guessed = "cp437"
        with contextlib.suppress(UnicodeError):  # what is no UTF-8 stays code page 437, the format's default
            text, guessed = text.encode("cp437").decode("utf-8"), "utf-8"
    name = posixpath.normpath(text.replace("\\", "/"))
    if name.startswith(("/", "../")) or name == ".." or text[1:2] == ":" or "\0" in text:
        raise UserError(
            f"the source {source} has a member outside itself ({documents.excerpt(text, 200)!r}): do not trust it"
        )
    return name, guessed


def _check(info: zipfile.ZipInfo, name: str, source: str, total: int) -> None:
    shown = documents.excerpt(name, 200)
    if info.flag_bits & _ENCRYPTED or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UserError(f"the source {source} has an encrypted or unusually packed member ({shown}): pack it plainly")
    if info.header_offset < 0 or info.header_offset + LOCAL_HEADER_BYTES + info.compress_size > total:
        raise UserError(
            f"the source {source} is no readable zip, or is cut short ({shown} would end behind the file): fetch it again"
        )


def _refuse_overlaps(found: Listing, source: str) -> None:
    """Members that share their bytes make terabytes of kilobytes; no program writes such a zip."""
    places = sorted(
        (file.locator.header, file.locator.packed_size) for file in found.files if isinstance(file.locator, Zipped)
    )
    for (start, size), (following, _) in itertools.pairwise(places):
        if start + size > following:
            raise UserError(f"the source {source} has members that lie on each other, as zip bombs do: do not trust it")
