"""Images that lie in folders of their classes, below folders of splits or not: which is which, and what is no answer.

    train/<class>/.../<file>, val/<class>/..., test/<class>/...     below any number of single outer folders
    <class>/.../<file>                                              all of one split

Folders that only look like splits (`training_set`, `seg_test`), splits below classes (`<class>/train/`), class folders that all
hold the same folders (a domain or a fold above its classes, images and their masks), a split without class folders and a
picture at another depth than the rest are refused: whichever way they were taken, the classes could be wrong.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pipeline import documents
from pipeline.data.format.tars import printable
from pipeline.data.images.formats import has_image_ending
from pipeline.data.sources.archives.locators import BROKEN_LINK, HIDDEN, SPECIAL, FoundFile, Listing, counts
from pipeline.data.sources.entry import ImageEntry
from pipeline.errors import UserError

_SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_ALIKE = {**_SPLITS, "trn": "train", "dev": "val", "testing": "test", "tst": "test"}
_FILLERS = frozenset(
    {"set", "sets", "split", "data", "dataset", "image", "images", "img", "imgs", "seg", "pictures", "photos"}
)
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_GLUED = re.compile(rf"({'|'.join(sorted(_ALIKE, key=len, reverse=True))})(sets?|data|images?|imgs?)")


class _Image(NamedTuple):
    parts: tuple[str, ...]
    """Of the path, without the outer folders that hold everything."""
    file: FoundFile


class Arranged(NamedTuple):
    """What class folders hold."""

    entries: list[ImageEntry]
    notes: list[str]
    """What was guessed and what was skipped."""


def arrange(listing: Listing, source: str, alone: str = "train", wanted: Sequence[str] | None = None) -> Arranged:
    """The images of a listing by their place in the tree; other files and hidden ones are skipped and counted.

    Args:
        alone: split of all images where there are no split folders.
        wanted: folders of other splits than these are skipped, whatever is in them; None: all are taken.
    Raises:
        UserError: no images, folders that look like splits and are none, folders below classes that may be splits or classes,
            an image at another depth than class folders, an empty class folder, or one without images.
    """
    found = [file for file in listing.files if has_image_ending(file.name)]
    if not found:
        raise UserError(
            f"the source {source} has no images: no file of {len(listing.files):,} ends with .jpg, .png or the like"
            + _what_was_skipped(listing)
        )
    images, depth = _without_outer_folders(found)
    tops = sorted({image.parts[0] for image in images if len(image.parts) > 1})
    level = 2 if _has_splits(images, tops, source) else 1
    notes = [*listing.notes]
    if level == 2:
        _refuse_odd_splits(tops, source)
        kept = [image for image in images if len(image.parts) == 1 or _is_wanted(image.parts[0], wanted)]
        if len(kept) < len(images):
            notes.append(f"{len(images) - len(kept)} images of other splits were not looked at")
        images = kept
    _refuse_other_depths(images, level, source)
    _refuse_bare_classes(listing, images, depth, level, wanted, source)
    _refuse_other_order(images, level, source)
    if level == 1:
        notes += [
            f"the folder {documents.excerpt(top)} was taken for a class" for top in tops if top.lower() in _SPLITS
        ]
        if alone == "train":
            notes.append("the source has no split folders, so every image is train unless val_share is given")
    num_deeper = sum(len(image.parts) > level + 1 for image in images)
    if num_deeper:
        notes.append(
            f"{num_deeper} images lie in folders below their class folder: the upper folder's name is the class"
        )
    notes += _skipped(listing, len(listing.files) - len(found))
    return Arranged([_entry(image, level, alone) for image in images], notes)


def _entry(image: _Image, level: int, alone: str) -> ImageEntry:
    """`level`: folders above an image that say its split, if any does, and its class."""
    split = _SPLITS[image.parts[0].lower()] if level == 2 else alone
    key, _, extension = "/".join(image.parts[level:]).rpartition(".")
    return ImageEntry(
        split, printable(image.parts[level - 1]), key, extension.lower(), image.file.locator, image.file.size
    )


def _without_outer_folders(files: Sequence[FoundFile]) -> tuple[list[_Image], int]:
    """The images without the folders that hold everything (as in `my-images/train/...`), and how many those are."""
    paths = [tuple(file.name.split("/")) for file in files]
    depth = 0
    while len({path[depth] for path in paths}) == 1 and all(len(path) > depth + 2 for path in paths):
        if paths[0][depth].lower() in _SPLITS:
            break
        depth += 1
    return [_Image(path[depth:], file) for path, file in zip(paths, files, strict=True)], depth


def _has_splits(images: Sequence[_Image], tops: Sequence[str], source: str) -> bool:
    """Whether the upper folders are splits; UserError where they may be splits or classes."""
    exact = [top for top in tops if top.lower() in _SPLITS]
    train = [top for top in exact if _SPLITS[top.lower()] == "train"]
    if exact and (len(exact) == len(tops) or (train and all(len(image.parts) > 2 for image in images))):
        return True
    alike = sorted({*exact, *_alike(tops)})
    # One class may be a train among animals and cars; two names of splits, or one that is most of what there is, are no accident.
    is_class = alike == train and len(alike) == 1 and len(tops) > 2 and all(len(image.parts) == 2 for image in images)
    if alike and not is_class:
        raise UserError(
            f"{source} has folders that look like splits and are not called so ({', '.join(map(documents.excerpt, alike[:4]))}): "
            "call them train, val and test, with class folders in each and nothing else"
        )
    return False


def _is_wanted(top: str, wanted: Sequence[str] | None) -> bool:
    split = _SPLITS.get(top.lower())
    return split is not None and (wanted is None or split in wanted)


def _alike(tops: Sequence[str]) -> list[str]:
    """Names that say train, val or test in other words: by themselves, or because another differs in that word alone."""
    read = {top: _split_word(top) for top in tops}
    kinds: dict[frozenset[str], set[str]] = {}
    for word, rest in filter(None, read.values()):
        kinds.setdefault(rest, set()).add(word)
    return [top for top, found in read.items() if found and (not found[1] or len(kinds[found[1]]) > 1)]


def _split_word(name: str) -> tuple[str, frozenset[str]] | None:
    """(split, the other words without those that say nothing) of a folder's name with one word for a split."""
    words = []
    for word in _WORD.findall(name):
        glued = _GLUED.fullmatch(word.lower())
        words.append(glued[1] if glued else word.lower())
    splits = [word for word in words if word in _ALIKE]
    return (_ALIKE[splits[0]], frozenset(words) - {splits[0]} - _FILLERS) if len(splits) == 1 else None


