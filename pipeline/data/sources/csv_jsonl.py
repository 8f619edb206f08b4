"""A CSV, TSV or JSONL list of images: columns `path`, `label` and optionally `split`.

A path is absolute, an address (`s3://`, `https://`), or relative to the folder of the list. Labels are class names; where
all of them are whole numbers, classes are in numeric order.
"""

import csv
import io
import json
from collections.abc import Iterator

from pipeline.data.sources.entry import Entry
from pipeline.errors import UserError
from pipeline.storage import objects

EXTENSIONS = (".csv", ".tsv", ".jsonl", ".ndjson")
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
}


def is_list(source: str) -> bool:
    return source.lower().endswith(EXTENSIONS)


def open_list(source: str) -> list[Entry]:
    """The entries of a list, in its order.

    Raises:
        UserError: no such file, a row without path or label, an unknown split, or a path that is listed twice; each
            with the number of the line.
    """
    try:
        text = objects.read_bytes(source).decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(
            f"there is no list at {source}: give a CSV or JSONL file with the columns path and label"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"the list {source} is not UTF-8 (byte {error.start}): save it as UTF-8") from error
    folder = source.rpartition("/")[0] or "."
    entries: list[Entry] = []
    lines: dict[str, int] = {}
    rows = _json_rows(text, source) if source.lower().endswith(EXTENSIONS[2:]) else _csv_rows(text, source)
    for line, row in rows:
        path, label, split = (str(row.get(name) if row.get(name) is not None else "").strip() for name in _COLUMNS)
        if not path or not label:
            raise UserError(f"{source}, line {line}: path and label must both be there")
        if split and split.lower() not in SPLIT_WORDS:
            raise UserError(f"{source}, line {line}: split '{split}' must be train, val or test")
        url = path if "://" in path or path.startswith(("/", "~")) else objects.join(folder, path)
        if url in lines:
            raise UserError(f"{source}, line {line}: {path} is on line {lines[url]} already: keep one of them")
        lines[url] = line
        stem, dot, extension = path.partition("://")[2].rpartition(".") if "://" in path else path.rpartition(".")
        if not dot or "/" in extension:
            stem, extension = stem + dot + extension, "img"
        split = SPLIT_WORDS.get(split.lower(), "train")
        entries.append(Entry(split, label, stem.lstrip("./~"), extension.lower(), (url,), _size(url)))
    if not entries:
        raise UserError(f"the list {source} has no rows: one image a line is needed")
    return entries


_COLUMNS = ("path", "label", "split")


def _csv_rows(text: str, source: str) -> Iterator[tuple[int, dict[str, str]]]:
    reader = csv.DictReader(io.StringIO(text), delimiter="\t" if source.lower().endswith(".tsv") else ",")
    names = [(name or "").strip().lower() for name in reader.fieldnames or []]
    if not {"path", "label"} <= set(names):
        raise UserError(
            f"{source} has the columns {', '.join(names) or '(none)'}: path and label are needed, split may be"
        )
    reader.fieldnames = names
    for row in reader:
        yield reader.line_num, row


def _json_rows(text: str, source: str) -> Iterator[tuple[int, dict[str, object]]]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{source}, line {number}: no JSON ({error})") from error
        if not isinstance(row, dict):
            raise UserError(f"{source}, line {number}: an object with path and label is needed")
        yield number, row


def _size(url: str) -> int:
    """Size of a local file; -1 for others: asking a server for each would take hours."""
    if not objects.is_local(url):
        return -1
    try:
        return objects.size_bytes(url)
    except OSError:
        return -1  # reading it will say so, under its name


def label_order(labels: set[str]) -> tuple[str, ...]:
    """Class names in label order: numeric where all are whole numbers, else by name."""
    if all(label.isdecimal() for label in labels):
        return tuple(sorted(labels, key=lambda label: (int(label), label)))
    return tuple(sorted(labels))
