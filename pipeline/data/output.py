"""The place that a dataset is written to: whose it is, what an interrupted run left there, where files are staged."""

import contextlib
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.data.cards import Card
from pipeline.data.manifest import NAME, Manifest
from pipeline.errors import UserError

MARK = "PREPARING.json"
"""In a place without manifest: a preparation is under way there, or was interrupted."""
STAGING_PREFIX = ".staging-"


def existing_dataset(out: str, card: Card, recipe: dict[str, Any]) -> Manifest | None:
    """The dataset that is at `out` if it is the one asked for; None if `out` is free; else UserError."""
    if storage.is_local(out) and storage.local_path(out).is_file():
        raise UserError(f"the output {out} is a file: give a folder")
    if storage.exists(storage.join(out, NAME)):
        found = Manifest.open(out)
        if found.name != card.name:
            raise UserError(f"{out} holds another dataset ('{found.name}'): choose another --out, or remove it first")
        differing = [f"{key} {found.recipe.get(key)}" for key in recipe if found.recipe.get(key) != recipe[key]]
        if differing:
            raise UserError(
                f"{out} holds '{card.name}' prepared otherwise ({', '.join(differing)}): "
                "choose another --out, or remove it first"
            )
        return found
    mark = storage.join(out, MARK)
    if storage.exists(mark):
        name = json.loads(storage.read_bytes(mark))["card"]
        if name != card.name:
            raise UserError(f"{out} holds an unfinished '{name}': finish or remove it, or choose another --out")
    else:
        strangers = [url for url in storage.list_urls(out) if f"/{STAGING_PREFIX}" not in url]
        if strangers:
            raise UserError(
                f"{out} holds other files (such as {os.path.basename(strangers[0])}): choose an empty --out"
            )
    return None


def claim(out: str, card: Card, recipe: dict[str, Any]) -> None:
    """Mark `out` as ours.

    What an interrupted run left is overwritten, not removed: another process may be at the same work, and equal recipes
    write equal bytes.
    """
    storage.write_bytes(storage.join(out, MARK), json.dumps({"card": card.name, "recipe": recipe}).encode())


def release(out: str) -> None:
    """Take the mark of an unfinished preparation away."""
    storage.remove(storage.join(out, MARK))


def remove_written(out: str, *, keep: Collection[str] = ()) -> None:
    """Remove what preparations write, except the names in `keep`; only while `out` is marked as unfinished."""
    if not storage.exists(storage.join(out, MARK)) or storage.exists(storage.join(out, NAME)):
        return
    ours = re.compile(r"(train|val|test)(-\d{6}\.tar|\.index\.parquet)")
    root = str(storage.local_path(out)) if storage.is_local(out) else out
    for url in storage.list_urls(out):
        name = url.rpartition("/")[2]
        if url == storage.join(root, name) and ours.fullmatch(name) and name not in keep:
            storage.remove(url)


@contextlib.contextmanager
def staging_folder(out: str) -> Iterator[Path]:
    """An empty local folder of this process: on the disk of a local `out`, else the system's temporary folder."""
    if not storage.is_local(out):
        with tempfile.TemporaryDirectory(prefix="normfree-prepare-") as folder:
            yield Path(folder)
        return
    root = storage.local_path(out)
    host = socket.gethostname()
    for left in root.glob(f"{STAGING_PREFIX}{host}-*"):
        if not _is_alive(left.name.rpartition("-")[2]):
            shutil.rmtree(left, ignore_errors=True)
    folder_path = root / f"{STAGING_PREFIX}{host}-{os.getpid()}"
    shutil.rmtree(folder_path, ignore_errors=True)
    folder_path.mkdir(parents=True)
    try:
        yield folder_path
    finally:
        shutil.rmtree(folder_path, ignore_errors=True)


def _is_alive(pid: str) -> bool:
    return pid.isdigit() and Path(f"/proc/{pid}").exists()
