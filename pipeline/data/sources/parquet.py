"""Parquet with image bytes, as Hugging Face writes it: a column of {bytes, path} or of bytes, and a column of labels.

Reading one image out of a parquet file costs the whole group of rows around it, so the bytes are copied once, in the
order of the files, into one spool file on the local disk; writing in shuffled order reads from there.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import documents
from pipeline.data.images.formats import has_image_ending
from pipeline.data.sources.archives.find_files import is_folder
from pipeline.data.sources.archives.locators import Range
from pipeline.data.sources.cards import Card
from pipeline.data.sources.csv_jsonl import refuse_split_columns, several
from pipeline.data.sources.entry import SPLIT_WORDS, ImageEntry, splits_of_names
from pipeline.errors import UserError
from pipeline.storage import objects

_IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes")
_FREE_BYTES, _MAX_RATIO = 64 << 20, 100
"""Images hardly shrink: a file that says it unpacks to more than both is refused before it is."""
_MAX_BATCH = 4096
_LABEL_NAMES = ("label", "labels", "fine_label", "cls", "class", "target")


def is_parquet(source: str) -> bool:
    """Whether `source` is a parquet file, or a folder with some, there or one level below, and no images next to them."""
    if source.lower().endswith(".parquet"):
        return True
    if not objects.is_local(source):
        return bool(objects.list_urls(source, suffix=".parquet")) if is_folder(source) else False
    root = objects.local_path(source)
    if not root.is_dir():
        return False
    folders = {path.parent for pattern in ("*.parquet", "*/*.parquet") for path in root.glob(pattern)}
    return bool(folders) and not any(has_image_ending(path.name) for folder in folders for path in folder.iterdir())


def open_parquet(
    source: str, card: Card, spool: Path | None, progress: Callable[[int, int], None] | None = None
) -> tuple[list[ImageEntry], tuple[str, ...], str]:
    """Entries that lie in the spool, the class names in label order (empty: not recorded), and a note.

    Rows without a label are skipped and counted in the note; the split is a word in the file's name, or the folder's name; where
    no name says one, all are train. Where the card says that an image has several labels, it has them as a list or with its
    separator between them, and their set is its class (`csv_jsonl.open_list`); `classes` are then the labels.

    Raises:
        UserError: no parquet at `source`, splits that are not clear, damaged, without one column of images and one of labels, or
            with a label that is no class.
    """
    if spool is None:
        raise ValueError(f"a spool folder is needed to read {source}")
    urls = parquet_files(source)
    splits = splits_of_names(map(_named, urls), "call it train-*.parquet, val-*.parquet or test-*.parquet")
    path, offsets, sizes = spooled(source, spool, progress)
    entries: list[ImageEntry] = []
    classes: tuple[str, ...] = ()
    row = num_unlabelled = 0
    for url in urls:
        with _open(url) as file:
            image = _image_column(file.schema_arrow, url)
            label = _label_column(file.schema_arrow, url, lists=bool(card.multi_label))
            names = _class_names(file.schema_arrow, label, url)
            classes = classes or names
            if names != classes:
                raise UserError(f"{url} has other class names than the files before it: prepare them apart")
            split = splits[_named(url)]
            if split is None:
                refuse_split_columns({*file.schema_arrow.names} - {label}, url)
            stem = url.rpartition("/")[2].removesuffix(".parquet")
            for number, (value, name) in enumerate(_label_rows(file, image, label)):
                if row >= len(sizes):
                    raise UserError(f"{url} has more labels than images: fetch it again")
                where = f"{url}, row {number}"
                class_name = (
                    _several(value, classes, where, card) if card.multi_label else _class_of(value, classes, where)
                )
                if class_name is None:
                    num_unlabelled += 1
                else:
                    key, _, extension = (name or "").rpartition(".")
                    key = key or f"{stem}-{number:07d}"
                    place = Range(path, int(offsets[row]), int(sizes[row]))
                    entries.append(
                        ImageEntry(split or "train", class_name, key, extension.lower() or "img", place, place.size)
                    )
                row += 1
    if not entries:
        raise UserError(f"{source} has no labelled image ({num_unlabelled} rows without label)")
    return entries, classes, f"{num_unlabelled} rows without a label were skipped" if num_unlabelled else ""


def _several(value: Any, classes: tuple[str, ...], where: str, card: Card) -> str | None:
    """The class that stands for a row's labels; None for a row without any word on them (null)."""
    if value is None:
        return None
    cells = value if isinstance(value, list) else value.split(card.multi_label) if isinstance(value, str) else [value]
    names = [_class_of(cell, classes, where) or "" for cell in cells]
    return several(names, card.multi_label, where, card.classes or ())


