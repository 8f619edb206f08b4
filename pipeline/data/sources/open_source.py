"""Raw images as they are found in the world -> samples with a split, a class and a key, in one deterministic order.

    folder, tar (plain or compressed), zip     `<split>/<class>/.../<file>`, below any number of single outer folders
    folder with ILSVRC2012_img_train.tar       ImageNet as distributed (`pipeline.data.sources.imagenet`)
    .csv, .tsv, .jsonl                         columns path, label and optionally split (`pipeline.data.sources.csv_jsonl`)
    .parquet, or a folder of them              image bytes and labels (`pipeline.data.sources.parquet`)

Without splits all images are `train`, or `val_share` of each class goes to val by a hash of the path. Nothing is ever
extracted: members of an archive are read in place, and only regular files count.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline import places
from pipeline.data.format.tars import printable
from pipeline.data.images.formats import has_image_ending
from pipeline.data.sources import imagenet
from pipeline.data.sources.archives import FoundFile, empty_folders, list_files
from pipeline.data.sources.builtin import PackagedReader, open_packaged
from pipeline.data.sources.cards import Card
from pipeline.data.sources.csv_jsonl import is_list, label_order, open_list
from pipeline.data.sources.entry import Entry, Source, Unreadable
from pipeline.data.sources.file_reader import FileReader
from pipeline.data.sources.parquet import is_parquet, open_parquet
from pipeline.errors import UserError

_SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}

SpoolProgress = Callable[[int, int], None]
"""Called as progress(done, total) in files while a source is copied to the spool."""


@dataclass(frozen=True)
class RawSample:
    """One image as it was found; nothing has been decoded."""

    split: str
    class_name: str
    key: str
    """Path below the class folder without extension; unique in (split, class) together with the extension."""
    data: bytes
    extension: str
    """Lower case, without dot."""


def iterate(card: Card, source: str | None = None, *, val_share: float | None = None) -> Iterator[RawSample]:
    """All samples of a source; those that are not there are left out. UserError: see `open_source`."""
    with places.temporary_folder("source") as spool:
        opened = open_source(card, source, val_share=val_share, spool=spool)
        for entry, data in zip(opened.entries, opened.reader.read(opened.entries), strict=True):
            if not isinstance(data, Unreadable):
                yield RawSample(entry.split, entry.class_name, entry.key, data, entry.extension)


def open_source(
    card: Card,
    source: str | None = None,
    *,
    val_share: float | None = None,
    spool: Path | None = None,
    progress: SpoolProgress | None = None,
) -> Source:
    """List a source without decoding anything.

    Args:
        source: path or URL; the download folder of a torchvision set; not for embedded sets.
        val_share: share of each class (0 < share < 1) to hold out as val where the source has no splits.
        spool: local folder for what cannot be read in place: compressed tars and parquet. It must stay while the
            source is read, and is used again by the next call.
    Raises:
        UserError: the source is missing, empty, damaged, has no images, has other classes than the card says, has a
            class in val or test that train does not have, or `val_share` although it has splits already.
    """
    if val_share is not None and not 0 < val_share < 1:
        raise UserError(f"val_share {val_share} must be between 0 and 1, for example 0.1")
    if card.kind == "embedded" and source is not None:
        raise UserError(f"the set '{card.name}' needs no source ({card.source_hint}): leave out {source}")
    if card.kind in ("embedded", "torchvision"):
        opened = _open_packaged(card, source)
        if val_share is not None:
            raise UserError(
                f"the set '{card.name}' has the splits {_names(opened.entries)} already: leave out val_share"
            )
    else:
        opened = _open_given(card, source, val_share, spool, progress)
    return replace(opened, classes=_check_classes(card, opened, source))


def _open_packaged(card: Card, source: str | None) -> Source:
    packaged = open_packaged(card, source)
    entries = tuple(Entry(split, name, key, "png", locator) for split, name, key, locator in packaged.samples)
    return Source(entries, packaged.classes, packaged.fingerprint, packaged.note, PackagedReader(card, source))


def _names(entries: Sequence[Entry]) -> str:
    return ", ".join(sorted({entry.split for entry in entries}))


def _check_classes(card: Card, opened: Source, source: str | None) -> tuple[str, ...]:
    """The classes in label order, once it is certain that source and card are about the same ones."""
    where = source or card.name
    by_split: dict[str, set[str]] = {}
    for entry in opened.entries:
        by_split.setdefault(entry.split, set()).add(entry.class_name)
    if "train" not in by_split and not card.tests_only:
        raise UserError(f"{where} has no train split, only {_names(opened.entries)}: add a folder train/<class>/")
    known = set(card.classes if card.indexed and card.classes else opened.classes or by_split["train"])
    place = f"the card {card.name}" if card.indexed else "train"
    for split, names in sorted(by_split.items()):
        unknown = sorted(names - known)
        if unknown:
            raise UserError(
                f"{where}: {len(unknown)} classes of {split} are not in {place} ({', '.join(unknown[:3])}): "
                "give them train images or remove them"
            )
    if card.classes is not None and known != set(card.classes):
        odd = sorted(known ^ set(card.classes))
        raise UserError(
            f"{where} and the card '{card.name}' differ in classes: {', '.join(odd[:3])}; is it the right source?"
        )
    if card.num_classes is not None and len(known) != card.num_classes:
        raise UserError(
            f"{where} has {len(known)} classes, the card '{card.name}' says {card.num_classes}: is it the right source?"
        )
    if len(known) < 2:
        raise UserError(
            f"{where} has one class only ({', '.join(known)}): a classifier needs at least two class folders"
        )
    return card.classes or opened.classes or tuple(sorted(known))


def _open_given(
    card: Card, source: str | None, val_share: float | None, spool: Path | None, progress: SpoolProgress | None
) -> Source:
    """A source that the user names, in whatever form it is."""
    if source is None:
        raise UserError(f"the set '{card.name}' needs a source: {card.source_hint}")
    classes: tuple[str, ...] = ()
    if is_list(source):
        entries, note = open_list(source), ""
        if all(entry.class_name.isdecimal() for entry in entries):
            classes = label_order({entry.class_name for entry in entries if entry.split == "train"})
    elif is_parquet(source):
        entries, classes, note = open_parquet(source, spool, progress)
        if not classes and all(entry.class_name.isdecimal() for entry in entries):
            classes = label_order({entry.class_name for entry in entries if entry.split == "train"})
    elif imagenet.is_distributed(source):
        entries, note = imagenet.open_distributed(source)
    else:
        entries, note = _open_tree(card, source, spool)
    fingerprint = _fingerprint(entries)
    if val_share is not None:
        if {entry.split for entry in entries} != {"train"}:
            raise UserError(f"{source} has the splits {_names(entries)} already: leave out val_share")
        entries = _hold_out(entries, val_share)
        note = f"{val_share:g} of each class was held out as val by a hash of the path; {note}".rstrip("; ")
    return Source(tuple(entries), classes, fingerprint, note, FileReader(tolerant=is_list(source)))


def _open_tree(card: Card, source: str, spool: Path | None) -> tuple[list[Entry], str]:
    """Class folders in a folder or an archive."""
    files = list_files(source, spool)
    if files is None:
        raise UserError(f"there is no source at {source}: give {card.source_hint}")
    if not files:
        raise UserError(f"the source {source} is missing or empty: give {card.source_hint}")
    empty = [name for name in empty_folders(source) if not name.rpartition("/")[2].startswith(".")]
    if empty:
        raise UserError(
            f"the source {source} has an empty folder ({printable(empty[0])}): add its images, or remove it"
        )
    entries, note = _arrange(files, source, card.test_split if card.tests_only else "train")
    # As an archive that was added to is unpacked: the later file of a name replaces the earlier one.
    last = {(entry.split, entry.class_name, entry.key, entry.extension): entry for entry in entries}
    if len(last) < len(entries):
        repeated = f"{len(entries) - len(last)} files were replaced by later ones of the same name in the archive"
        note = "; ".join(filter(None, [note, repeated]))
    return list(last.values()), note


def _arrange(files: Sequence[FoundFile], source: str, alone: str = "train") -> tuple[list[Entry], str]:
    """Files -> entries by their place in the tree; files that are no images, and hidden ones, are left out.

    Without split folders every image belongs to the split `alone`.
    """
    images = [(name.split("/"), size, locator) for name, size, locator in files if _is_image(name)]
    if not images:
        raise UserError(f"the source {source} has no images: {len(files)} files, none ends with .jpg, .png or the like")
    depth = len(images[0][0])
    images = _without_outer_folders(images)
    depth -= len(images[0][0])
    tops = Counter(parts[0].lower() for parts, *_ in images)
    split_tops = {top for top in tops if top in _SPLIT_FOLDERS}
    has_splits = "train" in {_SPLIT_FOLDERS[top] for top in split_tops} and all(len(parts) > 2 for parts, *_ in images)
    if has_splits and len(tops) != len(split_tops):
        odd = sorted(set(tops) - split_tops)
        raise UserError(
            f"{source} has {', '.join(odd[:3])} beside train: name the folders train, val and test, or remove others"
        )
    if has_splits and len({_SPLIT_FOLDERS[top] for top in split_tops}) != len(split_tops):
        raise UserError(f"{source} has two folders for one split ({', '.join(sorted(split_tops))}): keep one of them")
    _refuse_bare_classes(files, images, depth, has_splits, source)
    entries = []
    for parts, size, locator in images:
        split, inside = (_SPLIT_FOLDERS[parts[0].lower()], parts[1:]) if has_splits else (alone, parts)
        if len(inside) < 2:
            raise UserError(
                f"{source} has an image outside the class folders ({'/'.join(parts)}): <split>/<class>/<file> is needed"
            )
        key, _, extension = "/".join(inside[1:]).rpartition(".")
        entries.append(Entry(split, printable(inside[0]), key, extension.lower(), locator, size))
    num_other = len(files) - len(images)
    notes = (
        []
        if has_splits or alone != "train"
        else ["the source has no split folders, so every image is train unless val_share is given"]
    )
    notes += [f"{num_other} files that are hidden or no images were left out"] if num_other else []
    return entries, "; ".join(notes)


def _refuse_bare_classes(
    files: Sequence[FoundFile], images: Sequence[tuple[list[str], int, Any]], depth: int, has_splits: bool, source: str
) -> None:
    """A class folder that holds files but no image is a mistake, not a class fewer."""
    level = 2 if has_splits else 1
    filled = {tuple(parts[:level]) for parts, *_ in images}
    for name, *_ in files:
        parts = name.split("/")[depth:]
        is_class = len(parts) > level and (not has_splits or parts[0].lower() in _SPLIT_FOLDERS)
        if is_class and not _is_hidden(name) and tuple(parts[:level]) not in filled:
            folder = printable("/".join(parts[:level]))
            raise UserError(f"the source {source} has no image in the class folder {folder}: add images, or remove it")


def _fingerprint(entries: Sequence[Entry]) -> str:
    """Hex digest over the names and sizes of the images, in any order and wherever they lie."""
    lines = [f"{e.split}\0{e.class_name}\0{e.key}\0{e.extension}\0{e.size}\n" for e in entries]
    return hashlib.sha256("".join(sorted(lines)).encode("utf-8", "surrogateescape")).hexdigest()


def _is_image(name: str) -> bool:
    return not _is_hidden(name) and has_image_ending(name)


def _is_hidden(name: str) -> bool:
    return name.rpartition("/")[2].startswith(".") or "__MACOSX" in name


def _without_outer_folders(images: list[tuple[list[str], int, Any]]) -> list[tuple[list[str], int, Any]]:
    """Paths without the folders that hold everything (as in `my-images/train/...`), leaving at least class and file."""
    while len({parts[0] for parts, *_ in images}) == 1 and all(len(parts) > 2 for parts, *_ in images):
        if images[0][0][0].lower() in _SPLIT_FOLDERS:
            break
        images = [(parts[1:], size, locator) for parts, size, locator in images]
    return images


def _hold_out(entries: Sequence[Entry], share: float) -> list[Entry]:
    """`share` of each class moved to val, at least one image and never all: those whose paths hash lowest."""
    by_class: dict[str, list[tuple[bytes, int]]] = {}
    for number, entry in enumerate(entries):
        name = f"{entry.class_name}/{entry.key}.{entry.extension}".encode("utf-8", "surrogateescape")
        by_class.setdefault(entry.class_name, []).append((hashlib.sha256(name).digest(), number))
    held: set[int] = set()
    for members in by_class.values():
        num_val = min(len(members) - 1, max(1, round(share * len(members))))
        held.update(number for _, number in sorted(members)[:num_val])
    return [replace(entry, split="val") if number in held else entry for number, entry in enumerate(entries)]
