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

from __future__ import annotations

import hashlib
import json
import re
import time
from dataclasses import dataclass
from typing import Any

from pipeline.errors import UserError
from pipeline.storage import objects

FORMAT = 1
COMMIT = "commit.json"
PICKLES = (".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".bin")
_FILE = re.compile(r"[A-Za-z0-9][\w.-]*\.safetensors", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Commit:
    """A committed checkpoint: the content of its commit file, and where it lies."""

    url: str
    digest: str
    """SHA-256 of the commit file."""
    step: int
    samples: int
    num_updates: int
    shapes: dict[str, list[int]]
    kinds: list[str]
    files: list[dict[str, Any]]
    config: dict[str, Any]
    config_digest: str
    dataset: dict[str, Any]
    """name, url and digest of the training data."""
    classes: list[str]
    evaluation: dict[str, float]

    @property
    def size_bytes(self) -> int:
        return sum(f["size_bytes"] for f in self.files)


def checkpoints_url(run_dir: str) -> str:
    return objects.join(run_dir, "checkpoints")


def checkpoint_url(run_dir: str, step: int, attempt: int = 1) -> str:
    """Where a step's checkpoint lies; `attempt` > 1 where a damaged or unfinished one has the first name."""
    name = f"step_{step:08d}" if attempt == 1 else f"step_{step:08d}_{attempt:02d}"
    return objects.join(checkpoints_url(run_dir), name)


def place_in_order(url: str) -> tuple[int, int] | None:
    """(step, attempt) of a checkpoint's folder, which order the checkpoints of a run; None for any other folder."""
    match = re.fullmatch(r"step_(\d+)(?:_(\d+))?", url.rstrip("/").rsplit("/", 1)[-1])
    return (int(match[1]), int(match[2] or 1)) if match else None


def write_commit(
    url: str, *, step: int, kinds: list[str], files: list[dict[str, Any]], facts: dict[str, Any]
) -> Commit:
    """Make the checkpoint exist. `files` are names, sizes and digests of what is written; `facts` the other fields."""
    body = {"format": FORMAT, "step": step, "kinds": kinds, "files": files, "time_s": time.time(), **facts}
    objects.write_bytes(objects.join(url, COMMIT), json.dumps(body, indent=1).encode())
    return read_commit(url)


def read_commit(url: str) -> Commit:
    """The commit file of one checkpoint. Raises UserError if it is absent or not readable."""
    place = objects.join(url, COMMIT)
    try:
        data = objects.read_bytes(place)
    except FileNotFoundError:
        raise UserError(f"{url} is no checkpoint: it has no {COMMIT}; give a checkpoint or a run folder") from None
    return parse_commit(url, data)


def parse_commit(url: str, data: bytes) -> Commit:
    """The content of the commit file of `url`. Raises UserError if it is not readable, or names files that are not safe."""
    place = objects.join(url, COMMIT)
    try:
        body = json.loads(data)
        if body["format"] != FORMAT:
            raise UserError(
                f"{place} has format {body['format']}, this version reads {FORMAT}; use the version that wrote it"
            )
        names = [f for f in Commit.__dataclass_fields__ if f not in ("url", "digest")]
        commit = Commit(url=url, digest=hashlib.sha256(data).hexdigest(), **{n: body[n] for n in names})
        _check_files(commit)
        return commit
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{place} is damaged ({type(error).__name__}: {error}); use another checkpoint") from None


def _check_files(commit: Commit) -> None:
    """A commit file may come from anywhere: what it names is plain files beside it, of the one format that runs no code."""
    for info in commit.files:
        name, size = str(info["name"]), info["size_bytes"]
        if not _FILE.fullmatch(name):
            raise UserError(
                f"checkpoint {commit.url} names {name!r}, and files of a checkpoint are *.safetensors beside its {COMMIT}; "
                "nothing of it was read"
            )
        if not isinstance(size, int) or size < 0 or not re.fullmatch("[0-9a-f]{64}", str(info["sha256"])):
            raise ValueError(f"size or SHA-256 of {name}")
    if len({info["name"] for info in commit.files}) != len(commit.files):
        raise ValueError("a file is named twice")


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
