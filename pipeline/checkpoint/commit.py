"""Checkpoints: fragments by parameter name, and a commit file, written last, that makes them exist.

    RUN/checkpoints/step_00001200/fragments-00000-of-00002.safetensors    each rank's part of weights, momentum, ema
                                  fragments-00001-of-00002.safetensors    (several files where it is large: .000, .001)
                                  part-00000-of-00002.json                each rank's word: these files, sizes, SHA-256
                                  part-00001-of-00002.json
                                  commit.json                             all of them, configuration, position

Written by `pipeline.checkpoint.saver`, thinned out by `pipeline.checkpoint.retention`; this module names, reads and verifies.

Law: a checkpoint exists when its commit file exists; the newest is found by listing commit files, never by a pointer. One
that does not verify is passed over, kept where it is, and reported. The layout does not know the ZeRO stage: tensors are
named "kind/parameter@first element", so any number of ranks at any stage reads what any other wrote.

Nothing here is pickled; loading runs no code from a file.
"""

import hashlib
import json
import math
import re
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypedDict

from msgspec import Meta

from pipeline import documents
from pipeline.documents import Count, Dimensions, FileName, RelativePath, Sha256, Text
from pipeline.errors import UserError
from pipeline.storage import objects

FORMAT = 1
COMMIT = "commit.json"
PICKLES = (".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".bin")
BufferType = Literal["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"]
"""As safetensors calls it."""
_FILE = re.compile(r"[A-Za-z0-9][\w.-]*\.safetensors", re.ASCII)
_REMEDY = "use another checkpoint"


class FileInfo(TypedDict):
    """What a commit file, or an export's description, says of a file next to it."""

    name: RelativePath
    size_bytes: Count
    sha256: Sha256


class Expected(TypedDict):
    """What a run that goes on from a checkpoint is held against (`pipeline.training.resume_check`)."""

    sums: dict[Text, float]
    """Kind of state -> `Engine.state_sums`."""
    next_samples: Text
    """Digest of the samples that come next."""
    losses: list[float]
    """Of the last updates before it, oldest first;"""
    gradient_norms: list[float]
    """and their gradients' norms."""


@dataclass(frozen=True, kw_only=True)
class Commit:
    """A committed checkpoint: the content of its commit file, and where it lies."""

    url: str
    digest: str
    """SHA-256 of the commit file."""
    step: Count
    samples: Count
    num_updates: Count
    shapes: dict[Text, Dimensions]
    kinds: Annotated[list[FileName], Meta(min_length=1, max_length=16)]
    files: list[FileInfo]
    config: dict[str, Any]
    config_digest: Text
    dataset: dict[str, Any]
    """name, url and digest of the training data."""
    classes: list[Text]
    evaluation: dict[Text, float]
    expected: Expected | None = None
    """None of an earlier version."""
    buffers: dict[Text, BufferType] = field(default_factory=dict)
    """Those of `shapes` that are no parameters, with their types; they have weights and averages, and no momentum."""

    @property
    def size_bytes(self) -> int:
        return sum(f["size_bytes"] for f in self.files)


def checkpoints_url(run_dir: str) -> str:
    return objects.join(run_dir, "checkpoints")


def checkpoint_url(run_dir: str, step: int, attempt: int = 1) -> str:
    """Where a step's checkpoint lies; `attempt` > 1 where a damaged or unfinished one has the first name."""
    name = f"step_{step:08d}" if attempt == 1 else f"step_{step:08d}_{attempt:02d}"
    return objects.join(checkpoints_url(run_dir), name)


def unused_url(run_dir: str, step: int, taken: Collection[str]) -> str:
    """Where a step's checkpoint may be written: under the first name that no folder has, `taken` being those of all."""
    attempt = 1
    while (url := checkpoint_url(run_dir, step, attempt)).rsplit("/", 1)[-1] in taken:
        attempt += 1
    return url


def place_in_order(url: str) -> tuple[int, int] | None:
    """(step, attempt) of a checkpoint's folder, which order the checkpoints of a run; None for any other folder."""
    match = re.fullmatch(r"step_(\d+)(?:_(\d+))?", url.rstrip("/").rsplit("/", 1)[-1])
    return (int(match[1]), int(match[2] or 1)) if match else None


def write_commit(url: str, *, step: int, kinds: list[str], files: list[FileInfo], facts: dict[str, Any]) -> Commit:
    """Make the checkpoint exist. `files` are names, sizes and digests of what is written; `facts` the other fields."""
    body = {"format": FORMAT, "step": step, "kinds": kinds, "files": files, "time_s": time.time(), **facts}
    # A value that is not finite would make the commit file unreadable: it is no JSON.
    body["evaluation"] = {name: value for name, value in facts["evaluation"].items() if math.isfinite(value)}
    objects.write_bytes(objects.join(url, COMMIT), json.dumps(body, indent=1, allow_nan=False).encode())
    return read_commit(url)


def read_commit(url: str) -> Commit:
    """The commit file of one checkpoint. Raises UserError if it is absent or not readable."""
    place = objects.join(url, COMMIT)
    try:
        data = objects.read_bytes(place, max_bytes=documents.MAX_BYTES + 1)
    except FileNotFoundError:
        raise UserError(f"{url} is no checkpoint: it has no {COMMIT}; give a checkpoint or a run folder") from None
    return parse_commit(url, data)


def parse_commit(url: str, data: bytes) -> Commit:
    """The content of the commit file of `url`. Raises UserError if it is not readable, or names files that are not safe."""
    place = objects.join(url, COMMIT)
    body = documents.parse_json(data, place, remedy=_REMEDY)
    check_format(body, FORMAT, place, remedy=f"{_REMEDY}, or the version that wrote it")
    commit = documents.convert(
        {**body, "url": url, "digest": hashlib.sha256(data).hexdigest()}, Commit, place, remedy=_REMEDY
    )
    _check_files(commit)
    return commit


def check_format(body: Any, format: int, place: str, *, remedy: str) -> None:
    """Of a document with its format's number in the field "format"."""
    found = body.get("format") if isinstance(body, dict) else None
    if type(found) is not int or found != format:
        raise UserError(f"{place} has format {documents.excerpt(found)}, this version reads {format}; {remedy}")


def _check_files(commit: Commit) -> None:
    """A commit file may come from anywhere: what it names is plain files next to it, of the one format that runs no code."""
    names = [info["name"] for info in commit.files]
    for name in names:
        if not _FILE.fullmatch(name):
            raise UserError(
                f"checkpoint {commit.url} names {name!r}, and files of a checkpoint are *.safetensors next to its {COMMIT}; "
                "nothing of it was read"
            )
    for what, listed in (("file", names), ("kind", commit.kinds)):
        if len(set(listed)) != len(listed):
            raise UserError(f"{objects.join(commit.url, COMMIT)} is not usable: a {what} is named twice; {_REMEDY}")


def refuse_pickle(url: str) -> None:
    """UserError where a name says that the file is a pickle, which may run code when it is opened."""
    if url.lower().endswith(PICKLES):
        raise UserError(
            f"{url} is a pickle by its name, which may run code when it is read, so it is not read; give a checkpoint "
            "folder, or a run folder"
        )


def committed(run_dir: str) -> list[str]:
    """URLs of all committed checkpoints of a run, newest first."""
    found = [u.rsplit("/", 1)[0] for u in objects.list_urls(checkpoints_url(run_dir), COMMIT)]
    return sorted(found, key=lambda u: place_in_order(u) or (-1, 0), reverse=True)