def _refuse_odd_splits(tops: Sequence[str], source: str) -> None:
    odd = [top for top in tops if top.lower() not in _SPLITS]
    if odd:
        raise UserError(
            f"{source} has {', '.join(map(documents.excerpt, odd[:3]))} next to train: "
            "name the folders train, val and test, or remove others"
        )
    twice = Counter(_SPLITS[top.lower()] for top in tops)
    if max(twice.values()) > 1:
        raise UserError(
            f"{source} has two folders for one split ({', '.join(map(documents.excerpt, tops))}): keep one of them"
        )


def _refuse_other_depths(images: Sequence[_Image], level: int, source: str) -> None:
    outside = [image for image in images if len(image.parts) <= level]
    if not outside:
        return
    name = documents.excerpt("/".join(outside[0].parts))
    others = f" and {len(outside) - 1} more" if len(outside) > 1 else ""
    advice = "<split>/<class>/<file> is needed" if level == 2 else "<class>/<file> or <split>/<class>/<file> is needed"
    if level == 2 and len(outside[0].parts) == 2 and len(outside) > 1:
        folder = documents.excerpt(outside[0].parts[0])
        advice += f"; if {folder} has no labels, remove it or name the other splits with --splits"
    raise UserError(f"{source} has an image outside the class folders ({name}{others}): {advice}")


