"""Raw images as they are found in the world -> samples with a split, a class and a key, in one deterministic order.

    folder, tar (plain or compressed), zip     `<split>/<class>/.../<file>`, below any number of single outer folders
    folder with ILSVRC2012_img_train.tar       ImageNet as distributed (`pipeline.data.sources.imagenet`)
    .csv, .tsv, .jsonl                         columns path, label and optionally split (`pipeline.data.sources.csv_jsonl`)
    folder with annotations/instances_*.json   COCO's boxes, where the card has boxes (`pipeline.data.sources.boxes.coco`)
    folder, tar, zip of images and masks       as of ADE20K and VOC, where the card has masks (`....masks.folders`)
    .parquet, or a folder of them              image bytes and labels (`pipeline.data.sources.parquet`)

Without splits all images are `train`, or `val_share` of each class goes to val by a hash of the path. Nothing is ever
extracted: members of an archive are read in place. What is guessed and what is skipped is in the note.
"""

import hashlib
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from pipeline import documents
from pipeline.data.format.label_sets import labels_of
from pipeline.data.sources import imagenet
from pipeline.data.sources.archives.find_files import compression, list_files
from pipeline.data.sources.archives.reader import FileReader
from pipeline.data.sources.archives.unpack import unpacked
from pipeline.data.sources.boxes.coco import annotations, open_coco
from pipeline.data.sources.builtin import PackagedReader, open_packaged
from pipeline.data.sources.cards import Card
from pipeline.data.sources.class_folders import arrange
from pipeline.data.sources.csv_jsonl import is_list, is_number, label_order, open_list
from pipeline.data.sources.entry import IMAGES, ImageEntry, ImageSource
from pipeline.data.sources.masks.folders import open_mask_folders
from pipeline.data.sources.parquet import is_parquet, open_parquet, spooled
from pipeline.errors import UserError

SpoolProgress = Callable[[int, int], None]
"""Called as progress(done, total) in files while a source is copied to the spool."""


