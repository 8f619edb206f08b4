"""Weights in files: published ones of any kind in, our own in and out. What a file is, its first bytes and names tell."""

import json
import mmap
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch

from nfnet.model import NFNet
from nfnet.weights.haiku import load_haiku, unflattened
from nfnet.weights.npz import check_archive, read_npz
from nfnet.weights.pickle_program import check_program
from nfnet.weights.safe_pickle import read_pickle
from nfnet.weights.state_dict import LoadReport, load_entries, plain_names
from nfnet.weights.timm import from_timm, is_timm

_LEGACY_TORCH = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
"""torch.save before its zip format: a pickle that begins with this number."""
KEY, FORMAT = "written_by", "normfree-1"


def load_published(model: NFNet, path: str | Path, *, which: str | None = None) -> LoadReport:
    """Load a file of weights; its values go into the model's own parameters, on their device and in their precision.

    - DeepMind's released networks (F0_haiku.npz, ...: pickles in spite of their name) and checkpoints of their training
      code; arrays saved with numpy.savez under "module/name";
    - timm's state dicts, .safetensors, .bin or .pth;
    - what `save_weights` wrote.

    No code in the file is run: pickles yield arrays and plain containers or are refused (`nfnet.weights.safe_pickle`), torch's
    own files are read with weights_only. A head of another size keeps the model's fresh weights, and the report says so.

    Args:
        which: entry of a checkpoint with several sets of parameters, such as "params"; default: the averaged ones.
    Raises:
        ValueError: no such file, a damaged or refused one, or one of another network: the first differing entries, both
            shapes and what to change. The model is as it was.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {path}; give the path of a file of weights")
    content = _read(path)
    entries, notes = plain_names(content) if isinstance(content, Mapping) else ({}, ())
    if is_timm(entries):
        return from_timm(model, content, str(path))
    if any(isinstance(v, torch.Tensor) and k.startswith("blocks.") for k, v in entries.items()):
        return load_entries(model, entries, str(path), notes=notes)
    return load_haiku(model, content, str(path), which=which)


def save_weights(model: NFNet, path: str | Path) -> None:
    """Write the weights as safetensors, with what `load_model` needs to build the network again.

    Raises:
        ValueError: the network was not made by `create_model`, so that its options are not known.
    """
    if model.options is None:
        raise ValueError("the network was not made by nfnet.create_model, so its options cannot be saved; use that")
    description = {
        KEY: FORMAT,
        "name": model.variant.name,
        "num_classes": str(model.num_classes),
        "options": json.dumps(model.options, sort_keys=True),
    }
    save_tensors(model.state_dict(), path, description)


def save_tensors(tensors: Mapping[str, torch.Tensor], path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors as safetensors; readers such as timm want to be told that they are torch's."""
    from safetensors.torch import save_file

    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata={"format": "pt", **(metadata or {})})


def load_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """What `save_tensors` wrote, by name. Raises ValueError for a damaged file."""
    found: dict[str, torch.Tensor] = _read_safetensors(Path(path))
    return found


def read_description(path: str | Path) -> tuple[str, int, dict[str, Any]]:
    """Name, number of classes and options of the network whose weights `save_weights` wrote. Raises ValueError."""
    import safetensors

    try:
        with safetensors.safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
        if FORMAT in (found.get(KEY), found.get("format")):  # where earlier versions had it
            return found["name"], int(found["num_classes"]), dict(json.loads(found["options"]))
    except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as a file of nfnet.save_weights: {error}; save it again") from None
    raise ValueError(
        f"{path} does not say which network it is of; create that and call nfnet.load_published(model, path)"
    )


def check_file(path: str | Path) -> None:
    """For readers of other libraries (timm's), who hand a file to torch or numpy as it is: what `load_published` checks first.

    Raises:
        ValueError: its pickle would take time or memory without bound, or its archive claims more than weights can be.
    """
    with open(path, "rb") as file:
        start = file.read(16)
        if start[:4] == b"PK\x03\x04":
            _check_zip(file, Path(path))
        elif start.startswith(_LEGACY_TORCH):
            _check_legacy(Path(path))
        elif start[8:9] != b"{":  # torch would run the file's first pickle to see whether it is one of its own
            raise ValueError(f"{path} is no file of weights of safetensors, torch or numpy; fetch it again")


def _read(path: Path) -> Any:
    """Containers and tensors, whatever the format."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(16)
        file.seek(0)
        if start[:4] == b"PK\x03\x04":
            return _read_zip(file, path)
        if start.startswith(_LEGACY_TORCH):
            _check_legacy(path)
            return _read_torch(path)
        # safetensors: the length of the header, then the header, a JSON object.
        if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= size:
            return _read_safetensors(path)
        if not start:
            raise ValueError(f"{path} is empty; fetch it again")
        return read_pickle(file, str(path))


def _check_zip(file: IO[bytes], path: Path) -> list[str]:
    """The members that are programs."""
    try:
        with zipfile.ZipFile(file) as archive:
            check_archive(archive, file)
            programs = [name for name in archive.namelist() if name.endswith("/data.pkl") or name == "data.pkl"]
            for name in programs:
                check_program(archive.read(name))
    except Exception as error:  # a damaged archive can fail in any way
        raise ValueError(f"{path} is damaged or refused ({_reason(error)}); fetch it again") from None
    return programs


def _read_zip(file: IO[bytes], path: Path) -> Any:
    if _check_zip(file, path):
        return _read_torch(path)
    file.seek(0)
    return unflattened(read_npz(file, str(path)))


def _check_legacy(path: Path) -> None:
    """The five pickles (magic number, version, system, contents, storages) that an old file of torch begins with."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for _ in range(5):
                check_program(data)
    except ValueError as error:
        raise ValueError(f"{path} is damaged or refused ({_reason(error)}); fetch it again") from None


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _read_torch(path: Path) -> Any:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        first = "".join(c for c in (str(error).splitlines() or [""])[0][:300] if c.isprintable())
        raise ValueError(
            f"{path} is refused, nothing of it was run: torch found more than weights in it ({first}); "
            "if you trust the file, save its state dict alone, best as safetensors, where it was made"
        ) from None
    except Exception as error:  # a damaged file can fail in any way
        raise ValueError(f"{path} is damaged ({_reason(error)}); fetch it again") from None
    for tensor in _tensors(content, 8):
        # A view may be larger than what it is of: four bytes of a file, and as many elements as it says.
        if tensor.layout != torch.strided or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ValueError(
                f"{path} is refused: it holds a sparse or expanded tensor; save plain ones where it was made"
            )
    return content


def _tensors(content: Any, depth: int) -> Iterator[torch.Tensor]:
    if isinstance(content, torch.Tensor):
        yield content
    elif isinstance(content, Mapping) and depth:
        for value in content.values():
            yield from _tensors(value, depth - 1)


def _read_safetensors(path: Path) -> Any:
    import safetensors
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); fetch it again") from None
