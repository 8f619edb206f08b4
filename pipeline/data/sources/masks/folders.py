"""Images and masks in two trees of folders, in a folder, tar or zip, below any outer folders: as ADE20K and VOC are distributed.

    images/<split>/<name>.jpg          annotations/<split>/<name>.png              ADEChallengeData2016.zip
    JPEGImages/<name>.jpg              SegmentationClass/<name>.png                VOCtrainval_11-May-2012.tar
                                       ImageSets/Segmentation/<train, val>.txt     names, one a line

Every image of a split needs its mask. Masks without an image, and images that no list names, are left out and counted.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from pipeline import documents
from pipeline.data.images.formats import has_image_ending
from pipeline.data.sources.archives.find_files import list_files
from pipeline.data.sources.archives.locators import FoundFile
from pipeline.data.sources.archives.reader import FileReader
from pipeline.data.sources.entry import IMAGES, SPLIT_WORDS, ImageEntry, Unreadable
from pipeline.errors import UserError

VOC_LIST = re.compile(r"((?:.*/)?)ImageSets/Segmentation/(train|val)\.txt")
ADE_IMAGE = re.compile(r"((?:.*/)?)images/([^/]+)/([^/]+)")
WANTED = (
    "a folder, tar or zip with images/<split>/ and annotations/<split>/ as ADE20K's, or with JPEGImages/, SegmentationClass/ and "
    "ImageSets/Segmentation/train.txt as VOC's; or a CSV, TSV or JSONL list with path and mask"
)


def open_mask_folders(source: str, spool: Path | None = None) -> tuple[list[ImageEntry], str]:
    """All images of all splits with their masks, and a note.

    Raises:
        UserError: neither form, or several of one; an image without mask; a list with a name that is not there, with its line.
    """
    listing = list_files(source, spool)
    if listing is None:
        raise UserError(f"there is no source at {source}: give {WANTED}")
    files = {file.name: file for file in listing.files}
    entries = _of_lists(files, source) or _of_splits(files, source)
    if not entries:
        raise UserError(f"{source} has no masks in a form that is known: give {WANTED}")
    masks = {name for name in files if re.search(r"(^|/)(annotations/[^/]+|SegmentationClass)/[^/]+\.png$", name)}
    num_alone = len(masks) - len(entries)
    return entries, "; ".join(
        [*listing.notes, *([f"{num_alone} masks are of no split's images"] if num_alone > 0 else [])]
    )


def _of_lists(files: Mapping[str, FoundFile], source: str) -> list[ImageEntry]:
    """VOC's form."""
    found = [match for name in files if (match := VOC_LIST.fullmatch(name))]
    root = _only(sorted({match[1] for match in found}), source)
    entries: list[ImageEntry] = []
    splits: dict[str, str] = {}
    for match in found:
        for line, name in enumerate(_lines(files[match[0]], source), 1):
            where = f"{source}: {match[0]}, line {line}"
            if not documents.is_file_name(name):
                raise UserError(f"{where}: {documents.excerpt(name)!r} is no name of an image; write one name a line")
            if name in splits:
                raise UserError(f"{where}: {name} is in {splits[name]} already; an image is in one split, once")
            splits[name] = match[2]
            image = files.get(f"{root}JPEGImages/{name}.jpg")
            if image is None:
                raise UserError(f"{where}: there is no {root}JPEGImages/{name}.jpg; restore it")
            entries.append(_entry(match[2], image, files, f"{root}SegmentationClass/{name}.png", source))
    return entries


def _of_splits(files: Mapping[str, FoundFile], source: str) -> list[ImageEntry]:
    """ADE20K's form."""
    found = [
        match
        for name in files
        if (match := ADE_IMAGE.fullmatch(name)) and has_image_ending(name) and match[2] in SPLIT_WORDS
    ]
    root = _only(sorted({match[1] for match in found}), source)
    return [
        _entry(
            SPLIT_WORDS[match[2]],
            files[match[0]],
            files,
            f"{root}annotations/{match[2]}/{match[3].rpartition('.')[0]}.png",
            source,
        )
        for match in found
    ]


def _only(roots: list[str], source: str) -> str:
    if len(roots) > 1:
        shown = ", ".join(root or "." for root in roots[:3])
        raise UserError(f"{source} has several sets ({shown}); give the folder of one")
    return roots[0] if roots else ""


def _entry(split: str, image: FoundFile, files: Mapping[str, FoundFile], mask: str, source: str) -> ImageEntry:
    there = files.get(mask)
    if there is None:
        raise UserError(f"{source}: the image {image.name} has no mask {mask}; restore it, or remove the image")
    key, _, extension = image.name.rpartition("/")[2].rpartition(".")
    beside = f"{mask} {there.size}"
    return ImageEntry(
        split, IMAGES, key, extension.lower(), image.locator, image.size, there.locator, None, beside, there.size
    )


def _lines(file: FoundFile, source: str) -> list[str]:
    (data,) = FileReader().read([ImageEntry("train", IMAGES, file.name, "txt", file.locator)])
    if isinstance(data, Unreadable):
        raise UserError(f"{source}: {file.name} cannot be read ({data}); restore it")
    return documents.text_of(data, f"{source}: {file.name}", documents.MAX_BYTES, documents.REMEDY).split()
