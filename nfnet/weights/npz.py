"""NumPy arrays without NumPy: an array as bytes, and the .npy and .npz files that hold some.

Nothing here trusts what it reads: sizes are compared before memory is asked for, and no array of Python objects passes.
"""

import ast
import math
import re
import zipfile
from typing import IO, Any

import torch

_DTYPES = {
    "f2": torch.float16,
    "f4": torch.float32,
    "f8": torch.float64,
    "i1": torch.int8,
    "i2": torch.int16,
    "i4": torch.int32,
    "i8": torch.int64,
    "u1": torch.uint8,
    "u2": torch.uint16,
    "u4": torch.uint32,
    "u8": torch.uint64,
    "b1": torch.bool,
    "bfloat16": torch.bfloat16,
}
_MAX_HEADER_BYTES = 1 << 16
_MAX_DIMENSIONS = 32
_FREE_BYTES = 64 << 20
_MAX_RATIO = 20
"""Weights hardly compress; an archive that claims more than this, and 64 MiB, is no file of weights."""


def show(value: object) -> str:
    """A value from a file for a sentence: short, on one line, and in bounded time, which repr of a tree is not."""
    if isinstance(value, str | bytes):
        return ascii(value[:60])[:80].strip("'")
    if isinstance(value, tuple) and len(value) <= 8 and all(type(n) is int and abs(n) < 1 << 64 for n in value):
        return str(value)
    return str(value) if isinstance(value, bool | float | None) else f"a {type(value).__name__}"


def torch_dtype(code: object) -> torch.dtype:
    """NumPy's type code without its byte order ("f4") -> torch's. Raises ValueError for all that is not a number."""
    if not isinstance(code, str) or code not in _DTYPES:
        what = "Python objects" if isinstance(code, str) and code.startswith("O") else f"type {show(code)}"
        raise ValueError(f"an array of {what} holds no weights")
    return _DTYPES[code]


class Array:
    """A NumPy array as it was stored; its memory becomes a tensor when asked."""

    __slots__ = ("big_endian", "data", "dtype", "fortran", "shape")

    def __init__(
        self, data: Any, dtype: torch.dtype, shape: object, *, fortran: bool = False, big_endian: bool = False
    ) -> None:
        if not isinstance(shape, tuple) or any(type(n) is not int or n < 0 for n in shape):
            raise ValueError(f"an array has the shape {show(shape)}")
        if len(shape) > _MAX_DIMENSIONS:
            raise ValueError(f"an array has {len(shape)} dimensions")
        if not isinstance(data, bytes | bytearray):
            raise ValueError(f"an array's memory is of type {type(data).__name__}")
        claimed = math.prod(shape) * dtype.itemsize
        if claimed != len(data):
            amount = claimed if claimed < 1 << 80 else "too many"
            raise ValueError(f"an array of shape {show(shape)} claims {amount} bytes where the file holds {len(data)}")
        self.data, self.dtype, self.shape = data, dtype, shape
        self.fortran, self.big_endian = fortran, big_endian

    def __setstate__(self, state: object) -> None:
        raise ValueError("an array is changed after it was made")

    def take_tensor(self) -> torch.Tensor:
        """A tensor of its own memory, in C order and this machine's byte order; the array is empty afterwards."""
        if not self.data:
            return torch.empty(self.shape, dtype=self.dtype)
        raw = torch.frombuffer(bytearray(self.data), dtype=torch.uint8)
        self.data = b""  # files of gigabytes: only one array at a time is held twice
        if self.big_endian:
            raw = raw.view(-1, self.dtype.itemsize).flip(1).reshape(-1)
        flat = raw.view(self.dtype)
        if self.fortran:
            return flat.reshape(self.shape[::-1]).permute(*reversed(range(len(self.shape)))).contiguous()
        return flat.reshape(self.shape)


def read_npy(file: IO[bytes]) -> Array:
    """One .npy file (versions 1 to 3). Raises ValueError for what is none, is cut short or holds objects."""
    start = file.read(8)
    if len(start) != 8 or start[:6] != b"\x93NUMPY" or start[6] not in (1, 2, 3):
        raise ValueError("it is no .npy file")
    length = int.from_bytes(file.read(2 if start[6] == 1 else 4), "little")
    if length > _MAX_HEADER_BYTES:
        raise ValueError(f"its header claims {length} bytes")
    try:
        header = ast.literal_eval(file.read(length).decode("latin1"))
        descr, fortran, shape = header["descr"], header["fortran_order"], header["shape"]
    except (ValueError, SyntaxError, TypeError, KeyError, MemoryError, RecursionError) as error:
        raise ValueError(f"its header cannot be read ({type(error).__name__})") from None
    found = re.fullmatch(r"([<>|=]?)(\w+)", descr) if isinstance(descr, str) else None
    dtype = torch_dtype(found[2] if found else descr)
    if not isinstance(shape, tuple) or any(type(n) is not int or n < 0 for n in shape):
        raise ValueError(f"its shape is {show(shape)}")
    # One byte more than claimed, so that a longer array is seen too; a claim beyond the file reads to its end only.
    data = file.read(math.prod(shape) * dtype.itemsize + 1)
    return Array(data, dtype, shape, fortran=bool(fortran), big_endian=bool(found and found[1] == ">"))


def check_archive(archive: zipfile.ZipFile, file: IO[bytes]) -> None:
    """Raises ValueError where the members claim more than weights of such a file can be, or one name stands twice."""
    size = file.seek(0, 2)
    claimed = sum(entry.file_size for entry in archive.infolist())
    if claimed > _MAX_RATIO * size + _FREE_BYTES:
        raise ValueError(f"its {size} bytes claim to hold {claimed}, which weights do not; nothing of it was unpacked")
    names = archive.namelist()
    if len(set(names)) != len(names):
        raise ValueError("a member stands in it twice")


def read_npz(file: IO[bytes], where: str) -> dict[str, torch.Tensor]:
    """Entry name -> tensor of an .npz archive; `where` is its name in messages.

    Raises:
        ValueError: an entry is no array of numbers, or does not hold what it claims; members claim more than weights can.
    """
    found = {}
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            try:
                with archive.open(entry) as member:
                    found[entry.filename.removesuffix(".npy")] = read_npy(member).take_tensor()
            except Exception as error:  # a damaged archive can fail in any way
                raise ValueError(
                    f"{where}: entry {show(entry.filename)} cannot be read: {_line(error)}; fetch the file again, "
                    "or save plain arrays of numbers with numpy.savez"
                ) from None
    return found


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
