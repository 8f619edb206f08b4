"""What stands in one folder, and no deeper: a look into a bucket whose size does not depend on what lies below. And the sizes of
all objects at any depth, which a bucket tells with their names: not a request for each."""

from __future__ import annotations

import os
from datetime import datetime
from typing import Any, NamedTuple

from pipeline.storage import clients, objects


class Item(NamedTuple):
    name: str
    is_folder: bool
    size_bytes: int = 0
    modified_s: float = 0.0
    """Unix time; 0 where the store does not say."""


def items(url: str | os.PathLike[str]) -> list[Item]:
    """By name; [] for a folder that is not there. Partial local writes are never part of the answer."""
    if not objects.is_local(url):
        return clients.with_retries(url, _ask)
    found = []
    try:
        for entry in os.scandir(objects.local_path(url)):
            if not entry.name.startswith(objects.TEMP_PREFIX):
                is_folder = entry.is_dir()
                status = None if is_folder else entry.stat()
                found.append(Item(entry.name, is_folder, *((status.st_size, status.st_mtime) if status else ())))
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(found)


def sizes(prefix: str, endings: tuple[str, ...]) -> dict[str, int]:
    """Bytes of every object under the folder `prefix` whose name ends so, in any case of letters; by URL as of `list_urls`."""
    if objects.is_local(prefix):
        return {url: objects.size_bytes(url) for url in objects.list_urls(prefix) if url.lower().endswith(endings)}

    def find(fs: Any, path: str) -> dict[str, int]:
        fs.invalidate_cache()
        root = path.rstrip("/") + "/"
        found = fs.find(path, detail=True).values()
        rows = [row for row in found if row["name"].startswith(root) and row["name"].lower().endswith(endings)]
        # A web server's pages name files without their sizes.
        return {
            objects.join(prefix, row["name"].removeprefix(root)): int(
                fs.info(row["name"])["size"] if row.get("size") is None else row["size"]
            )
            for row in rows
        }

    return clients.with_retries(prefix, find)


def _ask(fs: Any, path: str) -> list[Item]:
    fs.invalidate_cache()
    try:
        rows = fs.ls(path, detail=True)
    except FileNotFoundError:
        return []
    root = path.rstrip("/") + "/"
    return sorted(_item(row) for row in rows if row["name"].rstrip("/").startswith(root) and row["name"] != root)


def _item(row: dict[str, Any]) -> Item:
    when = row.get("LastModified") or row.get("mtime") or row.get("created")
    modified_s = when.timestamp() if isinstance(when, datetime) else float(when or 0.0)
    name = row["name"].rstrip("/").rsplit("/", 1)[-1]
    return Item(name, row["type"] == "directory", int(row.get("size") or 0), modified_s)
