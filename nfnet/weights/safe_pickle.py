"""Arrays out of pickle files without running anything from them.

A pickle is a program: it names functions ("globals") and calls them. Here the names are looked up in a table of our own
and nowhere else, and what the table gives are tokens that rebuild arrays and plain containers; the functions named in
the file are never imported. Any other name ends the reading at the moment it is named, before anything can call it.
"""

import mmap
import pickle
from collections.abc import Callable
from typing import IO, Any, NoReturn

from nfnet.weights.npz import Array, show, torch_dtype
from nfnet.weights.pickle_program import Refused, check_program

_MAX_DEPTH = 8
_FREE_BYTES = 1 << 20


class _Budget:
    """Bytes that calls may make. A byte of the file may be used again and again by a few more, so all together are bounded."""

    def __init__(self, file_bytes: int) -> None:
        self.left = 4 * file_bytes + _FREE_BYTES

    def spend(self, num_bytes: int) -> None:
        self.left -= num_bytes
        if self.left < 0:
            raise Refused("it makes many times as many bytes as it has")


class _Token:
    """Stands for an admitted global: it can be called, and neither changed nor used as a class."""

    __slots__ = ("_call", "_name")
    _call: Callable[..., Any]
    _name: str

    def __init__(self, name: str, call: Callable[..., Any]) -> None:
        object.__setattr__(self, "_name", name)
        object.__setattr__(self, "_call", call)

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise Refused(f"it sets {name} on {self._name}")

    def __setstate__(self, state: Any) -> NoReturn:
        raise Refused(f"it changes {self._name}")

    def __repr__(self) -> str:
        return f"{self._name}"


class _Dtype:
    """numpy.dtype as pickled: a code, then a state whose second entry is the byte order."""

    __slots__ = ("big_endian", "dtype")

    def __init__(self, code: Any, *flags: Any) -> None:
        # Byte order may stand before the code; a token names an extension type, such as ml_dtypes.bfloat16.
        text = repr(code) if isinstance(code, _Token) else code
        self.big_endian = isinstance(text, str) and text.startswith(">")
        try:
            self.dtype = torch_dtype(text.lstrip("<>|=").rpartition(".")[2] if isinstance(text, str) else text)
        except ValueError as error:
            raise Refused(str(error)) from None

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) > 1:
            self.big_endian = state[1] == ">"


class _Blank:
    """An array before its state: numpy.core.multiarray._reconstruct(ndarray, (0,), b"b")."""

    __slots__ = ("_budget", "array")

    def __init__(self, budget: _Budget) -> None:
        self.array: Array | None = None
        self._budget = budget

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise Refused("an array's state is none")
        _, shape, dtype, fortran, data = state
        self.array = _array(self._budget, data, dtype, shape, fortran=bool(fortran))


def _array(budget: _Budget, data: Any, dtype: Any, shape: Any, *, fortran: bool) -> Array:
    if not isinstance(dtype, _Dtype):
        raise Refused("an array's type is no numpy.dtype")
    budget.spend(len(data) if isinstance(data, bytes | bytearray) else 0)  # taken when its tensor is made
    return Array(data, dtype.dtype, shape, fortran=fortran, big_endian=dtype.big_endian)


def _built(function: Any, args: Any, state: Any, *ignored: Any) -> Any:
    """A constructor, its arguments and the state: dill's _create_array and jax's reconstruct_device_array."""
    if not isinstance(function, _Token):
        raise Refused("an array is built by something else than NumPy")
    array = function(*args)
    if not isinstance(array, _Blank):
        raise Refused(f"{function} builds no array")
    array.__setstate__(state)
    return array


def _no_call(*args: Any) -> NoReturn:
    raise Refused("it calls a type")


def _plain_calls(budget: _Budget) -> dict[str, Callable[..., Any]]:
    """The globals of bytes and plain containers."""

    def encode(text: Any, encoding: Any = "latin1") -> bytes:
        """_codecs.encode: how protocols below 3 store bytes."""
        if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
            raise Refused("it encodes something else than latin1 text")
        budget.spend(len(text))
        return text.encode("latin1")

    def make_bytes(data: Any = b"", encoding: Any = None) -> bytes:
        if encoding is not None:
            return encode(data, encoding)
        if not isinstance(data, bytes | bytearray):
            raise Refused(f"it makes bytes of a {type(data).__name__}")
        budget.spend(len(data))
        return bytes(data)

    def mapping(items: Any = ()) -> dict[Any, Any]:
        if not isinstance(items, dict | list | tuple):
            raise Refused(f"it makes a dictionary of a {type(items).__name__}")
        budget.spend(100 * len(items))
        return dict(items)

    return {
        "_codecs.encode": encode,
        # bytearray and bytes of a number would be that many zeros: memory that no file pays for.
        **{f"{home}.{name}": make_bytes for home in ("builtins", "__builtin__") for name in ("bytes", "bytearray")},
        **{f"{home}.dict": mapping for home in ("builtins", "__builtin__")},
        "collections.OrderedDict": mapping,
        "collections.defaultdict": lambda factory=None, *items: mapping(*items),  # its factory is not kept
        "haiku._src.data_structures.FlatMapping": mapping,
        "haiku._src.data_structures.FlatMap": mapping,
        "haiku._src.data_structures.frozendict": mapping,
    }


