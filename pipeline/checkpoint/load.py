"""Reading checkpoints: the newest that verifies, its weights and its state."""

import bisect
import contextlib
import functools
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import safetensors
import torch

from pipeline import places
from pipeline.checkpoint import exported
from pipeline.checkpoint.commit import COMMIT, Commit, FileInfo, committed, read_commit, refuse_pickle
from pipeline.checkpoint.snapshot import DTYPES
from pipeline.distributed import ALONE, World, ask_main, from_main, together
from pipeline.documents import excerpt
from pipeline.errors import UserError
from pipeline.records import PassedOver
from pipeline.storage import content_cache, objects

WhichWeights = Literal["evaluated", "ema", "raw"]
"""evaluated: the averaged ones where they were kept, else the raw ones."""
State = dict[str, dict[str, torch.Tensor]]
"""kind ("weights", "momentum", "ema") -> name -> whole tensor, fp32 but for buffers."""

_KEY = re.compile(r"([^/@]+)/([^@]+)@(0|[1-9][0-9]{0,15})")
_DTYPES = ("F16", "BF16", "F32", "F64")
_TORCH_TYPES = {name: dtype for dtype, name in DTYPES.items()}
_REMEDY = "use another one"


def verify(commit: Commit, cache_dir: str, files: Sequence[FileInfo] | None = None) -> list[Path]:
    """Local paths of the checkpoint's files (or of some), each of the committed size and SHA-256. Raises UserError otherwise.

    A file is hashed once a process; again where its size or time has changed since.
    """
    paths = []
    for info in commit.files if files is None else files:
        place = objects.join(commit.url, info["name"])
        try:
            path = content_cache.fetch(place, sha256=info["sha256"], size_bytes=info["size_bytes"], cache_dir=cache_dir)
            if not content_cache.verifies(path, info["sha256"], info["size_bytes"]):
                raise ValueError(
                    f"it has {path.stat().st_size} bytes, committed were {info['size_bytes']} with SHA-256 {info['sha256'][:12]}"
                )
        except (OSError, ValueError) as error:
            raise UserError(f"checkpoint {commit.url} does not verify: {info['name']}: {error}; {_REMEDY}") from None
        paths.append(path)
    return paths


def newest(run_dir: str, cache_dir: str, world: World = ALONE) -> tuple[Commit | None, list[PassedOver]]:
    """The newest checkpoint that verifies, and those that were passed over on the way.

    A collective of the world's ranks, of which each hashes its share of the files.
    """
    passed: list[PassedOver] = []
    for url in from_main(world, lambda: committed(run_dir)):
        try:
            commit = from_main(world, functools.partial(read_commit, url))
            together(world, functools.partial(verify, commit, cache_dir, _share(commit, world)))
            return commit, passed
        except UserError as error:
            passed.append(PassedOver(step=0, url=url, reason=str(error)))
    return None, passed


