"""Checkpoints: fragments by parameter name, and a commit file, written last, that makes them exist.

    RUN/checkpoints/step_00001200/fragments-00000-of-00002.safetensors    each rank's part of weights, momentum, ema
                                  fragments-00001-of-00002.safetensors    (several files where it is large: .000, .001)
                                  part-00000-of-00002.json                each rank's word: these files, sizes, SHA-256
                                  part-00001-of-00002.json
                                  commit.json                             all of them, configuration, position

Written by `pipeline.saver`, thinned out by `pipeline.retention`; this module names, reads and verifies.

Law: a checkpoint exists when its commit file exists; the newest is found by listing commit files, never by a pointer. One
that does not verify is passed over, kept where it is, and reported. The layout does not know the ZeRO stage: tensors are
named "kind/parameter@first element", so any number of ranks at any stage reads what any other wrote.

Nothing here is pickled; loading runs no code from a file.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors
import torch

from pipeline import storage
from pipeline.errors import UserError
from pipeline.records import PassedOver

FORMAT = 1
COMMIT = "commit.json"
PICKLES = (".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".bin")
_FILE = re.compile(r"[A-Za-z0-9][\w.-]*\.safetensors", re.ASCII)

State = dict[str, dict[str, torch.Tensor]]
"""kind ("weights", "momentum", "ema") -> parameter name -> whole fp32 tensor."""


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
    return storage.join(run_dir, "checkpoints")


def checkpoint_url(run_dir: str, step: int, attempt: int = 1) -> str:
    """Where a step's checkpoint lies; `attempt` > 1 where a damaged or unfinished one has the first name."""
    name = f"step_{step:08d}" if attempt == 1 else f"step_{step:08d}_{attempt:02d}"
    return storage.join(checkpoints_url(run_dir), name)


def place_in_order(url: str) -> tuple[int, int] | None:
    """(step, attempt) of a checkpoint's folder, which order the checkpoints of a run; None for any other folder."""
    match = re.fullmatch(r"step_(\d+)(?:_(\d+))?", url.rstrip("/").rsplit("/", 1)[-1])
    return (int(match[1]), int(match[2] or 1)) if match else None


def write_commit(
    url: str, *, step: int, kinds: list[str], files: list[dict[str, Any]], facts: dict[str, Any]
) -> Commit:
    """Make the checkpoint exist. `files` are names, sizes and digests of what is written; `facts` the other fields."""
    body = {"format": FORMAT, "step": step, "kinds": kinds, "files": files, "time_s": time.time(), **facts}
    storage.write_bytes(storage.join(url, COMMIT), json.dumps(body, indent=1).encode())
    return read_commit(url)


def read_commit(url: str) -> Commit:
    """The commit file of one checkpoint. Raises UserError if it is absent or not readable."""
    place = storage.join(url, COMMIT)
    try:
        data = storage.read_bytes(place)
    except FileNotFoundError:
        raise UserError(f"{url} is no checkpoint: it has no {COMMIT}; give a checkpoint or a run folder") from None
    return parse_commit(url, data)


def parse_commit(url: str, data: bytes) -> Commit:
    """The content of the commit file of `url`. Raises UserError if it is not readable, or names files that are not safe."""
    place = storage.join(url, COMMIT)
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


def verify(commit: Commit, cache_dir: str) -> list[Path]:
    """Local paths of the checkpoint's files, each of the committed size and SHA-256. Raises UserError otherwise."""
    paths = []
    for info in commit.files:
        place = storage.join(commit.url, info["name"])
        try:
            path = storage.fetch(place, sha256=info["sha256"], size_bytes=info["size_bytes"], cache_dir=cache_dir)
            size, digest = path.stat().st_size, storage.sha256_file(path)
        except (OSError, ValueError) as error:
            raise UserError(
                f"checkpoint {commit.url} does not verify: {info['name']}: {error}; use another one"
            ) from None
        if size != info["size_bytes"] or digest != info["sha256"]:
            raise UserError(
                f"checkpoint {commit.url} does not verify: {info['name']} has {size} bytes with SHA-256 {digest[:12]}, committed "
                f"were {info['size_bytes']} bytes with {info['sha256'][:12]}; use another one"
            )
        paths.append(path)
    return paths