def _refuse_other_order(images: Sequence[_Image], level: int, source: str) -> None:
    """Folders below the class folders that may be what tells splits, or the classes themselves."""
    below: dict[tuple[str, ...], set[str]] = {}
    for image in images:
        below.setdefault(image.parts[:level], set()).add("/".join(image.parts[level:-1]))
    for folder, names in sorted(below.items()):
        if any(part.lower() in _SPLITS for name in names for part in name.split("/")):
            raise UserError(
                f"{source} has splits below a class folder ({documents.excerpt('/'.join(folder))} holds "
                f"{', '.join(documents.excerpt(name) for name in sorted(names)[:3])}): <split>/<class>/<file> is needed"
            )
    for split in sorted({folder[:-1] for folder in below}):
        inside = {folder[-1]: names for folder, names in below.items() if folder[:-1] == split}
        same = next(iter(inside.values()))
        if len(inside) > 1 and len(same) > 1 and "" not in same and all(names == same for names in inside.values()):
            uppers, lowers = (", ".join(map(documents.excerpt, sorted(names)[:3])) for names in (inside, same))
            raise UserError(
                f"{source} has the same folders ({lowers}) in each of its folders ({uppers}), so that either may be the classes: "
                "<class>/<file> or <split>/<class>/<file> is needed, or a CSV file with path and label"
            )


def _refuse_bare_classes(
    listing: Listing,
    images: Sequence[_Image],
    depth: int,
    level: int,
    wanted: Sequence[str] | None,
    source: str,
) -> None:
    """A class folder that holds files but no image, or nothing at all, is a mistake, not a class fewer."""
    empty = listing.empty_folders()
    if empty:
        raise UserError(
            f"the source {source} has an empty folder ({documents.excerpt(empty[0])}): add its images, or remove it"
            + _what_was_skipped(listing)
        )
    filled = {image.parts[:level] for image in images}
    for file in listing.files:
        parts = tuple(file.name.split("/")[depth:])
        is_class = len(parts) > level and (level == 1 or _is_wanted(parts[0], wanted))
        if is_class and parts[:level] not in filled:
            folder = documents.excerpt("/".join(parts[:level]))
            raise UserError(f"the source {source} has no image in the class folder {folder}: add images, or remove it")


def _skipped(listing: Listing, num_no_images: int) -> list[str]:
    notes: list[str] = []
    num_hidden = listing.skipped[HIDDEN]
    if num_hidden or num_no_images:
        notes.append(
            f"{num_hidden + num_no_images} files that are hidden or no images were skipped "
            f"({', '.join(_kinds(num_hidden, _endings(listing)))})"
        )
    others = counts(listing.skipped, (BROKEN_LINK, SPECIAL))
    if others:
        notes.append(f"{others} were skipped")
    return notes


def _endings(listing: Listing) -> Mapping[str, int]:
    names = (file.name.rpartition("/")[2] for file in listing.files if not has_image_ending(file.name))
    return Counter(f".{name.rpartition('.')[2][:20]}" if "." in name else "without ending" for name in names)


def _kinds(num_hidden: int, endings: Mapping[str, int]) -> list[str]:
    kinds = [f"{num_hidden} hidden"] if num_hidden else []
    by_number = sorted(endings.items(), key=lambda found: (-found[1], found[0]))
    kinds += [f"{num} {documents.excerpt(ending)}" for ending, num in by_number[:4]]
    return kinds + (["and others"] if len(endings) > 4 else [])


def _what_was_skipped(listing: Listing) -> str:
    others = counts(listing.skipped, (HIDDEN, BROKEN_LINK, SPECIAL))
    return f" (skipped: {others})" if others else ""
