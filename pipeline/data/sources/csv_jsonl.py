"""A CSV, TSV or JSONL list of images: columns `path`, `label` and optionally `split`.

A path is absolute, an address (`s3://`, `https://`), or relative to the folder of the list; what lies neither next to nor below
the list must lie below an allowed root. Labels are class names; where all of them are whole numbers, classes are in numeric
order. Several labels an image, with a separator between them or as a list, are read where the caller says so
(`pipeline.data.format.label_sets`), and so is a column `mask` in place of `label` (`pipeline.data.format.masks`), or `boxes`
(`pipeline.data.sources.boxes.listed`).
"""

import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pipeline import documents
from pipeline.data.format.label_sets import NONE, labels_of, set_name
from pipeline.data.sources.archives.locators import Locator, Refused
from pipeline.data.sources.boxes.listed import boxes_of_row
from pipeline.data.sources.cards import Card
from pipeline.data.sources.entry import IMAGES, SPLIT_WORDS, ImageEntry
from pipeline.data.sources.list_access import AllowedPlaces
from pipeline.errors import UserError
from pipeline.storage import objects

EXTENSIONS = (".csv", ".tsv", ".jsonl", ".ndjson")


def is_list(source: str) -> bool:
    return source.lower().endswith(EXTENSIONS)


def open_list(source: str, card: Card, allow_roots: Sequence[str] = ()) -> tuple[list[ImageEntry], str]:
    """The entries of a list, in its order, and a note.

    Args:
        card: of a set with several labels an image: their set is its class, and it may have none. Of one with masks or boxes:
            each image has one, or a list of them, and is of the class `images`.
        allow_roots: places that paths may lie below, besides the folder of the list (`list_access`); all else is counted as
            images that cannot be read.
    Raises:
        UserError: no such file, a row without path or label or with one that is none, an unknown label or split, or a path
            that is listed twice; each with the number of the line.
    """
    places = AllowedPlaces(source, allow_roots)
    entries: list[ImageEntry] = []
    lines: dict[str, int] = {}
    num_refused = num_bare = 0
    unread, without_split = set[str](), list[int]()
    classes = card.classes or ()
    if card.boxes and not source.lower().endswith(EXTENSIONS[2:]):
        raise UserError(f"{source}: boxes do not fit into a cell; give a JSONL list with path and boxes")
    for line, row in _rows(source, "mask" if card.masks else "label"):
        where = f"{source}, line {line}"
        unread |= row.keys() - _COLUMNS - ({"boxes"} if card.boxes else set())
        path, split = _text(row.get("path"), "path", where), _split(row, where)
        listed = boxes_of_row(row, classes, where) if card.boxes else None
        mask, beside_name, mask_size = None, "", -1
        if listed is not None:
            label, beside_name = IMAGES, listed.digest
        elif card.masks:
            label, (mask, beside_name, mask_size) = IMAGES, _mask(row, places, where)
        elif card.multi_label:
            label = several(row.get("label"), card.multi_label, where, classes)
            num_bare += label == NONE
        else:
            label = _text(row.get("label"), "label", where)
        if not path or not label:
            raise UserError(f"{where}: path and label must both be there")
        without_split += [] if split else [line]
        same, locator, size = places.locate(path)
        if same in lines:
            raise UserError(
                f"{where}: {documents.excerpt(path, 200)} is on line {lines[same]} already: keep one of them"
            )
        lines[same] = line
        num_refused += isinstance(locator, Refused)
        place = (split or "train", label, *_named(path), locator, size)
        entries.append(ImageEntry(*place, mask, listed, beside_name, mask_size))
    if not entries:
        raise UserError(f"the list {source} has no rows: one image a line is needed")
    _refuse_unclear_splits(source, without_split, len(entries), unread)
    return entries, "; ".join(_notes(num_refused, num_bare, sorted(unread)))


def _split(row: dict[str, Any], where: str) -> str:
    """The split of a row, "" where it says none."""
    text = _text(row.get("split"), "split", where)
    if text and text.lower() not in SPLIT_WORDS:
        raise UserError(f"{where}: split '{documents.excerpt(text)}' must be train, val or test")
    return SPLIT_WORDS.get(text.lower(), "")


def _notes(num_refused: int, num_bare: int, unread: Sequence[str]) -> Iterator[str]:
    if num_refused:
        yield f"{num_refused} rows of the list name what is not read"
    if unread:
        names = (documents.excerpt(name) if name else "without a name" for name in unread[:5])
        yield f"{len(unread)} columns of the list were not read ({', '.join(names)})"
    if num_bare:
        yield f"{num_bare} images have no label: they show none of them"


def _refuse_unclear_splits(source: str, without: Sequence[int], num: int, unread: Iterable[str]) -> None:
    """UserError where `without`, the lines of rows without a split, are some of the `num` rows, or something else tells it."""
    if len(without) == num:
        refuse_split_columns(unread, source)
    elif without:
        raise UserError(
            f"{source}, line {without[0]}: split is empty, and {num - len(without)} rows have one; say train, val or test in each"
        )


def _mask(row: dict[str, Any], places: AllowedPlaces, where: str) -> tuple[Locator, str, int]:
    """Where a row's mask is, what a fingerprint sees of it, and its size."""
    place = _text(row.get("mask"), "mask", where)
    if not place:
        raise UserError(f"{where}: mask is empty; name the PNG of each image")
    _, locator, size = places.locate(place)
    return locator, f"{place} {size}", size


def _named(path: str) -> tuple[str, str]:
    """Key and ending of an image by its path or address."""
    stem, dot, extension = path.partition("://")[2].rpartition(".") if "://" in path else path.rpartition(".")
    if not dot or "/" in extension:
        stem, extension = stem + dot + extension, "img"
    return stem.lstrip("./~"), extension.lower()