def _admitted(budget: _Budget) -> dict[tuple[str, str], _Token]:
    """The globals that a file may name, and what they are here."""

    def blank(*args: Any) -> _Blank:
        return _Blank(budget)

    def from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> Array:
        """numpy._core.numeric._frombuffer: how protocol 5 stores an array."""
        return _array(budget, data, dtype, shape, fortran=order == "F")

    def scalar(dtype: Any, data: Any = b"") -> Array:
        return from_buffer(data, dtype, (), "C")

    def dill_type(name: Any) -> _Token:
        """A built-in type by dill's name for it; only those that are admitted under their own name can be called."""
        own = {"BytesType": "bytes", "DictType": "dict"}.get(name, name) if isinstance(name, str) else ""
        return table.get(("builtins", own)) or _Token(show(name), _no_call)

    numpy: dict[str, Callable[..., Any]] = {
        "core.multiarray._reconstruct": blank,
        "core.multiarray.scalar": scalar,
        "core.numeric._frombuffer": from_buffer,
    }
    calls: dict[str, Callable[..., Any]] = {
        "numpy.ndarray": _no_call,
        "numpy.dtype": _Dtype,
        **{f"numpy.{name}": call for name, call in numpy.items()},
        **{f"numpy._{name}": call for name, call in numpy.items()},  # since NumPy 2
        "ml_dtypes.bfloat16": _no_call,
        "jax._src.device_array.reconstruct_device_array": _built,
        "jax._src.array._reconstruct_array": _built,
        "dill._dill._create_array": _built,
        "dill._dill._load_type": dill_type,
        **_plain_calls(budget),
    }
    table = {(name.rpartition(".")[0], name.rpartition(".")[2]): _Token(name, call) for name, call in calls.items()}
    return table


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, table: dict[tuple[str, str], _Token]) -> None:
        super().__init__(file)
        self._table = table

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._table[module, name]
        except KeyError:
            raise Refused(f"it asks for {show(module)}.{show(name)}") from None

    def persistent_load(self, pid: Any) -> Any:
        raise Refused("it asks for an object that is kept elsewhere (a persistent id)")


def _plain(value: Any, done: dict[int, Any], depth: int = 0) -> Any:
    """The tree with tensors for arrays; what is neither container, array, number nor text becomes its type.

    `done` has each container and array once, by identity: a small file can point to one of them a million times.
    """
    if depth > _MAX_DEPTH:
        raise Refused(f"its containers are nested more than {_MAX_DEPTH} deep")
    if id(value) in done:
        return done[id(value)]
    if isinstance(value, dict):
        found: Any = {k: _plain(v, done, depth + 1) for k, v in value.items()}
    elif isinstance(value, list | tuple):
        found = [_plain(v, done, depth + 1) for v in value]
    elif isinstance(value, Array | _Blank):
        array = value.array if isinstance(value, _Blank) else value
        if array is None:
            raise Refused("an array has no contents")
        found = array.take_tensor()
    else:
        return value if isinstance(value, int | float | str | bytes | None) else type(value)
    done[id(value)] = found
    return found


def read_pickle(file: IO[bytes], where: str) -> Any:
    """The containers, numbers and arrays (as tensors) of a pickle of protocol 0 to 5; nothing from it is run.

    Args:
        file: an open file of at least one byte.
        where: its name in messages.
    Returns:
        Dictionaries, lists (tuples among them), numbers, text and tensors; in place of anything else its type.
    Raises:
        ValueError: the file names a global that is neither NumPy's array nor a plain container (it is refused before
            anything can call it), or is damaged.
    """
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            check_program(data)
            data.seek(0)
            return _plain(_Unpickler(data, _admitted(_Budget(len(data)))).load(), {})
        except Refused as refusal:
            raise ValueError(
                f"{where} is refused, nothing of it was run: {refusal}, and only NumPy arrays in plain containers are "
                "read; if you trust the file, save its arrays with numpy.savez or safetensors where it was made"
            ) from None
        except Exception as error:
            # A damaged program can fail in any way that one can fail; what it is in detail helps nobody.
            raise ValueError(
                f"{where} is damaged, or no pickle of arrays ({type(error).__name__}: {error}); fetch it again"
            ) from None
