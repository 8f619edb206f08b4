"""What a save does in the background on one rank: files to disk or store, then the rank's part record.

The part record (`part-RANK-of-SIZE.json`) is a rank's word that its files are written, with their sizes and digests. The
main rank commits when every rank's word is there; it never reads the files again.
"""

import contextlib
import errno
import hashlib
import json
import threading
import time
from collections.abc import Callable
from typing import Any

from pipeline import documents, places
from pipeline.checkpoint import direct_io
from pipeline.checkpoint.snapshot import Image
from pipeline.errors import UserError
from pipeline.storage import objects
from pipeline.supervision.fault_points import reach

NUM_WRITERS = 4
"""Files of a rank that are hashed and written at a time: one processor hashes less than a fast disk takes."""
MAX_PART_WAIT_S = 600.0
"""The main rank waits no longer than this for another's part record after its own files are written."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Cancelled(Exception):
    """The save was given up, because another rank's part of it has failed or the run ends."""


def write_part(
    url: str, images: list[Image], *, rank: int, size: int, staging: str, give_up: threading.Event
) -> dict[str, Any]:
    """Write this rank's files into the checkpoint's folder, then its part record; returns the record."""
    place = objects.join(url, _part_name(rank, size))
    try:
        files = _write_files(url, images, staging, give_up)
    except Exception as error:
        if rank > 0:  # the main rank need not wait for a word that will not come
            with contextlib.suppress(Exception):
                objects.write_bytes(place, json.dumps({"error": sentence(error, url)}).encode())
        raise
    part = {"files": files, "kinds": sorted({k for image in images for k in image.kinds})}
    reach("part")
    objects.write_bytes(place, json.dumps(part).encode())
    reach("part written")
    return part


def wait_for_parts(
    url: str, writers: list[int], *, size: int, mine: dict[str, Any] | None, give_up: threading.Event
) -> list[dict[str, Any]]:
    """Part records of all ranks that write, in their order. OSError for one that says it failed, or does not come."""
    deadline_s = time.monotonic() + MAX_PART_WAIT_S
    parts = []
    for rank in writers:
        place = objects.join(url, _part_name(rank, size))
        part = mine if rank == 0 else None
        wait_s = 0.02
        while part is None:
            try:
                part = documents.read(place, dict[str, Any])
            except FileNotFoundError:
                if give_up.wait(wait_s):
                    raise Cancelled("given up") from None
                wait_s = min(2 * wait_s, 1.0)
                if time.monotonic() > deadline_s:
                    raise OSError(f"rank {rank} has not written its part within {MAX_PART_WAIT_S:.0f} s") from None
        if "error" in part:
            raise OSError(f"rank {rank}: {part['error']}")
        parts.append(part)
    return parts


def sentence(error: BaseException, url: str) -> str:
    """What went wrong, in one line, and what can be done where that is known."""
    number = getattr(error, "errno", None)
    if number in FULL:
        return f"no space left for {url}: make room there, or keep fewer checkpoints (keep_checkpoints)"
    text = " ".join(str(error).split())
    if text and (isinstance(error, UserError) or (isinstance(error, OSError) and number is None)):
        return text[:400]
    return f"{type(error).__name__}: {text[:400]}"


def _part_name(rank: int, size: int) -> str:
    return f"part-{rank:05d}-of-{size:05d}.json"


def _write_files(url: str, images: list[Image], staging: str, give_up: threading.Event) -> list[dict[str, Any]]:
    """Several files at a time; the first error of any stops all and is raised."""
    files: list[dict[str, Any] | None] = [None] * len(images)
    errors: list[BaseException] = []
    waiting = list(enumerate(images))[::-1]

    def work() -> None:
        while not errors:
            try:
                number, image = waiting.pop()
            except IndexError:
                return
            try:
                files[number] = _write_file(url, image, staging, errors, give_up)
            except BaseException as error:
                errors.append(error)

    # Daemons, as the thread that starts them: see Saver._start.
    threads = [
        threading.Thread(target=work, name=f"save-{i}", daemon=True) for i in range(min(NUM_WRITERS, len(images)))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [f for f in files if f is not None]


def _write_file(
    url: str, image: Image, staging: str, errors: list[BaseException], give_up: threading.Event
) -> dict[str, Any]:
    def check_cancelled() -> None:
        if errors or give_up.is_set():
            raise Cancelled("given up")

    memory = image.memory.numpy().data
    target = objects.join(url, image.name)
    if objects.is_local(url):
        digest = direct_io.write(objects.local_path(target), memory, image.size_bytes, check_cancelled)
        reach("file named")
    elif objects.takes_memory(url):
        digest = _upload(target, memory[: image.size_bytes], check_cancelled)
    else:
        # Other stores are given finished files only: a stream that breaks would publish what was sent so far.
        with places.temporary_folder("checkpoint", _staging(staging)) as folder:
            path = folder / image.name
            try:
                digest = direct_io.write(path, memory, image.size_bytes, check_cancelled)
            except OSError as error:
                if error.errno not in FULL:
                    raise
                raise OSError(
                    f"no space left in {folder}, where files wait for their upload: make room there, or set saving.staging"
                ) from error
            reach("file named")
            check_cancelled()
            reach("upload")
            objects.put_file(path, target)
            reach("uploaded")
    return {"name": image.name, "size_bytes": image.size_bytes, "sha256": digest}


def _upload(url: str, memory: memoryview, check_cancelled: Callable[[], None]) -> str:
    """Straight from memory, in parts that nobody sees before the last is there; hashed meanwhile. Returns the SHA-256."""
    digests: list[str] = []
    hashing = threading.Thread(target=lambda: digests.append(hashlib.sha256(memory).hexdigest()), daemon=True)
    hashing.start()
    reach("upload")
    objects.put_memory(url, memory, check_cancelled)
    reach("uploaded")
    hashing.join()
    return digests[0]


def _staging(folder: str) -> str | None:
    if not folder:
        return None
    path = objects.local_path(folder)
    path.mkdir(parents=True, exist_ok=True)
    return str(path)
