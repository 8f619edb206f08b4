"""Objects that come from another process of the run: data, by a table of classes, whoever has sent them.

torch's object collectives and its elastic rendezvous unpickle what stands in the connection or the store, which have no password:
a pickle is a program. Here it may name the classes below and those that a package of ours defines as data, and nothing else.
"""

import collections
import datetime
import enum
import io
import pickle
from dataclasses import is_dataclass
from typing import Any, TypeVar

import numpy as np
from torch.distributed import distributed_c10d

from pipeline import documents
from pipeline.errors import UserError

T = TypeVar("T")
PACKAGES = ("nfnet", "pipeline", "transfer", "orchestration")
REMEDY = "another process has come between the run's; start again where only this run's processes reach its network"


def _array(kind: Any, shape: Any, _code: Any) -> np.ndarray:
    """An array before its state."""
    if kind is not np.ndarray or shape != (0,):
        raise pickle.UnpicklingError("an array that is none")
    return np.ndarray((0,), np.int8)


def _scalar(dtype: Any, data: Any) -> Any:
    if not isinstance(dtype, np.dtype) or dtype.hasobject or not isinstance(data, bytes) or len(data) != dtype.itemsize:
        raise pickle.UnpicklingError("a number that is none")
    return np.frombuffer(data, dtype)[0]


def _from_buffer(buffer: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    """How protocol 5 stores arrays."""
    return np.frombuffer(buffer, dtype).reshape(shape, order=order)


ADMITTED: dict[tuple[str, str], Any] = {
    **{("builtins", kind.__name__): kind for kind in (set, frozenset, complex)},
    **{("datetime", kind.__name__): kind for kind in (datetime.datetime, datetime.timedelta, datetime.timezone)},
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
}


class Unpickler(pickle.Unpickler):
    """`pickle.Unpickler` that admits `ADMITTED`, `more`, and of our packages dataclasses, named tuples, enumerations and errors.

    `load` raises UserError for anything else, at the moment it is named and before anything can call it.
    """

    def __init__(self, file: io.BytesIO, more: dict[tuple[str, str], Any] | None = None) -> None:
        super().__init__(file)
        self._more = more or {}

    def load(self) -> Any:
        try:
            return super().load()
        except Exception as error:  # damaged pickles raise what they like
            why = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"what another process has sent is no data of this run ({why}); {REMEDY}") from None

    def find_class(self, module: str, name: str) -> Any:
        known = self._more.get((module, name)) or ADMITTED.get((module, name))
        if known is None and module.split(".")[0] in PACKAGES and "." not in name:
            found = super().find_class(module, name)
            known = found if isinstance(found, type) and found.__module__ == module and _is_data(found) else None
        if known is None:
            raise pickle.UnpicklingError(f"it asks for {f'{module}.{name}'[:100]!r}")
        return known


def _is_data(kind: type) -> bool:
    return is_dataclass(kind) or issubclass(kind, enum.Enum | UserError) or hasattr(kind, "_fields")


def loads(data: bytes, more: dict[tuple[str, str], Any] | None = None) -> Any:
    """Raises UserError for a pickle that names anything but `ADMITTED`, `more` and data of our packages."""
    return Unpickler(io.BytesIO(data), more).load()


def document(data: bytes, kind: type[T], where: str = "the ranks' store") -> T:
    """What stands in a store that may have no password, as JSON. Raises UserError."""
    return documents.parse(data, kind, where, remedy=REMEDY)


def admit_data_alone() -> None:
    """From here on no object collective of this process, ours or a library's, unpickles anything but data."""
    if not hasattr(distributed_c10d, "_unpickler"):
        raise RuntimeError(
            "this torch reads objects of other ranks in a way that normfree does not know; use torch 2.11 to 2.15"
        )
    distributed_c10d._unpickler = Unpickler  # type: ignore[assignment]
