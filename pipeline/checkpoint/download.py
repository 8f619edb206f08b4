"""The files of a commit into preallocated local files: in parts, by several threads, each part noted once it is there.

Parts on disk are believed only after the whole file's SHA-256. It is computed while others still fetch: whoever brings a part
carries the hash of its file on over all parts that follow without a gap. Nobody waits for the disk: what a power cut takes from
a finished file is noticed when the checkpoint is loaded, which verifies it again, and it can be pulled once more.
"""

import contextlib
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline import documents, places
from pipeline.checkpoint.commit import Commit, FileInfo
from pipeline.checkpoint.part_writer import FULL
from pipeline.errors import UserError
from pipeline.storage import objects, range_reads

PART_BYTES = 8 << 20
NUM_AT_ONCE = 8
"""Parts on their way at a time; each thread keeps one in memory."""
JOURNAL = f"{objects.TEMP_PREFIX}pull.jsonl"

Progress = Callable[[int, int], None]
"""(bytes there, bytes in all)"""
Parts = set[tuple[int, int]]
"""(number of the file, number of the part)"""


class Damaged(UserError):
    """What the store holds is not what the commit file says."""


@contextlib.contextmanager
def journal_of(work: Path, commit: Commit) -> Iterator[tuple[int, Parts]]:
    """The locked journal in `work` (a file descriptor) and the parts of this commit that it says are there.

    Parts of any other commit are deleted. UserError if the folder cannot be written, or another process pulls into it.
    """
    try:
        work.mkdir(parents=True, exist_ok=True)
        journal = os.open(work / JOURNAL, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as error:
        raise UserError(f"cannot write to {work} ({error.strerror}); give another folder with --to") from None
    try:
        if places.lock(journal, wait=False) is False:
            raise UserError(f"another pull works on {work}; wait for it, or give another folder with --to")
        lines = list(_lines(os.pread(journal, os.fstat(journal).st_size, 0)))
        if not lines or lines[0] != _head(commit):
            for path in work.iterdir():
                if path.name != JOURNAL:
                    path.unlink()
            _write_journal(journal, commit, set())
            lines = lines[:1]
            yield journal, set()
        else:
            yield journal, {(int(file), int(part)) for file, part in lines[1:]}
    finally:
        os.close(journal)


def _head(commit: Commit) -> dict[str, Any]:
    return {"digest": commit.digest, "part_bytes": PART_BYTES}


def _write_journal(journal: int, commit: Commit, parts: Parts) -> None:
    os.ftruncate(journal, 0)
    for value in (_head(commit), *sorted(parts)):
        _append(journal, value)


def _append(journal: int, value: Any) -> None:
    os.write(journal, b"\n" + json.dumps(value).encode() + b"\n")  # a torn line before it stays a line of its own


def _lines(data: bytes) -> Iterator[Any]:
    for line in data.split(b"\n"):
        with contextlib.suppress(ValueError):  # the last line of a pull that was killed in it
            yield documents.parse_json(line, "a line of the journal")


class _File:
    """One file of the commit: what is known of it, and how far its hash has come."""

    def __init__(self, commit: Commit, number: int, folder: Path) -> None:
        info = commit.files[number]
        self.number, self.size_bytes, self.sha256 = number, int(info["size_bytes"]), str(info["sha256"])
        self.name, self.path = str(info["name"]), folder / info["name"]
        self.url = objects.join(commit.url, info["name"])
        self.num_parts = -(-self.size_bytes // PART_BYTES)
        self.version: range_reads.ObjectVersion | None = None
        self.descriptor = -1
        self.rewind()

    def rewind(self) -> None:
        self.hashing, self.num_hashed, self.lock = hashlib.sha256(), 0, threading.Lock()

    def length(self, part: int) -> int:
        return min(PART_BYTES, self.size_bytes - part * PART_BYTES)


class Download:
    """All files of one commit into the folder `work`."""

    def __init__(
        self, commit: Commit, work: Path, journal: int, done: Parts, connections: int, progress: Progress | None
    ) -> None:
        self.fetched_bytes = 0
        self._commit, self._work, self._journal = commit, work, journal
        self._files = [_File(commit, number, work) for number in range(len(commit.files))]
        self._done = {(f, p) for f, p in done if f < len(self._files) and p < self._files[f].num_parts}
        self._num_threads = max(1, connections)
        self._progress = progress or (lambda there, total: None)
        self._lock = threading.Lock()
        self._errors: list[BaseException] = []
        self._wrong: list[_File] = []
        """Files whose parts are all there and whose SHA-256 is another."""

    def run(self) -> None:
        """Returns when every file verifies. Damaged where the store holds other bytes, UserError where it stops."""
        try:
            self._make_room()
            todo = self._files
            for _ in range(2):  # a second download tells damaged parts from a damaged object
                self._round(todo)
                todo, self._wrong = self._wrong, []
                if not todo:
                    return
                self._forget(todo)
            raise self._damaged(
                todo[0], f"is not the {todo[0].size_bytes} bytes with SHA-256 {todo[0].sha256[:12]} committed"
            )
        finally:
            for file in self._files:
                if file.descriptor >= 0:
                    os.close(file.descriptor)

    def _make_room(self) -> None:
        """Take the space of all files before the first byte comes, so that a full disk is known now."""
        made = []
        try:
            for file in self._files:
                made += [] if file.path.exists() else [file.path]
                file.descriptor = os.open(file.path, os.O_RDWR | os.O_CREAT, 0o644)
                if file.size_bytes:
                    os.posix_fallocate(file.descriptor, 0, file.size_bytes)
                os.ftruncate(file.descriptor, file.size_bytes)
        except OSError as error:
            for path in made:
                path.unlink(missing_ok=True)
            if not self._done:
                shutil.rmtree(self._work)
            if error.errno in FULL:
                raise UserError(
                    f"no space for {self._commit.size_bytes} bytes in {self._work.parent}: make room there, or give another "
                    "folder with --to"
                ) from None
            raise UserError(f"cannot write to {self._work} ({error.strerror}); give another folder with --to") from None

    def _round(self, files: list[_File]) -> None:
        total = self._commit.size_bytes
        self._there = sum(self._files[f].length(p) for f, p in self._done)
        self._progress(self._there, total)
        waiting = iter([(f, p) for f in files for p in range(f.num_parts) if (f.number, p) not in self._done])
        whole = iter([f for f in files if all((f.number, p) in self._done for p in range(f.num_parts))])

        def work() -> None:
            buffer = memoryview(bytearray(PART_BYTES))
            try:
                while not self._errors:
                    with self._lock:
                        known = next(whole, None)
                        part = next(waiting, None) if known is None else None
                    if known is not None:
                        self._advance(known, at_end=True)
                    elif part is not None:
                        self._fetch(*part, buffer)
                        self._progress(self._there, total)
                    else:
                        return
            except BaseException as error:
                self._errors.append(error)

        threads = [threading.Thread(target=work, name=f"pull-{i}", daemon=True) for i in range(self._num_threads)]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException as error:  # Ctrl-C: no thread begins another part
            self._errors.append(error)
            for thread in threads:
                thread.join()
            raise
        if self._errors:
            self._give_up(self._errors[0])

    def _fetch(self, file: _File, part: int, buffer: memoryview) -> None:
        version = file.version = file.version or range_reads.version(file.url)
        if version.size_bytes != file.size_bytes:
            raise self._damaged(file, f"has {version.size_bytes} bytes, committed were {file.size_bytes}")
        came = piece = buffer[: file.length(part)]
        range_reads.read_into(file.url, part * PART_BYTES, piece, version)
        at, num_bytes = part * PART_BYTES, len(piece)
        while piece:
            written = os.pwrite(file.descriptor, piece, at)
            piece, at = piece[written:], at + written
        with self._lock:
            _append(self._journal, (file.number, part))
            self._done.add((file.number, part))
            self.fetched_bytes += num_bytes
            self._there += num_bytes
            is_whole = all((file.number, p) in self._done for p in range(file.num_parts))
        self._advance(file, at_end=is_whole, came=(part, came))

    def _advance(self, file: _File, *, at_end: bool, came: tuple[int, memoryview] | None = None) -> None:
        """Carry the hash of the file on; at its end, judge it. One thread at a time: others do not wait, but at the end.

        `came` is a part that is still in memory.
        """
        if not file.lock.acquire(blocking=at_end):
            return
        try:
            while (file.number, file.num_hashed) in self._done:
                if came is not None and came[0] == file.num_hashed:
                    data: bytes | memoryview = came[1]
                else:
                    data = os.pread(file.descriptor, file.length(file.num_hashed), file.num_hashed * PART_BYTES)
                file.hashing.update(data)
                file.num_hashed += 1
            if not at_end:
                return
            if file.hashing.hexdigest() != file.sha256:
                self._wrong.append(file)
            elif not _is_safetensors(file.path):
                raise self._damaged(file, "is no safetensors file")
        finally:
            file.lock.release()

    def _forget(self, files: list[_File]) -> None:
        numbers = {file.number for file in files}
        self._done = {(f, p) for f, p in self._done if f not in numbers}
        _write_journal(self._journal, self._commit, self._done)
        for file in files:
            file.rewind()

    def _damaged(self, file: _File, what: str) -> Damaged:
        return Damaged(f"checkpoint {self._commit.url} does not verify: {file.name} {what}; use another one")

    def _give_up(self, error: BaseException) -> None:
        if isinstance(error, FileNotFoundError | range_reads.ObjectChanged):
            raise Damaged(f"checkpoint {self._commit.url} changed while it was pulled ({error}); pull again") from None
        if isinstance(error, UserError) or not isinstance(error, Exception):
            raise error
        text = " ".join(str(error).split())[:200]
        raise UserError(
            f"the pull of {self._commit.url} broke off at {self._there} of {self._commit.size_bytes} bytes "
            f"({type(error).__name__}: {text}); what has come is kept in {self._work}, and the same command goes on"
        ) from error


def verifies(path: Path, info: FileInfo) -> bool:
    """Whether the local file has the size and the SHA-256 of a commit file's entry."""
    try:
        return path.stat().st_size == info["size_bytes"] and objects.sha256_file(path) == info["sha256"]
    except OSError:
        return False


def _is_safetensors(path: Path) -> bool:
    """Whether the file begins as the format says: the length of a JSON object, then that object."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > documents.MAX_BYTES:
            return False
        try:
            return isinstance(documents.parse_json(file.read(length), str(path)), dict)
        except ValueError:
            return False
