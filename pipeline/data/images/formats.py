"""The image formats that are read: the one list of their file endings and first bytes, for every command.

Pillow's other plugins stay closed: some start programs (EPS), most have had memory errors, and none is a format of photographs.
"""

from typing import NamedTuple


class ImageFormat(NamedTuple):
    """One format."""

    pillow: str
    """Pillow's name of it."""
    endings: tuple[str, ...]
    """Of file names, lower case without dot; the first is the one that we write."""
    starts: tuple[bytes, ...]
    """What a file begins with, one of these."""


JPEG = ImageFormat("JPEG", ("jpg", "jpeg", "jpe", "jfif"), (b"\xff\xd8",))
FORMATS = (
    JPEG,
    ImageFormat("PNG", ("png",), (b"\x89PNG",)),
    ImageFormat("WEBP", ("webp",), ()),  # told by two places, see `ending_of`
    ImageFormat("BMP", ("bmp",), (b"BM",)),
    ImageFormat("GIF", ("gif",), (b"GIF8",)),
    ImageFormat("TIFF", ("tif", "tiff"), (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
    ImageFormat("PPM", ("ppm", "pgm", "pbm", "pnm"), (b"P1", b"P2", b"P3", b"P4", b"P5", b"P6")),
    ImageFormat("JPEG2000", ("jp2", "j2k"), (b"\0\0\0\x0cjP  \r\n", b"\xff\x4f\xff\x51")),
    ImageFormat("AVIF", ("avif",), ()),
)
ENDINGS = tuple(ending for entry in FORMATS for ending in entry.endings)
"""Of the files that are taken for images, lower case without dot."""
PILLOW_FORMATS = tuple(entry.pillow for entry in FORMATS)

_OTHER_FILES = {
    b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive (.7z)",
    b"Rar!": "a RAR archive (.rar)",
    b"\x28\xb5\x2f\xfd": "a Zstandard file (.zst)",
    b"\x04\x22\x4d\x18": "an LZ4 file (.lz4)",
    b"\x1f\x9d": "a compress file (.Z)",
    b"LZIP": "an lzip file (.lz)",
    b"MSCF": "a cabinet archive (.cab)",
    b"PK\x03\x04": "a zip archive",
    b"PK\x05\x06": "a zip archive without members",
    b"\x1f\x8b": "a gzip file",
    b"BZh": "a bzip2 file",
    b"\xfd7zXZ": "an xz file",
    b"\x89HDF\r\n": "an HDF5 file",
    b"SQLite format 3": "an SQLite database",
    b"PAR1": "a parquet file",
    b"ARROW1": "an Arrow file",
    b"\x93NUMPY": "a NumPy array (.npy)",
    b"%PDF": "a PDF document",
    b"%!PS": "a PostScript file",
    b"8BPS": "a Photoshop file (.psd)",
    b"\0\0\x01\0": "an icon (.ico)",
    b"<svg": "an SVG drawing",
    b"<?xml": "an XML document",
    b"<!doctype html": "an HTML page",
    b"<html": "an HTML page",
    b"version https://git-lfs": "a pointer of Git LFS (run 'git lfs pull' where it comes from)",
}


def has_image_ending(name: str) -> bool:
    """Whether a file of this name is taken for an image."""
    return name.rpartition("/")[2].rpartition(".")[2].lower() in ENDINGS and "." in name


def ending_of(data: bytes) -> str | None:
    """The ending of the format that the first bytes of a file say; None where they say none of ours."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[4:12] in (b"ftypavif", b"ftypavis", b"ftypmif1", b"ftypmsf1"):
        return "avif"
    return next((entry.endings[0] for entry in FORMATS if data.startswith(entry.starts or (b"\0no start",))), None)


def other_file(data: bytes) -> str | None:
    """What a file is that is no image and no plain tar, by its first bytes, with its article; None: not known."""
    if data[4:8] == b"ftyp" and data[8:11] in (b"hei", b"hev", b"mif"):
        return "a HEIC image (.heic)"
    start = data[:64].lstrip().lower()
    return next(
        (what for magic, what in _OTHER_FILES.items() if data.startswith(magic) or start.startswith(magic)), None
    )