def committed(run_dir: str) -> list[str]:
    """URLs of all committed checkpoints of a run, newest first."""
    found = [u.rsplit("/", 1)[0] for u in storage.list_urls(checkpoints_url(run_dir), COMMIT)]
    return sorted(found, key=lambda u: place_in_order(u) or (-1, 0), reverse=True)


def newest(run_dir: str, cache_dir: str) -> tuple[Commit | None, list[PassedOver]]:
    """The newest checkpoint that verifies, and those that were passed over on the way."""
    passed: list[PassedOver] = []
    for url in committed(run_dir):
        try:
            commit = read_commit(url)
            verify(commit, cache_dir)
            return commit, passed
        except UserError as error:
            passed.append(PassedOver(step=0, url=url, reason=str(error)))
    return None, passed


def load_state(commit: Commit, cache_dir: str, kinds: list[str] | None = None) -> State:
    """Whole tensors from all ranks' fragments. Raises UserError unless every element of every parameter was found once."""
    state: State = {k: {n: torch.zeros(s) for n, s in commit.shapes.items()} for k in kinds or commit.kinds}
    seen = {(k, n): 0 for k in state for n in state[k]}
    for path in verify(commit, cache_dir):
        with _open(path, commit.url) as file:
            for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                kind, name, start = _place(key, commit)
                if kind in state:
                    part = file.get_tensor(key).reshape(-1)
                    state[kind][name].view(-1)[int(start) : int(start) + part.numel()] = part
                    seen[kind, name] += part.numel()
    for (kind, name), count in seen.items():
        if count != math.prod(commit.shapes[name]):
            raise UserError(
                f"{commit.url} holds {count} elements of {kind} {name}; it should hold {commit.shapes[name]}"
            )
    return state


def _open(path: Path, url: str) -> Any:
    try:
        return safetensors.safe_open(path, framework="pt")
    except safetensors.SafetensorError as error:
        raise UserError(
            f"checkpoint {url} holds {path.name}, which is no safetensors file ({error}); use another one"
        ) from None


def _place(key: str, commit: Commit) -> tuple[str, str, str]:
    """(kind, parameter, first element) of an entry; those of an exported folder are whole and have their names only."""
    if "@" not in key:
        return commit.kinds[0], key, "0"
    kind, rest = key.split("/", 1)
    name, start = rest.rsplit("@", 1)
    return kind, name, start


def resolve(url: str, cache_dir: str) -> Commit:
    """A checkpoint's commit from its own URL, or the newest verified one of a run folder; an exported folder counts too."""
    from pipeline import exported  # it reads commits, so it comes after this module

    refuse_pickle(url)
    if storage.exists(storage.join(url, COMMIT)):
        return read_commit(url)
    if exported.is_exported(url):
        return exported.as_commit(url)
    commit, passed = newest(url, cache_dir)
    if commit is None:
        why = f"; {passed[0].reason}" if passed else ""
        raise UserError(f"no checkpoint at {url}{why}; give a run folder, or a folder with {COMMIT}")
    return commit


def load_weights(
    url: str, weights: Literal["evaluated", "ema", "raw"] = "evaluated", cache_dir: str | None = None
) -> tuple[dict[str, torch.Tensor], Commit]:
    """Weights by parameter name and the commit they come from. `url` is a checkpoint or a run folder."""
    cache = cache_dir or default_cache()
    commit = resolve(url, cache)
    kind = {"ema": "ema", "raw": "weights", "evaluated": "ema" if "ema" in commit.kinds else "weights"}[weights]
    if kind not in commit.kinds:
        raise UserError(f"{commit.url} keeps no {weights} weights (it has {', '.join(commit.kinds)}); ask for raw ones")
    return load_state(commit, cache, [kind])[kind], commit


def default_cache() -> str:
    return str(Path.home() / ".cache" / "normfree" / "checkpoints")