def open_source(
    card: Card,
    source: str | None = None,
    *,
    val_share: float | None = None,
    splits: Sequence[str] | None = None,
    allow_roots: Sequence[str] = (),
    spool: Path | None = None,
    progress: SpoolProgress | None = None,
) -> ImageSource:
    """List a source without decoding anything.

    Args:
        source: path or URL; the download folder of a torchvision set; not for embedded sets.
        val_share: share of each class (0 < share < 1) to hold out as val where the source has no splits.
        splits: other split folders than these are skipped, whatever is in them; None: all are taken.
        allow_roots: folders and addresses that a list may name besides what lies below its own folder.
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
        opened = _open_given(card, source, val_share, splits, allow_roots, spool, progress)
    if card.masks or card.boxes:
        assert card.classes is not None
        if all(entry.split != "train" for entry in opened.entries):
            raise UserError(f"{source or card.name} has no train split, only {_names(opened.entries)}")
        kept = (card.classes, ()) if card.masks else ((), card.classes)
        return replace(opened, classes=(IMAGES,), masks=kept[0], boxes=kept[1])
    if card.multi_label:
        return _of_several_labels(card, opened, source)
    classes = _check_classes(card, opened, source)
    notes = [opened.note, *_class_notes(opened.entries, classes)]
    return replace(opened, classes=classes, note="; ".join(filter(None, notes)))


def local_copy(card: Card, source: str, spool: Path, progress: SpoolProgress | None) -> Callable[[], str] | None:
    """Makes the file in the spool that a given source is read from, once; None where it is read in place."""
    if is_list(source) or card.boxes:
        return None
    if not card.masks and is_parquet(source):
        return lambda: spooled(source, spool, progress)[0]
    magic = compression(source)
    return None if magic is None else partial(unpacked, source, magic, spool)


def _open_packaged(card: Card, source: str | None) -> ImageSource:
    packaged = open_packaged(card, source)
    entries = tuple(
        ImageEntry(
            split,
            name,
            key,
            "png",
            locator,
            mask=(locator,) if card.masks else None,
            boxes=packaged.boxes(locator) if card.boxes and packaged.boxes else None,
        )
        for split, name, key, locator in packaged.samples
    )
    return ImageSource(entries, packaged.classes, packaged.fingerprint, packaged.note, PackagedReader(card, source))


def _of_several_labels(card: Card, opened: ImageSource, source: str | None) -> ImageSource:
    """The sets that occur as classes, once it is certain that source and card are about the same labels."""
    shown = tuple(
        replace(entry, class_name=label) for entry in opened.entries for label in sorted(labels_of([entry.class_name]))
    )
    labels = _check_classes(
        card, replace(opened, entries=shown, classes=opened.classes or _numeric_order(shown)), source
    )
    return replace(opened, classes=tuple(sorted({entry.class_name for entry in opened.entries})), labels=labels)


def _names(entries: Sequence[ImageEntry]) -> str:
    return ", ".join(sorted({entry.split for entry in entries}))


def _classes_by_split(entries: Sequence[ImageEntry]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for entry in entries:
        found.setdefault(entry.split, set()).add(entry.class_name)
    return found


def _check_classes(card: Card, opened: ImageSource, source: str | None) -> tuple[str, ...]:
    """The classes in label order, once it is certain that source and card are about the same ones."""
    where = source or card.name
    by_split = _classes_by_split(opened.entries)
    if "train" not in by_split and not card.tests_only:
        raise UserError(f"{where} has no train split, only {_names(opened.entries)}: add a folder train/<class>/")
    known = set(
        card.classes
        if card.indexed and card.classes
        else opened.classes or by_split["test" if card.tests_only else "train"]
    )
    place = f"the card {card.name}" if card.indexed else "train"
    for split, names in sorted(by_split.items()):
        unknown = sorted(names - known)
        if unknown:
            first = next(e for e in opened.entries if e.split == split and e.class_name in unknown)
            raise UserError(
                f"{where}: {split} has classes that {place} lacks ({', '.join(unknown[:3])}, {len(unknown)} in all; the first "
                f"image is {first.key}.{first.extension}): give them train images or remove them"
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


def _class_notes(entries: Sequence[ImageEntry], classes: Sequence[str]) -> Iterator[str]:
    """Classes that people would read as one, and splits that have no images of some."""
    alike: dict[str, list[str]] = {}
    for name in classes:
        alike.setdefault(" ".join(unicodedata.normalize("NFKC", name).casefold().split()), []).append(name)
    groups = [names for names in alike.values() if len(names) > 1]
    for names in groups[:3]:
        shown = ", ".join(ascii(documents.excerpt(name)) for name in names[:4])
        yield f"these classes differ in case, spaces or Unicode form only: {shown}"
    if len(groups) > 3:
        yield f"so do {len(groups) - 3} more groups of classes"
    numbers = [name for name in classes if is_number(name)]
    if numbers and len(numbers) < len(classes):
        other = documents.excerpt(next(name for name in classes if not is_number(name)))
        yield f"{len(numbers)} classes are whole numbers and {len(classes) - len(numbers)} are not, such as {other}"
    if all(name.count(".") == 1 and is_number(name.replace(".", "")) for name in classes):
        yield "the classes are numbers with a fraction, in the order of text"
    if len(entries) >= 100 and 2 * len(classes) > len(entries):
        yield f"{len(entries)} images have {len(classes)} classes: are these classes, or names of images"
    for split, present in sorted(_classes_by_split(entries).items()):
        missing = [name for name in classes if name not in present]
        if missing:
            shown = ", ".join(map(documents.excerpt, missing[:3]))
            yield f"{split} has no images of {len(missing)} of {len(classes)} classes ({shown})"


def _open_given(
    card: Card,
    source: str | None,
    val_share: float | None,
    splits: Sequence[str] | None,
    allow_roots: Sequence[str],
    spool: Path | None,
    progress: SpoolProgress | None,
) -> ImageSource:
    """A source that the user names, in whatever form it is."""
    if source is None:
        raise UserError(f"the set '{card.name}' needs a source: {card.source_hint}")
    classes: tuple[str, ...] = ()
    if is_list(source):
        entries, note = open_list(source, card, allow_roots)
        classes = _numeric_order(entries)
    elif card.boxes and annotations(source):
        entries, note = open_coco(source, card.classes or ())
    elif card.boxes:
        raise UserError(
            f"{source} is no list; images with boxes are read from a JSONL file with path and boxes, or from a folder with "
            "COCO's annotations/instances_train2017.json and the like"
        )
    elif card.masks:
        entries, note = open_mask_folders(source, spool)
    elif is_parquet(source):
        entries, classes, note = open_parquet(source, card, spool, progress)
        classes = classes or _numeric_order(entries)
    elif card.multi_label:
        raise UserError(
            f"{source} is not a list; several labels an image are read from a CSV, TSV, JSONL or parquet file"
        )
    elif imagenet.is_distributed(source):
        entries, note = imagenet.open_distributed(source)
    else:
        entries, note = _open_tree(card, source, spool, splits)
    fingerprint = _fingerprint(entries)
    if val_share is not None:
        if {entry.split for entry in entries} != {"train"}:
            raise UserError(f"{source} has the splits {_names(entries)} already: leave out val_share")
        entries = _hold_out(entries, val_share)
        note = f"{val_share:g} of each class was held out as val by a hash of the path; {note}".rstrip("; ")
    return ImageSource(tuple(entries), classes, fingerprint, note, FileReader(tolerant=is_list(source) or card.boxes))


def _numeric_order(entries: Sequence[ImageEntry]) -> tuple[str, ...]:
    """The classes of train in the order of their numbers where all labels are numbers, else none."""
    if not all(is_number(entry.class_name) for entry in entries):
        return ()
    return label_order({entry.class_name for entry in entries if entry.split == "train"})


def _open_tree(
    card: Card, source: str, spool: Path | None, splits: Sequence[str] | None
) -> tuple[list[ImageEntry], str]:
    """Class folders in a folder or an archive."""
    if source.lower().endswith((".json", ".txt", ".lst", ".xls", ".xlsx")):
        raise UserError(
            f"{source} is no list that is read: write a CSV, TSV or JSONL file with the columns path and label"
        )
    found = list_files(source, spool)
    if found is None:
        raise UserError(f"there is no source at {source}: give {card.source_hint}")
    if not found.files and not found.folders and not found.skipped:
        raise UserError(f"the source {source} is missing or empty: give {card.source_hint}")
    entries, notes = arrange(found, source, card.test_split if card.tests_only else "train", splits)
    # As an archive that was added to is unpacked: the later file of a name replaces the earlier one.
    last = {(entry.split, entry.class_name, entry.key, entry.extension): entry for entry in entries}
    if len(last) < len(entries):
        notes.append(f"{len(entries) - len(last)} files were replaced by later ones of the same name in the archive")
    return list(last.values()), "; ".join(notes)


def _fingerprint(entries: Sequence[ImageEntry]) -> str:
    """Hex digest over the names and sizes of the images, in any order and wherever they lie."""
    lines = [f"{e.split}\0{e.class_name}\0{e.key}\0{e.extension}\0{e.size}{e.beside_mark}\n" for e in entries]
    return hashlib.sha256("".join(sorted(lines)).encode("utf-8", "surrogateescape")).hexdigest()


def _hold_out(entries: Sequence[ImageEntry], share: float) -> list[ImageEntry]:
    """`share` of each class moved to val, at least one image and never all: those whose paths hash lowest."""
    by_class: dict[str, list[tuple[bytes, int]]] = {}
    for number, entry in enumerate(entries):
        name = entry.raw_name.encode("utf-8", "surrogateescape")
        by_class.setdefault(entry.class_name, []).append((hashlib.sha256(name).digest(), number))
    held: set[int] = set()
    for members in by_class.values():
        num_val = min(len(members) - 1, max(1, round(share * len(members))))
        held.update(number for _, number in sorted(members)[:num_val])
    return [replace(entry, split="val") if number in held else entry for number, entry in enumerate(entries)]