def _share(commit: Commit, world: World) -> list[FileInfo]:
    """Consecutive files: where as many ranks wrote the checkpoint, those that this one will read."""
    num = len(commit.files)
    return commit.files[world.rank * num // world.size : (world.rank + 1) * num // world.size]


class Piece(NamedTuple):
    """Consecutive elements of one parameter's state, and the tensor of one dimension that is to hold them."""

    kind: str
    name: str
    start: int
    values: torch.Tensor


def fill(commit: Commit, cache_dir: str, pieces: Iterable[Piece], world: World = ALONE) -> None:
    """Read what the pieces need, and no more, from a checkpoint that `newest` or `verify` has verified. A collective.

    Raises:
        UserError: the fragments do not hold every element of every parameter exactly once, which is known before any is
            read, or one that was read is not finite.
    """
    wanted = {(piece.kind, piece.name): piece for piece in pieces}  # a rank holds one run of each parameter
    listed = together(world, lambda: _listed(commit, cache_dir, _share(commit, world)))
    runs = [(key, piece.start, piece.start + piece.values.numel()) for key, piece in wanted.items()]
    # Only rank 0 hears of all parts: their number grows with the ranks, and all of them for each rank with its square.
    parts = ask_main(world, (listed, runs), lambda heard: _dealt_out(heard, commit))
    together(world, lambda: _copy(commit, cache_dir, parts, wanted))


def _dealt_out(heard: "Sequence[tuple[list[_Part], list[_Run]]]", commit: Commit) -> "list[list[_Part]]":
    """For each rank the parts that hold some of its runs."""
    parts = _in_order([part for listed, _ in heard for part in listed], commit, commit.kinds)
    return [[part for key, start, end in runs for part in _between(parts[key], start, end)] for _, runs in heard]


def _between(parts: "Sequence[_Part]", start: int, end: int) -> "Iterator[_Part]":
    """Those that hold some of the elements, of parts that follow each other without a gap."""
    first = bisect.bisect_right(parts, start, key=lambda part: part.start + part.num)
    return itertools.takewhile(lambda part: part.start < end, itertools.islice(parts, first, None))


def _copy(commit: Commit, cache_dir: str, parts: "Iterable[_Part]", wanted: Mapping[tuple[str, str], Piece]) -> None:
    infos = {info["name"]: info for info in commit.files}
    with contextlib.ExitStack() as stack:
        files: dict[str, Any] = {}
        for part in parts:
            piece = wanted[part.kind, part.name]
            start, end = max(part.start, piece.start), min(part.start + part.num, piece.start + piece.values.numel())
            if start >= end:
                continue
            if part.file not in files:
                files[part.file] = stack.enter_context(_open(infos[part.file], commit, cache_dir))
            found = _elements(files[part.file], part, start, end)
            if not torch.isfinite(found).all():
                what = f"{part.kind} of {part.name}"
                raise UserError(f"checkpoint {commit.url} holds {what} that are not finite; {_REMEDY}")
            piece.values[start - piece.start : end - piece.start].copy_(found)


def _elements(file: Any, part: "_Part", start: int, end: int) -> torch.Tensor:
    """Of the flattened parameter; of a fragment, which has one dimension, no more is read."""
    entry, wanted = file.get_slice(part.key), slice(start - part.start, end - part.start)
    if len(entry.get_shape()) == 1:
        return cast(torch.Tensor, entry[wanted])
    return cast(torch.Tensor, file.get_tensor(part.key)).reshape(-1)[wanted]


def load_state(commit: Commit, cache_dir: str, kinds: list[str] | None = None) -> State:
    """Whole tensors from all ranks' fragments, verified.

    Raises:
        UserError: as `verify` and `fill` do. Nothing is allocated before the checkpoint is known to be whole.
    """
    verify(commit, cache_dir)
    parts = _in_order(_listed(commit, cache_dir, commit.files), commit, kinds or commit.kinds)
    state: State = {
        kind: {n: torch.empty(commit.shapes[n], dtype=_type(commit, n)) for n in _names(commit, kind)}
        for kind in kinds or commit.kinds
    }
    wanted = {(kind, n): Piece(kind, n, 0, t.view(-1)) for kind, tensors in state.items() for n, t in tensors.items()}
    _copy(commit, cache_dir, itertools.chain.from_iterable(parts.values()), wanted)
    return state


class _Part(NamedTuple):
    """A run of elements of one parameter, in one file."""

    kind: str
    name: str
    start: int
    num: int
    file: str
    key: str


def _open(info: FileInfo, commit: Commit, cache_dir: str) -> Any:
    place = objects.join(commit.url, info["name"])
    try:
        path = content_cache.fetch(place, sha256=info["sha256"], size_bytes=info["size_bytes"], cache_dir=cache_dir)
        return safetensors.safe_open(path, framework="pt")
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(
            f"checkpoint {commit.url} holds {info['name']}, which is no safetensors file that can be read ({error}); {_REMEDY}"
        ) from None


_Run = tuple[tuple[str, str], int, int]
"""Kind and name of a parameter, first element, and the one behind the last."""


def _listed(commit: Commit, cache_dir: str, files: Sequence[FileInfo]) -> list[_Part]:
    return [part for info in files for part in _parts(info, commit, cache_dir)]


def _parts(info: FileInfo, commit: Commit, cache_dir: str) -> Iterator[_Part]:
    """What the header of a file lists: "kind/parameter@first element"; in an exported folder whole ones, by name only."""
    with _open(info, commit, cache_dir) as file:
        for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
            found = _KEY.fullmatch(key) if "@" in key else None
            if "@" in key and found is None:
                raise UserError(
                    f"checkpoint {commit.url} holds an entry {excerpt(key)!r}, which has no place; {_REMEDY}"
                )
            kind, name, start = found.groups() if found else (commit.kinds[0], key, "0")
            entry = file.get_slice(key)
            types = (commit.buffers[name],) if name in commit.buffers else _DTYPES
            if kind not in commit.kinds or not _is_kept(commit, kind, name) or entry.get_dtype() not in types:
                raise UserError(
                    f"checkpoint {commit.url} holds an entry {excerpt(key)!r} of type {entry.get_dtype()}, which its "
                    f"{COMMIT} does not know; {_REMEDY}"
                )
            yield _Part(kind, name, int(start), math.prod(entry.get_shape()), info["name"], key)


def _names(commit: Commit, kind: str) -> list[str]:
    """What is kept of a kind: of buffers weights and averages."""
    return [name for name in commit.shapes if _is_kept(commit, kind, name)]


def _is_kept(commit: Commit, kind: str, name: str) -> bool:
    return name in commit.shapes and (kind in ("weights", "ema") or name not in commit.buffers)


def _type(commit: Commit, name: str) -> torch.dtype:
    return _TORCH_TYPES[commit.buffers[name]] if name in commit.buffers else torch.float32


def _in_order(parts: list[_Part], commit: Commit, kinds: Sequence[str]) -> dict[tuple[str, str], list[_Part]]:
    """Of each parameter's state the parts, which follow each other without gap or overlap: every element exactly once.

    Raises:
        UserError: they do not.
    """
    found: dict[tuple[str, str], list[_Part]] = {(kind, name): [] for kind in kinds for name in _names(commit, kind)}
    ends = dict.fromkeys(found, 0)
    for part in sorted((part for part in parts if part.kind in kinds), key=lambda part: (part.start, part.num)):
        key = part.kind, part.name
        if part.start != ends[key]:
            what = "twice" if part.start < ends[key] else "not at all"
            at = min(part.start, ends[key])
            raise UserError(f"checkpoint {commit.url} holds element {at} of {part.kind} {part.name} {what}; {_REMEDY}")
        ends[key] += part.num
        found[key].append(part)
    for (kind, name), count in ends.items():
        if count != math.prod(commit.shapes[name]):
            raise UserError(
                f"checkpoint {commit.url} holds {count} elements of {kind} {name}; it should hold {commit.shapes[name]}; "
                f"{_REMEDY}"
            )
    return found


def resolve(url: str, cache_dir: str) -> Commit:
    """A checkpoint's commit from its own URL, or the newest verified one of a run folder; an exported folder counts too."""
    refuse_pickle(url)
    if url.startswith("hf://"):  # its library has a file system of that name, which verifies nothing
        raise UserError(f"{url} is on the Hub; fetch it with 'normfree pull {url} --to DIR', and give DIR")
    if objects.exists(objects.join(url, COMMIT)):
        return read_commit(url)
    if exported.is_exported(url):
        return exported.as_commit(url)
    commit, passed = newest(url, cache_dir)
    if commit is None:
        why = f"; {passed[0].reason}" if passed else ""
        raise UserError(f"no checkpoint at {url}{why}; give a run folder, or a folder with {COMMIT}")
    return commit


def load_weights(url: str, weights: WhichWeights = "evaluated") -> tuple[dict[str, torch.Tensor], Commit]:
    """Weights by parameter name and the commit they come from. `url` is a checkpoint or a run folder."""
    cache = default_cache()
    commit = resolve(url, cache)
    kind = {"ema": "ema", "raw": "weights", "evaluated": "ema" if "ema" in commit.kinds else "weights"}[weights]
    if kind not in commit.kinds:
        raise UserError(f"{commit.url} keeps no {weights} weights (it has {', '.join(commit.kinds)}); ask for raw ones")
    return load_state(commit, cache, [kind])[kind], commit


def default_cache() -> str:
    return str(places.cache_folder() / "checkpoints")
