"""The place that a dataset is written to: whose it is, what an interrupted run left there, where files are staged."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import documents, places
from pipeline.data.format.manifest import NAME, UNFINISHED_NAME, Manifest
from pipeline.data.prepare import journal
from pipeline.data.sources.cards import Card
from pipeline.errors import UserError
from pipeline.storage import objects, ownership

STAGING = ".staging"
_MARK_REMEDY = "remove it and what lies next to it, or choose another --out"
_OURS = re.compile(r"(train|val|test)-(\d{6}\.tar|\d{5}\.(index\.json|rows\.npy|keys\.parquet))|skipped\.jsonl")


@dataclass(frozen=True)
class _Mark:
    """What the mark says."""

    card: documents.Text
    recipe: dict[str, Any]


@dataclass(frozen=True)
class Staging:
    """Local folders of a preparation; neither is there before it is needed."""

    work: Path
    """Of this process: unfinished shards."""
    spool: Path
    """What cannot be read in place, as large as the source; kept for the next run when this one is interrupted."""


def existing_dataset(out: str, card: Card, recipe: dict[str, Any]) -> Manifest | None:
    """The dataset that is at `out` if it is the one asked for; None if `out` is free; else UserError."""
    if objects.is_local(out) and objects.local_path(out).is_file():
        raise UserError(f"the output {out} is a file: give a folder")
    mark = objects.join(out, UNFINISHED_NAME)
    if objects.exists(objects.join(out, NAME)):
        found = Manifest.open(out)
        if found.name != card.name:
            raise UserError(f"{out} holds another dataset ('{found.name}'): choose another --out, or remove it first")
        differing = [f"{key} {found.recipe.get(key)}" for key in recipe if found.recipe.get(key) != recipe[key]]
        if differing:
            raise UserError(
                f"{out} holds '{card.name}' prepared otherwise ({', '.join(differing)}): "
                "choose another --out, or remove it first"
            )
        if objects.exists(mark):  # killed after the manifest was there
            owner = ownership.look(out)
            if owner is not None and not ownership.is_alive(out, owner):
                with ownership.hold(out, "dataset", remedy="choose another folder"):
                    pass  # taken over, and given back: its file is gone
            release(out)
        return found
    if objects.exists(mark):
        found_mark = documents.read(mark, _Mark, remedy=_MARK_REMEDY)
        if found_mark.card != card.name:
            name = documents.excerpt(found_mark.card)
            raise UserError(f"{out} holds an unfinished '{name}': finish or remove it, or choose another --out")
    else:
        strangers = [
            url
            for url in objects.list_urls(out)
            if f"/{STAGING}/" not in url and not url.endswith(f"/{ownership.NAME}")
        ]
        if strangers and not objects.exists(mark):  # another part may have come first
            raise UserError(
                f"{out} holds other files (such as {os.path.basename(strangers[0])}): choose an empty --out"
            )
    return None


@contextlib.contextmanager
def only_writer(out: str, existing: Manifest | None, *, replaces: bool = False) -> Iterator[None]:
    """Own the place inside the block, unless a dataset is there already and nothing will be written.

    Args:
        replaces: the dataset that is there is written anew.

    Raises:
        UserError: another process writes there, or has finished the dataset while this one was waiting.
    """
    if existing is not None:
        yield
        return
    with ownership.hold(out, "dataset", remedy="choose another folder"):
        if not replaces and objects.exists(objects.join(out, NAME)):
            raise UserError(f"{out} was finished by another process just now: run the same command again")
        yield


def claim(out: str, card: Card, recipe: dict[str, Any], *, is_shared: bool = False) -> None:
    """Mark `out` as ours. What an interrupted run left is not removed: its finished shards are kept.

    Args:
        is_shared: by parts, which must be of one preparation; UserError where they are not.
    """
    mark = objects.join(out, UNFINISHED_NAME)
    if is_shared and objects.exists(mark):
        found = documents.read(mark, _Mark, remedy=_MARK_REMEDY).recipe
        differing = [
            f"{key} {documents.excerpt(str(found.get(key)))}" for key in recipe if found.get(key) != recipe[key]
        ]
        if differing:
            raise UserError(
                f"{out} holds parts of another preparation ({', '.join(differing)}): run all parts with the same options and "
                "source, or choose another --out"
            )
        return
    objects.write_bytes(mark, json.dumps({"card": card.name, "recipe": recipe}).encode())


def release(out: str) -> None:
    """Take the mark of an unfinished preparation, its journal and what killed writers left away."""
    journal.remove_records(out)
    if objects.is_local(out):
        for left in objects.local_path(out).glob(f"{objects.TEMP_PREFIX}*"):
            if not _is_alive(left.name.removeprefix(objects.TEMP_PREFIX).partition("-")[0]):
                left.unlink(missing_ok=True)
    objects.remove(objects.join(out, UNFINISHED_NAME))


def remove_written(out: str, *, keep: Collection[str]) -> None:
    """Remove what preparations with other options wrote: all but the names in `keep`; only before there is a manifest."""
    if not objects.exists(objects.join(out, UNFINISHED_NAME)) or objects.exists(objects.join(out, NAME)):
        return
    root = str(objects.local_path(out)) if objects.is_local(out) else out
    for url in objects.list_urls(out):
        name = url.rpartition("/")[2]
        if url == objects.join(root, name) and _OURS.fullmatch(name) and name not in keep:
            objects.remove(url)


def publish(path: Path, url: str) -> None:
    """Move a finished local file to `url`: whole or not at all, and on a disk for good."""
    if not objects.is_local(url):
        objects.put_file(path, url)
        path.unlink()
        return
    target = objects.local_path(url)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(path, target)  # the staging folder of a local output is on its disk
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def publish_manifest(made: Manifest, work: Path) -> None:
    """The list of what was skipped, out of the local folder `work`, and the manifest last: with it the dataset exists."""
    if made.skipped_list is not None:
        publish(work / made.skipped_list.name, objects.join(made.url, made.skipped_list.name))
    objects.write_bytes(objects.join(made.url, NAME), made.to_json())


@contextlib.contextmanager
def staging(out: str, spool: str = "spool") -> Iterator[Staging]:
    """Folders on the disk of a local `out`, else in the user's cache; gone afterwards, but the spool stays on a failure."""
    local = objects.is_local(out)
    cache = places.cache_folder() / "staging"
    root = objects.local_path(out) / STAGING if local else cache / hashlib.sha256(out.encode()).hexdigest()[:16]
    was_there = root.parent.exists()
    host = socket.gethostname()
    for left in root.glob(f"work-{host}-*"):
        if not _is_alive(left.name.rpartition("-")[2]):
            shutil.rmtree(left, ignore_errors=True)
    folders = Staging(root / f"work-{host}-{os.getpid()}", root / spool)
    try:
        yield folders
    except UserError:
        _clear(root, folders, was_there)
        raise
    except BaseException:
        shutil.rmtree(folders.work, ignore_errors=True)
        raise
    _clear(root, folders, was_there)


@contextlib.contextmanager
def explain_full_disk(out: str) -> Iterator[None]:
    """A disk that is full in the block becomes one sentence; what is finished stays."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(
            f"no space left for {out} or its staging folder ({os.strerror(error.errno)}): free some, "
            "and run the same command again; finished shards are kept"
        ) from error


def _clear(root: Path, folders: Staging, was_there: bool) -> None:
    shutil.rmtree(folders.work, ignore_errors=True)
    if not any(root.glob("work-*")):  # another process reads the spool
        shutil.rmtree(root, ignore_errors=True)
    if not was_there:
        with contextlib.suppress(OSError):
            root.parent.rmdir()


def _is_alive(pid: str) -> bool:
    return pid.isdigit() and Path(f"/proc/{pid}").exists()