def _class_of(value: Any, classes: tuple[str, ...], where: str) -> str | None:
    """The class name of a label; None for a row without one (null, empty text, or -1)."""
    if value is None or value == "" or (value == -1 and not isinstance(value, bool)):
        return None
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise UserError(f"{where}: the label is {type(value).__name__}; it must be text or a whole number")
    if isinstance(value, str):
        return value.strip().strip("\ufeff")
    if value < 0 or (classes and value >= len(classes)):
        raise UserError(
            f"{where}: the label {value} is none of the classes 0 to {len(classes) - 1 if classes else '...'}"
        )
    return classes[value] if classes else str(value)


@contextlib.contextmanager
def _open(url: str) -> Iterator[Any]:
    """The parquet file of a URL; UserError if it is none, or unpacks to more than its size allows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with objects.open_read(url) as stream:
        try:
            file = pq.ParquetFile(stream)
            size = objects.size_bytes(url)
            unpacked = sum(_group_bytes(file))
            if unpacked > max(_FREE_BYTES, _MAX_RATIO * size):
                raise UserError(
                    f"{url} unpacks from {size} to {unpacked} bytes, as no images do: if you trust it, write it anew with "
                    "less compression"
                )
            yield file
        # Arrow's errors are of many kinds; those of the operating system carry a number and are not about the file.
        except (pa.ArrowException, UnicodeError, OverflowError, RecursionError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            short = " ".join(str(error).split())[:200]
            raise UserError(f"{url} is no readable parquet, or is cut short ({short}): fetch it again") from error


def _group_bytes(file: Any) -> list[int]:
    """What the file says that each group of rows unpacks to. Of a column alone it can say so, too, but pyarrow 25 ends the
    whole process where that description is damaged."""
    return [max(0, file.metadata.row_group(group).total_byte_size) for group in range(file.metadata.num_row_groups)]


def _batches(file: Any, columns: list[str]) -> Iterator[Any]:
    """Rows in batches that are small even if each of them is the largest value of its column: a dictionary holds it once."""
    import pyarrow as pa

    rows = min(_MAX_BATCH, max(1, _FREE_BYTES // max(1, *_group_bytes(file), 1)))
    num_rows = 0
    for batch in file.iter_batches(batch_size=rows, columns=columns, use_threads=False):
        num_rows += batch.num_rows
        yield batch
    if num_rows != file.metadata.num_rows:  # Arrow gives what the pages say they hold, whatever the foot says
        raise pa.ArrowInvalid(f"{num_rows} rows of {columns[0]} where it says {file.metadata.num_rows}")


def _has_column(file: Any, path: str) -> bool:
    return any(file.schema.column(i).path == path for i in range(len(file.schema)))


def _is_image(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_struct(kind):
        return any(field.name == "bytes" and _is_image(field.type) for field in kind)
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _image_column(schema: Any, url: str) -> str:
    images = [field.name for field in schema if _is_image(field.type)]
    return _one(images, _IMAGE_NAMES, "image bytes (binary, or a struct with bytes)", schema, url)


def _label_column(schema: Any, url: str, *, lists: bool) -> str:
    """Args: lists: whether an image may have a list of labels."""
    import pyarrow.types as types

    def plain(kind: Any) -> bool:
        is_list = types.is_list(kind) or types.is_large_list(kind)
        return not types.is_nested(kind) or (lists and is_list)

    labels = [field.name for field in schema if not _is_image(field.type) and plain(field.type)]
    known = [name for name in labels if name in _LABEL_NAMES]
    what = "labels" if lists else "one label an image (lists of labels are read with --multi-label '|')"
    return _one(known or labels, _LABEL_NAMES, what, schema, url)


def _one(found: Sequence[str], known: Sequence[str], what: str, schema: Any, url: str) -> str:
    preferred = [name for name in known if name in found]
    if len(found) == 1 or preferred:
        return preferred[0] if preferred else found[0]
    raise UserError(
        f"{url} has {len(found) or 'no'} columns that may hold {what} (of {', '.join(schema.names)}): "
        f"name the right one {known[0]}"
    )


def _class_names(schema: Any, label: str, url: str) -> tuple[str, ...]:
    """Names that Hugging Face's metadata gives the numbers of the label column; empty where it does not."""
    described = (schema.metadata or {}).get(b"huggingface")
    if described is None:
        return ()
    content = documents.parse_json(described, f"the metadata of Hugging Face in {url}", remedy="fetch it again")
    try:
        feature = content["info"]["features"][label]
        if isinstance(feature, list):  # of several labels, as older versions write it
            (feature,) = feature
        feature = feature.get("feature", feature)
        return tuple(str(name).strip("\ufeff").replace("/", "_") for name in feature["names"])
    except (KeyError, TypeError, ValueError, AttributeError):
        return ()


