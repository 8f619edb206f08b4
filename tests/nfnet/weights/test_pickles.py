"""Pickles give arrays in plain containers and run nothing: files written by pickle, dill and NumPy, and by attackers."""

import builtins
import collections
import io
import os
import pickle
import pickletools
import struct
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dill
import numpy as np
import pytest
import torch

import nfnet
from nfnet.weights.safe_pickle import read_pickle

ARRAYS = {
    "float32": np.arange(6, dtype="f4").reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(6, dtype="f8").reshape(2, 3)),
    "big_endian": np.arange(6, dtype=">f4"),
    "strided": np.arange(12, dtype="i8")[::2],
    "half": np.ones((1, 1, 2, 3), "f2"),
    "scalar": np.float32(2.5),
    "no_dimensions": np.array(3.0, "f4"),
    "empty": np.zeros((0, 4), "f4"),
    "bool": np.array([True, False]),
}
CONTAINERS: list[Callable[[dict], Any]] = [dict, collections.OrderedDict, lambda d: collections.defaultdict(dict, d)]


def read(path: Path, data: bytes) -> Any:
    path.write_bytes(data)
    with open(path, "rb") as file:
        return read_pickle(file, path.name)


@pytest.mark.parametrize("writer", [pickle, dill], ids=["pickle", "dill"])
@pytest.mark.parametrize("protocol", range(6))
def test_every_array_comes_back_as_it_was(tmp_path: Path, writer: Any, protocol: int) -> None:
    for container in CONTAINERS:
        found = read(tmp_path / "weights.npz", writer.dumps(container({"module": ARRAYS}), protocol=protocol))["module"]
        assert set(found) == set(ARRAYS)
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(found[name].numpy(), array)


def test_jax_haiku_and_older_dill_wrap_the_same_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrapped:
        """Pickles as a call of `home`.`name`, which is never imported by the reader."""

        def __init__(self, home: str, name: str, *args: Any) -> None:
            parts = home.split(".")
            for i in range(1, len(parts) + 1):
                package = ".".join(parts[:i])
                monkeypatch.setitem(sys.modules, package, sys.modules.get(package) or types.ModuleType(package))
            module = sys.modules[home]
            function: Any = getattr(module, name, None) or types.FunctionType((lambda: None).__code__, {}, name)
            function.__module__, function.__qualname__ = home, name
            monkeypatch.setattr(module, name, function, raising=False)
            self.call = function, args

        def __reduce__(self) -> Any:
            return self.call

    array = ARRAYS["float32"]
    parts = array.__reduce__()
    state = {"weak_type": False, "named_shape": {}}
    tree = Wrapped(
        "haiku._src.data_structures",
        "FlatMapping",
        {
            "jax": Wrapped("jax._src.array", "_reconstruct_array", *parts, state),
            "older_jax": Wrapped("jax._src.device_array", "reconstruct_device_array", *parts, state),
            "older_dill": Wrapped("dill._dill", "_create_array", *parts, None),
        },
    )
    found = read(tmp_path / "weights.npz", pickle.dumps(tree, protocol=4))
    for name in ("jax", "older_jax", "older_dill"):
        np.testing.assert_array_equal(found[name].numpy(), array)


def program(module: str, name: str, arguments: bytes = b"(tR") -> bytes:
    return b"\x80\x04" + f"c{module}\n{name}\n".encode() + arguments + b"."


def reduce_to(function: Any, *args: Any) -> Any:
    return type("Payload", (), {"__reduce__": lambda self: (function, args)})()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def touching(name: str) -> str:
    return f"open({name!r}, 'w').close()"


