"""The last state of a run whose own place does not take it: on this machine's disk until the next start hands it in.

    CACHE/unsaved/RUN/checkpoints/step_00000120/    a checkpoint like any other, whole, in one set of files
    at the next start on this machine               verified, copied into the run, committed there, removed here

One state a run, which a newer one replaces. It counts for nothing while it lies here: what a run folder does not hold is no
checkpoint of it.
"""

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline import places
from pipeline.checkpoint import load, retention
from pipeline.checkpoint.commit import COMMIT, Commit, checkpoint_url, read_commit, unused_url, write_commit
from pipeline.checkpoint.part_writer import sentence, write_part
from pipeline.checkpoint.snapshot import Image
from pipeline.errors import UserError
from pipeline.records import Notice, Record
from pipeline.storage import objects

ROOM = 1.05
"""Times its size must be free: a disk that is filled to its end is the next thing to fail."""


def _folder(run_dir: str) -> Path:
    url = os.path.abspath(objects.local_path(run_dir)) if objects.is_local(run_dir) else run_dir
    return places.cache_folder() / "unsaved" / places.name_of_url(url)


def keep(run_dir: str, images: list[Image], *, step: int, facts: dict[str, Any]) -> str:
    """Write a whole state to this machine's disk; what came of it, in words. Raises nothing."""
    try:
        folder = places.private_folder("unsaved", _folder(run_dir).name)
        size_bytes = sum(image.size_bytes for image in images)
        free_bytes = places.free_bytes(folder)
        if free_bytes < ROOM * size_bytes:
            return (
                f"and could not be kept in {folder} ({free_bytes / 1e9:.1f} GB are free, {size_bytes / 1e9:.1f} needed)"
            )
        objects.remove_tree(folder / "checkpoints")
        url = checkpoint_url(str(folder), step)
        part = write_part(url, images, rank=0, size=1, staging="", give_up=threading.Event())
        write_commit(url, step=step, kinds=part["kinds"], files=part["files"], facts=facts)
    except Exception as error:
        return f"and could not be kept on this machine either ({sentence(error, run_dir)})"
    return f"but is kept in {url} on {socket.gethostname()}: the same command, there, takes it over"


def hand_in(
    run_dir: str, newest: Commit | None, *, cache_dir: str, refuse: Callable[[Commit], None]
) -> tuple[Commit | None, list[Record]]:
    """The newest checkpoint of a run: `newest`, or what was kept here of it, which is copied into the run.

    Args:
        refuse: raises UserError for a state that is not of this run.
    """
    folder = str(_folder(run_dir))
    kept, passed = load.newest(folder, cache_dir) if os.path.isdir(folder) else (None, [])
    notices: list[Record] = list(passed)
    if kept is None:
        return newest, notices
    try:
        refuse(kept)
    except UserError as error:
        return newest, [
            *notices,
            Notice(step=0, text=f"{kept.url} was kept for this place, and is of another run: {error}"),
        ]
    if newest is None or newest.step < kept.step:
        newest = _copy(kept, run_dir, cache_dir)
        text = f"the state of step {kept.step}, which was kept in {kept.url}, is in {newest.url} now"
    else:
        text = f"{kept.url} is older than {newest.url}, and is deleted"
    objects.remove_tree(folder)
    return newest, [*notices, Notice(step=newest.step, text=text)]


def _copy(kept: Commit, run_dir: str, cache_dir: str) -> Commit:
    """UserError where the run's place does not take it."""
    url = unused_url(run_dir, kept.step, retention.folder_names(run_dir))
    try:
        for path, info in zip(load.verify(kept, cache_dir), kept.files, strict=True):
            objects.put_file(path, objects.join(url, info["name"]))
        objects.write_bytes(objects.join(url, COMMIT), objects.read_bytes(objects.join(kept.url, COMMIT)))
    except OSError as error:
        raise UserError(
            f"the state that is kept in {kept.url} cannot be written to {run_dir} ({sentence(error, url)}); mend that and "
            "start again"
        ) from error
    return read_commit(url)