def _named(url: str) -> str:
    """What of a file's address may say its split: its name, and that of its folder if it is one."""
    *_, folder, name = ["", *url.split("/")]
    return f"{folder}/{name}" if folder.lower() in SPLIT_WORDS else name


def _label_rows(file: Any, image: str, label: str) -> Iterator[tuple[Any, str | None]]:
    """(label, path of the image inside its struct) of each row; no image bytes are read."""
    has_path = _has_column(file, f"{image}.path")
    for batch in _batches(file, [label, image + ".path"] if has_path else [label]):
        labels = batch.column(label).to_pylist()
        paths = (
            [entry and entry.get("path") for entry in batch.column(image).to_pylist()]
            if has_path
            else [None] * len(labels)
        )
        yield from zip(labels, paths, strict=True)


def parquet_files(source: str) -> list[str]:
    """UserError where there is none."""
    urls = objects.list_urls(source, suffix=".parquet") if is_folder(source) else [source]
    if not urls or not objects.exists(urls[0]):
        raise UserError(f"there is no parquet file at {source}")
    return urls


def spooled(
    source: str, spool: Path, progress: Callable[[int, int], None] | None
) -> tuple[str, np.ndarray, np.ndarray]:
    """The spool file with the image bytes of all rows, and where each row lies in it; made once."""
    urls = parquet_files(source)
    stamp = json.dumps([source, [(url, objects.size_bytes(url)) for url in urls]])
    path = spool / f"{hashlib.sha256(stamp.encode()).hexdigest()[:32]}.images"
    places = path.with_suffix(".npy")
    if not places.exists():  # written last
        spool.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        sizes: list[int] = []
        try:
            with part.open("wb") as target:
                for number, url in enumerate(urls):
                    sizes += _copy_images(url, target)
                    if progress is not None:
                        progress(number + 1, len(urls))
            part.replace(path)
            with part.open("wb") as target:
                np.save(target, np.array(sizes, dtype=np.int64))
            part.replace(places)
        finally:
            part.unlink(missing_ok=True)
    sizes_found = np.load(places)
    return str(path), np.cumsum(sizes_found) - sizes_found, sizes_found


def _copy_images(url: str, target: Any) -> Iterator[int]:
    with _open(url) as file:
        image = _image_column(file.schema_arrow, url)
        nested = [f"{image}.bytes"] if _has_column(file, f"{image}.bytes") else []
        limit = max(_FREE_BYTES, _MAX_RATIO * objects.size_bytes(url))
        for batch in _batches(file, nested or [image]):
            for value in batch.column(image):
                data = (value["bytes"] if nested else value).as_py() or b""
                limit -= len(data)
                if limit < 0:
                    raise UserError(
                        f"{url} unpacks to more than {_MAX_RATIO} times its size, as no images do: do not trust it"
                    )
                target.write(data)
                yield len(data)