def several(value: object, separator: str, where: str, known: Sequence[str] = ()) -> str:
    """The class that stands for a cell's labels: text with separators, or a list."""
    cells = value if isinstance(value, list) else _text(value, "label", where).split(separator)
    name = set_name((_text(cell, "label", where) for cell in cells), where)
    if known and (other := sorted(labels_of([name]) - set(known))):
        raise UserError(f"{where}: {documents.excerpt(other[0])} is none of the {len(known)} labels of the card")
    return name


def _rows(source: str, second: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows with the numbers of their lines."""
    if not objects.is_file(source):
        raise UserError(f"there is no list at {source}: give a CSV or JSONL file with the columns path and label")
    text = _read(source, f"the list {source}", _MAX_BYTES)
    return _json_rows(text, source) if source.lower().endswith(EXTENSIONS[2:]) else _csv_rows(text, source, second)


def _read(url: str, where: str, max_bytes: int) -> str:
    data = objects.read_bytes(url, max_bytes=max_bytes + 1)
    if len(data) > max_bytes:
        raise UserError(f"{where} is larger than {max_bytes >> 20} MiB, which no such file is: give parts of it")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 (byte {error.start}): save it as UTF-8") from error


def _text(value: object, name: str, where: str) -> str:
    """A cell as text, "" where it is not there."""
    if name == "label" and isinstance(value, list):
        raise UserError(
            f"{where}: label is a list of {len(value)}; give one, or say with --multi-label '|' that images have several"
        )
    if isinstance(value, bool) or not isinstance(value, str | int | None):
        raise UserError(f"{where}: {name} must be text or a whole number, not {documents.excerpt(value)}")
    text = "" if value is None else str(value).strip().strip("\ufeff").strip()
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"{where}: {name} has {len(text)} characters, more than the {MAX_CHARACTERS} allowed")
    if any(ord(letter) < 32 or 127 <= ord(letter) < 160 for letter in text):
        raise UserError(f"{where}: {name} has a control character: {documents.excerpt(text)!r}")
    if any(0xD800 <= ord(letter) < 0xE000 for letter in text):
        raise UserError(f"{where}: {name} has half a character (a lone surrogate): {documents.excerpt(text)!r}")
    return text


def refuse_split_columns(columns: Iterable[str], source: str) -> None:
    """A column that seems to tell splits and is not read would make training data of all of them."""
    for name in sorted(columns):
        words = set(re.findall("[a-z]+", name.lower()))
        if words - _FILLERS and words - _FILLERS <= SPLIT_WORDS.keys() | _SPLIT_COLUMNS:
            raise UserError(
                f"{source} has a column {documents.excerpt(name)} that seems to tell splits, and nothing else does: call it "
                "split, with train, val or test in each row, or remove it"
            )


_COLUMNS = frozenset({"path", "label", "split", "mask"})
_FILLERS = {"is", "data", "dataset", "name", "type", "idx", "index", "number", "no"}
_SPLIT_COLUMNS = {"split", "splits", "set", "subset", "partition", "phase", "fold", "folds"}
MAX_CHARACTERS = 4000
_MAX_BYTES = 1 << 32


def _csv_rows(text: str, source: str, second: str) -> Iterator[tuple[int, dict[str, Any]]]:
    delimiter = "\t" if source.lower().endswith(".tsv") else ","
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        names = [(name or "").strip().lower() for name in reader.fieldnames or []]
        if not {"path", second} <= set(names):
            columns = documents.excerpt(", ".join(names), 200) if names else "(none)"
            raise UserError(f"{source} has the columns {columns}: path and {second} are needed, split may be")
        twice = [name for name in sorted(_COLUMNS) if names.count(name) > 1]
        if twice:
            raise UserError(f"{source} has two columns {twice[0]}: keep one of them")
        reader.fieldnames = names
        for row in reader:
            if any(row.pop(None, ())):  # what csv calls the cells that no column is for
                raise UserError(
                    f"{source}, line {reader.line_num}: more cells than the {len(names)} columns; put text with {delimiter!r} in "
                    "quotation marks"
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise UserError(f"{source}, line {reader.line_num}: no CSV ({documents.excerpt(str(error), 200)})") from error


def _json_rows(text: str, source: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, row in documents.parse_jsonl(text, source, max_bytes=_MAX_BYTES, remedy="mend that line"):
        if not isinstance(row, dict):
            raise UserError(f"{source}, line {number}: an object with path and label is needed")
        yield number, row


def read_classes(url: str) -> list[str]:
    """Class names in label order from a text file with one a line.

    Raises:
        UserError: no such file, not UTF-8, a name with control characters, or one that stands twice.
    """
    if not objects.is_file(url):
        raise UserError(f"no file {url}; one class name a line is needed, in label order")
    text = _read(url, url, documents.MAX_BYTES)
    lines: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        name = _text(line, "the class name", f"{url}, line {number}")
        if name in lines:
            raise UserError(f"{url}, line {number}: {documents.excerpt(name)} is on line {lines[name]} already")
        if name:
            lines[name] = number
    return list(lines)


def is_number(label: str) -> bool:
    """Whether a label is a whole number of any length, without sign."""
    return label.isascii() and label.isdigit()


def label_order(labels: set[str]) -> tuple[str, ...]:
    """Class names in label order: numeric where all are whole numbers, else by name."""
    if all(is_number(label) for label in labels):
        digits = {label: label.lstrip("0") for label in labels}  # compared as text: no number is too long for that
        return tuple(sorted(labels, key=lambda label: (len(digits[label]), digits[label], label)))
    return tuple(sorted(labels))
