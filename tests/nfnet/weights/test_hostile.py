"""Files of weights that somebody else wrote: bounded by their size, finite, and found behind what wrappers add to names."""

import io
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

import nfnet
from nfnet.weights.safe_pickle import read_pickle
from nfnet.weights.state_dict import plain_names
from nfnet.weights.timm import to_timm
from tests.fuzzing import fuzz, mutants


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


NESTED = b"N" + b"2\x86" * 64  # 64 tuples, each of two times the one before
MILLION = b"\x96" + struct.pack("<Q", 1 << 20) + bytes(1 << 20) + b"\x940"
NUMBERS = b"".join(b"\x8a\x0a" + (i * (2**61 - 1)).to_bytes(10, "little") + b"N" for i in range(1, 30_000))
BOMBS = {
    "a key of nested tuples": b"\x80\x02}" + NESTED + b"Ns.",
    "a set of nested tuples": b"\x80\x04\x8f(" + NESTED + b"\x90.",
    "nested tuples by memory": b"\x80\x02}N" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(64)) + b"Ns.",
    "nested tuples in a message": b"\x80\x02" + named("_codecs", "encode") + b"X\x01\0\0\0x" + NESTED + b"\x86R.",
    "a type of nested tuples": b"\x80\x02" + named("numpy", "dtype") + NESTED + b"\x85R.",
    "copies of bytes": b"\x80\x05" + MILLION + named("builtins", "bytes") + b"\x940(" + b"h\1h\0\x85R" * 20_000 + b"l.",
    "copies of a dictionary": b"\x80\x04}\x94("
    + b"".join(b"J" + struct.pack("<i", i) + b"N" for i in range(20_000))
    + b"u0"
    + named("builtins", "dict")
    + b"\x940("
    + b"h\1h\0\x85R" * 20_000
    + b"l.",
    "keys of one hash": b"\x80\x04}(" + NUMBERS + b"u.",
    "a million steps": b"\x80\x04(" + b"}" * 1_000_000 + b"l.",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_pickle_takes_no_more_than_its_size_pays_for(tmp_path: Path, bomb: str) -> None:
    def read(data: bytes) -> None:
        path.write_bytes(data)
        with path.open("rb") as file:
            read_pickle(file, "x.pkl")

    path = tmp_path / "x.pkl"
    assert fuzz(read, [pickle.dumps(1), BOMBS[bomb]], tmp_path, refusals=(ValueError,))["refused"] == 1


def tiny(**options: Any) -> nfnet.NFNet:
    return nfnet.create_model("nfnet_tiny", num_classes=10, **options)


def archive(members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def torch_file(content: object, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


EXPANDED = {"blocks.0.w": torch.ones(1).expand(1 << 20, 1 << 14)}
REFUSED = {
    "an array of 200 MB in 200 kB": archive({"a/~/b.npy": npy(np.zeros(50_000_000, "f4"))}),
    "a torch file with nested tuples": archive({"x/data.pkl": BOMBS["a key of nested tuples"]}, zipfile.ZIP_STORED),
    "an old torch file with nested tuples": torch_file({}, _use_new_zipfile_serialization=False).replace(
        pickle.dumps({}, protocol=2)[2:], b"}" + NESTED + b"Ns."
    ),
    "an expanded tensor": torch_file(EXPANDED),
    "an expanded tensor of old": torch_file(EXPANDED, _use_new_zipfile_serialization=False),
    "a sparse tensor": torch_file({"blocks.0.w": torch.eye(3).to_sparse()}),
    "weights that are not finite": save({k: torch.full_like(v, torch.nan) for k, v in tiny().state_dict().items()}),
    "a stage of a huge number": save(
        {"stages.0.0.conv1.gain": torch.ones(1), f"stages.{10**12}.0.conv1.gain": torch.ones(1)}
    ),
    "a name of many digits": save({f"blocks.{'9' * 6000}.conv0.weight": torch.ones(1)}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_claims_more_than_weights_is_refused(tmp_path: Path, case: str) -> None:
    model = tiny()
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def read(data: bytes) -> None:
        path.write_bytes(data)
        nfnet.load_published(model, path)

    path = tmp_path / "weights"
    fuzz(read, [save(tiny().state_dict()), REFUSED[case]], tmp_path, refusals=(ValueError,))
    path.write_bytes(REFUSED[case])
    with pytest.raises(ValueError, match=r"weights .*(refused|damaged|not finite|does not fit)|claim"):
        nfnet.load_published(model, path)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda d: {f"module.{k}": v for k, v in d.items()},
        lambda d: {f"_orig_mod.{k}": v for k, v in d.items()},
        lambda d: {f"module._orig_mod.{k}": v for k, v in d.items()},
        lambda d: {k.replace("conv1.", "_orig_mod.conv1."): v for k, v in d.items()},
        lambda d: {"state_dict": {f"model.{k}": v for k, v in d.items()}, "epoch": 3},
        lambda d: {"model": {f"encoder.{k}": v for k, v in d.items()}},
        lambda d: {"n_averaged": torch.tensor(4), **{f"module.{k}": v for k, v in d.items()}},
    ],
)
@pytest.mark.parametrize("names", ["ours", "timm's"])
def test_what_wrappers_add_is_taken_off_and_said(tmp_path: Path, wrap: Any, names: str) -> None:
    options = nfnet.timm_options("dm_nfnet_tiny") if names == "timm's" else {}
    model, other = tiny(**options), tiny(**options)
    torch.save(wrap(to_timm(model) if options else model.state_dict()), tmp_path / "x.pth")
    report = nfnet.load_published(other, tmp_path / "x.pth")
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())
    assert "in its names was skipped" in str(report)


def test_two_networks_are_not_chosen_between() -> None:
    both = {"student.a": torch.ones(1), "module.a": torch.zeros(1)}
    assert plain_names(both) == (both, ())
    both = {"_orig_mod.a": torch.ones(1), "a": torch.zeros(1)}
    assert plain_names(both) == (both, ())


def seeds() -> dict[str, bytes]:
    tree = {"NFNet/~/linear": {"w": np.ones((2, 3), "f4"), "b": np.ones(3, "f4")}}
    flat = {f"{m}/{n}.npy": npy(a) for m, part in tree.items() for n, a in part.items()}
    plain = {"blocks.0.conv0.weight": torch.ones(2, 3), "head.bias": torch.ones(3)}
    return {
        "pickle": pickle.dumps(({**tree}, {}), protocol=4),
        "old pickle": pickle.dumps(tree, protocol=2),
        "npz": archive(flat, zipfile.ZIP_STORED),
        "compressed npz": archive(flat),
        "torch": torch_file(plain),
        "old torch": torch_file(plain, _use_new_zipfile_serialization=False),
        "safetensors": save(plain),
    }


@pytest.mark.parametrize("num", [60, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", seeds())
def test_no_file_of_weights_hurts(tmp_path: Path, kind: str, num: int) -> None:
    model, path = tiny(), tmp_path / "weights"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        nfnet.load_published(model, path)

    tokens = [
        b"cos\nsystem\n",
        NESTED,
        b"\x86" * 40,
        b"R",
        b"b",
        b"\x81",
        b"(9223372036854775807,)",
        b"stages.999999999.",
    ]
    counts = fuzz(read, mutants([seeds()[kind]], num, tokens=tokens), tmp_path, refusals=(ValueError,))
    assert counts["refused"] > num // 2
