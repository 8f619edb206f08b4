"""Arrays of a sweep's own .npz files, which somebody else may have written: no more memory than the file has bytes."""

import io
import re
import zipfile

import numpy as np

from pipeline.documents import excerpt
from pipeline.errors import UserError
from pipeline.storage import objects

MAX_ENTRIES = 16


def write_arrays(url: str, **arrays: np.ndarray) -> None:
    """Whole or not at all."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    objects.write_bytes(url, buffer.getvalue())


def read_arrays(url: str, remedy: str) -> dict[str, np.ndarray]:
    """Entry name -> array of numbers. UserError for what `numpy.savez` does not write: compressed entries, objects, cut files."""
    data = objects.read_bytes(url)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
        if len(entries) > MAX_ENTRIES or any(e.compress_type != zipfile.ZIP_STORED for e in entries):
            raise ValueError("its entries are not those of numpy.savez")
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
        if not all(isinstance(array, np.ndarray) for array in found.values()):
            raise ValueError("an entry is no array")
        return found
    except Exception as error:  # a damaged archive can fail in any way
        reason = re.sub(
            r" ?<[\w.]+ object at 0x\w+>", "", str(error).partition(";")[0]
        )  # as `ast` names a part of a header
        raise UserError(f"{url} is damaged ({excerpt(reason, 200)}); {remedy}") from None
