"""Reading checkpoints: the newest that verifies, its weights and its state."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import safetensors
import torch

from pipeline import places
from pipeline.checkpoint.commit import COMMIT, Commit, committed, read_commit, refuse_pickle
from pipeline.errors import UserError
from pipeline.records import PassedOver
from pipeline.storage import objects

State = dict[str, dict[str, torch.Tensor]]
"""kind ("weights", "momentum", "ema") -> parameter name -> whole fp32 tensor."""


def verify(commit: Commit, cache_dir: str) -> list[Path]:
    """Local paths of the checkpoint's files, each of the committed size and SHA-256. Raises UserError otherwise."""
    paths = []
    for info in commit.files:
        place = objects.join(commit.url, info["name"])
        try:
            path = objects.fetch(place, sha256=info["sha256"], size_bytes=info["size_bytes"], cache_dir=cache_dir)
            size, digest = path.stat().st_size, objects.sha256_file(path)
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
    from pipeline.checkpoint import exported  # it reads commits, so it comes after this module

    refuse_pickle(url)
    if objects.exists(objects.join(url, COMMIT)):
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
    return str(places.cache_folder() / "checkpoints")
