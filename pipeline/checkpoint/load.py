"""Reading checkpoints: the newest that verifies, its weights and its state."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import safetensors
import torch

from pipeline import places
from pipeline.checkpoint.commit import COMMIT, Commit, committed, read_commit, refuse_pickle
from pipeline.documents import excerpt
from pipeline.errors import UserError
from pipeline.records import PassedOver
from pipeline.storage import content_cache, objects

State = dict[str, dict[str, torch.Tensor]]
"""kind ("weights", "momentum", "ema") -> parameter name -> whole fp32 tensor."""

_KEY = re.compile(r"([^/@]+)/([^@]+)@(0|[1-9][0-9]{0,15})")
_DTYPES = ("F16", "BF16", "F32", "F64")
_REMEDY = "use another one"


def verify(commit: Commit, cache_dir: str) -> list[Path]:
    """Local paths of the checkpoint's files, each of the committed size and SHA-256. Raises UserError otherwise."""
    paths = []
    for info in commit.files:
        place = objects.join(commit.url, info["name"])
        try:
            path = content_cache.fetch(place, sha256=info["sha256"], size_bytes=info["size_bytes"], cache_dir=cache_dir)
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
    """Whole fp32 tensors from all ranks' fragments.

    Raises:
        UserError: the checkpoint does not verify, its fragments do not hold every element of every parameter exactly once,
            or one of them is not finite. Nothing is allocated before the first two are known.
    """
    wanted = kinds or commit.kinds
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(_open(path, commit.url)) for path in verify(commit, cache_dir)]
        parts = [part for file in files for part in _parts(file, commit) if part.kind in wanted]
        _check_complete(parts, commit, wanted)
        state: State = {kind: {n: torch.empty(s) for n, s in commit.shapes.items()} for kind in wanted}
        for part in parts:
            values = part.file.get_tensor(part.key).reshape(-1)
            state[part.kind][part.name].view(-1)[part.start : part.start + part.num] = values
    for kind, tensors in state.items():
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise UserError(f"checkpoint {commit.url} holds {kind} of {name} that are not finite; use another one")
    return state


class _Part(NamedTuple):
    """A run of elements of one parameter, in one file."""

    kind: str
    name: str
    start: int
    num: int
    file: Any
    key: str


def _open(path: Path, url: str) -> Any:
    try:
        return safetensors.safe_open(path, framework="pt")
    except safetensors.SafetensorError as error:
        raise UserError(
            f"checkpoint {url} holds {path.name}, which is no safetensors file ({error}); use another one"
        ) from None


def _parts(file: Any, commit: Commit) -> Iterator[_Part]:
    """What the header of a file lists: "kind/parameter@first element"; in an exported folder whole ones, by name only."""
    for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
        found = _KEY.fullmatch(key) if "@" in key else None
        if "@" in key and found is None:
            raise UserError(f"checkpoint {commit.url} holds an entry {excerpt(key)!r}, which has no place; {_REMEDY}")
        kind, name, start = found.groups() if found else (commit.kinds[0], key, "0")
        entry = file.get_slice(key)
        if kind not in commit.kinds or name not in commit.shapes or entry.get_dtype() not in _DTYPES:
            raise UserError(
                f"checkpoint {commit.url} holds an entry {excerpt(key)!r} of type {entry.get_dtype()}, which its "
                f"{COMMIT} does not know; {_REMEDY}"
            )
        yield _Part(kind, name, int(start), math.prod(entry.get_shape()), file, key)


def _check_complete(parts: list[_Part], commit: Commit, kinds: list[str]) -> None:
    """Every element of every parameter exactly once: the parts of each follow each other without gap or overlap."""
    ends = {(kind, name): 0 for kind in kinds for name in commit.shapes}
    for part in sorted(parts, key=lambda part: (part.start, part.num)):
        if part.start != ends[part.kind, part.name]:
            what = "twice" if part.start < ends[part.kind, part.name] else "not at all"
            at = min(part.start, ends[part.kind, part.name])
            raise UserError(f"checkpoint {commit.url} holds element {at} of {part.kind} {part.name} {what}; {_REMEDY}")
        ends[part.kind, part.name] += part.num
    for (kind, name), count in ends.items():
        if count != math.prod(commit.shapes[name]):
            raise UserError(
                f"checkpoint {commit.url} holds {count} elements of {kind} {name}; it should hold {commit.shapes[name]}; "
                f"{_REMEDY}"
            )


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