ATTACKS: dict[str, tuple[Callable[[str], bytes], str]] = {
    "os.system": (lambda f: pickle.dumps(reduce_to(os.system, f"touch {f}")), "posix.system"),
    "protocol 0": (lambda f: f"cos\nsystem\n(S'touch {f}'\ntR.".encode(), "os.system"),
    "INST": (lambda f: f"(S'touch {f}'\nios\nsystem\n.".encode(), "os.system"),
    "OBJ": (lambda f: b"(cos\nsystem\n" + text(f"touch {f}") + b"o.", "os.system"),
    "eval": (lambda f: pickle.dumps({"w": reduce_to(builtins.eval, touching(f))}, 5), "builtins.eval"),
    "exec by dill": (lambda f: dill.dumps(reduce_to(builtins.exec, touching(f))), "builtins.exec"),
    "dill's function": (lambda f: dill.dumps(reduce_to(lambda: open(f, "w").close())), "dill._dill._create_function"),
    "dill's import": (lambda f: program("dill._dill", "_import_module", b"(" + text("os") + b"tR"), "_import_module"),
    "getattr": (
        lambda f: (
            b"\x80\x04cbuiltins\ngetattr\n(cbuiltins\n__import__\n(" + text("os") + b"tR" + text("system") + b"tR."
        ),
        "builtins.getattr",
    ),
    "dotted name": (
        lambda f: b"\x80\x04" + text("collections") + text("OrderedDict.__init__") + b"\x93.",
        "OrderedDict.",
    ),
    "numpy's own loader": (lambda f: program("numpy", "load", b"(" + text(f) + b"tR"), "numpy.load"),
    "objects in an array": (
        lambda f: pickle.dumps(np.array([reduce_to(os.system, f"touch {f}")], dtype=object)),
        "Python objects",
    ),
    "torch's storages": (lambda f: pickle.dumps({"w": torch.zeros(2)}), "torch._utils._rebuild_tensor_v2"),
    "extension registry": (lambda f: b"\x80\x02\x82\x01)R.", "copyreg"),
    "persistent id": (lambda f: b"\x80\x02" + text(f"touch {f}") + b"Q.", "persistent id"),
    "state of a function": (
        lambda f: b"\x80\x04cnumpy.core.multiarray\n_reconstruct\n}" + text("__code__") + text("x") + b"sb.",
        "changes numpy.core.multiarray._reconstruct",
    ),
    "a type as constructor": (lambda f: program("numpy", "ndarray", b"(K\x01tR"), "it calls a type"),
    "bytes of a number": (lambda f: program("builtins", "bytearray", b"(J\xff\xff\xff\x7ftR"), "bytes of a int"),
    "a far place in memory": (lambda f: b"\x80\x02}r\xff\xff\xff\x7f.", "place 2147483647"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_of_a_malicious_file_runs(tmp_path: Path, attack: str) -> None:
    sentinel, path = tmp_path / "ran", tmp_path / "F0_haiku.npz"
    build, named = ATTACKS[attack]
    payload = build(str(sentinel))
    model = nfnet.create_model("nfnet_tiny", num_classes=10)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    path.write_bytes(payload)
    with pytest.raises(ValueError, match="nothing of it was run") as error:
        nfnet.load_published(model, path)
    assert named in str(error.value) and str(path) in str(error.value) and "numpy.savez" in str(error.value)
    assert not sentinel.exists()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_attacks_are_real(tmp_path: Path) -> None:
    for attack in ("os.system", "protocol 0", "INST", "OBJ", "eval", "exec by dill", "objects in an array"):
        sentinel = tmp_path / attack.replace(" ", "_")
        payload = ATTACKS[attack][0](str(sentinel))
        (dill if "dill" in attack else pickle).loads(payload)
        assert sentinel.exists(), attack


def test_a_state_cannot_be_set_on_what_was_built(tmp_path: Path) -> None:
    honest = pickle.dumps(np.zeros(4, "f4"), protocol=5)
    assert "_frombuffer" in {str(a).split()[-1] for _, a, _ in pickletools.genops(honest) if a is not None}
    changed = honest[:-1] + b"N}" + text("data") + b"J\xff\xff\xff\x7fs\x86b."
    with pytest.raises(ValueError, match="changed after it was made"):
        read(tmp_path / "weights.pkl", changed.replace(honest[2:11], b"", 1))  # without the frame, whose length is old


class LyingArray:
    """Pickles as an array of `shape` with four bytes of memory."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def __reduce__(self) -> tuple:
        function, args, state = np.zeros(1, "f4").__reduce__()  # type: ignore[misc]
        return function, args, (state[0], self.shape, *state[2:])


@pytest.mark.parametrize("shape", [(1 << 40,), (1 << 62, 4), (2,), (0,), (-1,)])
def test_an_array_cannot_claim_more_than_the_file_holds(tmp_path: Path, shape: tuple[int, ...]) -> None:
    data = b"\x80\x04" + pickle.dumps(LyingArray(shape), protocol=2)[2:]
    with pytest.raises(ValueError, match=r"weights.pkl is damaged.*(claims \d+ bytes|has the shape)"):
        read(tmp_path / "weights.pkl", data)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_file_cut_short_is_damaged(tmp_path: Path, protocol: int) -> None:
    whole = pickle.dumps({"m": {"w": np.arange(64, dtype="f4")}}, protocol=protocol)
    for size in range(1, len(whole), 17):
        with pytest.raises(ValueError, match=r"weights.pkl is (damaged|refused)"):
            read(tmp_path / "weights.pkl", whole[:size])


def test_a_large_length_asks_for_no_memory(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="damaged"):
        read(tmp_path / "weights.pkl", b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b"abc.")


def test_a_container_pointed_to_often_is_read_once(tmp_path: Path) -> None:
    value: Any = np.zeros(1, "f4")
    for _ in range(7):
        value = [value] * 1000
    found = read(tmp_path / "weights.pkl", pickle.dumps(value))
    assert found[0] is found[999]


@pytest.mark.parametrize("numpy_save", [np.savez, np.savez_compressed])
def test_an_npz_comes_back_as_it_was(tmp_path: Path, numpy_save: Callable[..., None]) -> None:
    from nfnet.weights.npz import read_npz

    numpy_save(tmp_path / "weights.npz", **{f"NFNet/~/conv/{k}": v for k, v in ARRAYS.items()})
    with open(tmp_path / "weights.npz", "rb") as file:
        found = read_npz(file, "weights.npz")
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[f"NFNet/~/conv/{name}"].numpy(), array)


@pytest.mark.parametrize("kind", ["objects", "claims", "no array"])
def test_a_bad_npz_is_refused(tmp_path: Path, kind: str) -> None:
    import zipfile

    sentinel, path, file = tmp_path / "ran", tmp_path / "weights.npz", io.BytesIO()
    np.save(file, np.array([reduce_to(os.system, f"touch {sentinel}")], object) if kind == "objects" else np.zeros(8))
    data = file.getvalue()
    if kind == "claims":
        data = data.replace(b"(8,), }           ", b"(8000000000000,), }")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/~/conv/w.npy", b"text" if kind == "no array" else data)
    with pytest.raises(
        ValueError, match=r"weights.npz: entry m/~/conv/w.npy cannot be read: .*(objects|claims|no .npy)"
    ):
        nfnet.load_published(nfnet.create_model("nfnet_tiny"), path)
    assert not sentinel.exists()
