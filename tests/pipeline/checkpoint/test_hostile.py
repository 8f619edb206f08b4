"""Checkpoints and exports that somebody else wrote: every element once and finite, nothing allocated or touched before."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pipeline.checkpoint import commit as checkpoint
from pipeline.checkpoint import exported, load
from pipeline.errors import UserError
from pipeline.models.backbone import load_backbone
from tests.fuzzing import fuzz, mutants

Tensors = dict[str, torch.Tensor]
SHAPES = {"a.weight": [4, 2], "b.bias": [3]}
GOOD = {"ema/a.weight@0": torch.ones(5), "ema/a.weight@5": torch.ones(3), "ema/b.bias@0": torch.ones(3)}


def write(folder: Path, tensors: Tensors = GOOD, **changes: Any) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "fragments-00000-of-00001.safetensors"
    save_file(tensors, path)
    files = [
        {"name": path.name, "size_bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    ]
    body = {"format": 1, "step": 3, "samples": 3, "num_updates": 3, "shapes": SHAPES, "kinds": ["ema"], "files": files}
    body |= {"config": {"model": {}}, "config_digest": "", "dataset": {}, "classes": ["x"], "evaluation": {"loss": 1}}
    (folder / checkpoint.COMMIT).write_text(json.dumps(body | changes))
    return str(folder)


def read(url: str) -> load.State:
    return load.load_state(checkpoint.read_commit(url), "unused")


def test_the_fixture_is_read(tmp_path: Path) -> None:
    assert read(write(tmp_path))["ema"]["a.weight"].tolist() == [[1.0, 1.0]] * 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ema/a.weight@00": torch.ones(5)}, "has no place"),
        ({"ema/a.weight@4": torch.ones(4), "ema/a.weight@5": None}, "element 4 of ema a.weight twice"),
        ({"ema/a.weight@3": torch.ones(3), "ema/a.weight@5": None}, "element 3 of ema a.weight twice"),
        ({"ema/a.weight@6": torch.ones(2), "ema/a.weight@5": None}, "element 5 of ema a.weight not at all"),
        ({"ema/a.weight@8": torch.ones(1)}, "holds 9 elements"),
        ({"ema/a.weight@-3": torch.ones(3)}, "has no place"),
        ({"ema/a.weight@zz": torch.ones(3)}, "has no place"),
        ({"x@0": torch.ones(3)}, "has no place"),
        ({"a.weight": torch.ones(4, 2)}, "twice"),
        ({"ema/other@0": torch.ones(3)}, "does not know"),
        ({"raw/b.bias@0": torch.ones(3)}, "does not know"),
        ({"ema/b.bias@0": torch.ones(3, dtype=torch.int32)}, "type I32"),
        ({"ema/b.bias@0": torch.tensor([1.0, float("nan"), 1.0])}, "not finite"),
        ({"ema/b.bias@0": torch.tensor([1.0, float("inf"), 1.0])}, "not finite"),
    ],
)
def test_every_element_is_there_once_and_finite(tmp_path: Path, change: dict, words: str) -> None:
    tensors = {key: value for key, value in {**GOOD, **change}.items() if value is not None}
    with pytest.raises(UserError, match=words):
        read(write(tmp_path, tensors))


def test_claimed_shapes_take_no_memory(tmp_path: Path) -> None:
    url = write(tmp_path, shapes={**SHAPES, "evil": [1 << 40]})
    with pytest.raises(UserError, match="holds 0 elements of ema evil"):
        read(url)  # four terabytes, if they were asked for


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kinds": "ema"}, "at kinds: it needs a list"),
        ({"kinds": ["ema", "ema"]}, "named twice"),
        ({"kinds": []}, "at kinds"),
        ({"shapes": {"a.weight": [-4]}}, "at shapes"),
        ({"step": True}, "at step"),
        ({"files": [{"name": "../x.safetensors", "size_bytes": 1, "sha256": "0" * 64}]}, "at files.*name"),
        ({"files": [{"name": "x.pt", "size_bytes": 1, "sha256": "0" * 64}]}, "nothing of it was read"),
        ({"files": [{"name": "x.safetensors", "size_bytes": 1, "sha256": "/home/you/.bashrc"}]}, "64 hex digits"),
        ({"files": [{"name": "x.safetensors", "size_bytes": 1.5, "sha256": "0" * 64}]}, "size_bytes"),
        ({"format": 2}, "has format 2"),
        ({"evaluation": {"accuracy": "high"}}, "at evaluation"),
    ],
)
def test_a_commit_file_is_typed(tmp_path: Path, change: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        read(write(tmp_path, **change))


@pytest.mark.parametrize(
    "content", [b"", b'{"format": 1, "st', b"[]", b"null", b"[" * 100_000, b"\xff", b'{"format": 1}']
)
@pytest.mark.parametrize("name", [checkpoint.COMMIT, exported.NAME])
def test_a_small_file_that_does_not_verify_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name} .*; (use another|export again)"):
        load.resolve(str(tmp_path), "unused")


def export(folder: Path) -> bytes:
    path = folder / exported.WEIGHTS
    save_file({"a.weight": torch.ones(4, 2), "b.bias": torch.ones(3)}, path)
    source = {"step": 3, "samples": 3, "num_updates": 3, "config_digest": "", "dataset": {}, "evaluation": {}}
    files = [
        {"name": path.name, "size_bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    ]
    body: dict[str, Any] = {"format": 1, "kind": "safetensors", "weights": "ema", "classes": ["x"], "files": files}
    return json.dumps(body | {"source": source, "run": {"model": {}}, "shapes": SHAPES}).encode()


def reader(folder: Path, name: str) -> Callable[[bytes], object]:
    def read(data: bytes) -> object:
        (folder / name).write_bytes(data)
        commit = load.resolve(str(folder), str(folder / "cache"))
        return load.load_state(commit, str(folder / "cache"))

    return read


@pytest.mark.parametrize("num", [300, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [checkpoint.COMMIT, exported.NAME])
def test_no_commit_or_export_file_hurts(tmp_path: Path, name: str, num: int) -> None:
    if name == exported.NAME:
        seed = export(tmp_path)
    else:
        seed = (Path(write(tmp_path)) / name).read_bytes()
        (tmp_path / name).unlink()
    tokens = [b"/home/you/.bashrc", b"[4000000000]", b"../x.safetensors", b"true", b"null", b'"ema"']
    counts = fuzz(reader(tmp_path, name), mutants([seed], num, tokens=tokens), tmp_path)
    assert counts["read"] and counts["refused"]


@pytest.mark.parametrize("num", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_file_of_fragments_hurts(tmp_path: Path, num: int) -> None:
    url = write(tmp_path)
    path = tmp_path / "fragments-00000-of-00001.safetensors"

    def read(data: bytes) -> object:
        path.write_bytes(data)
        info: checkpoint.FileInfo = {
            "name": path.name,
            "size_bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        commit.files[:] = [info]
        return load.load_state(commit, "unused")

    commit = checkpoint.read_commit(url)
    counts = fuzz(read, mutants([path.read_bytes()], num, tokens=[b"@0", b"@00", b"ema/"]), tmp_path)
    assert counts["read"] and counts["refused"]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "has no model"),
        ({"model": {}, "augment": {}}, "name"),
        ({"model": {"name": "nfnet_f7"}, "augment": {}}, "fewer weights"),
        ({"model": {"name": "nfnet_tiny", "options": {"in_chans": 10**9}}, "augment": {}}, "in_chans|fewer weights"),
        ({"model": {"name": "nfnet_tiny", "options": {"__class__": "x"}}, "augment": {}}, "no '__class__'"),
        ({"model": {"name": "../x"}, "augment": {}}, "x"),
        ({"model": {"name": "nfnet_tiny"}, "augment": {"image_px": "many"}}, "image_px"),
        ({"model": {"name": "nfnet_tiny"}, "augment": {"evil": 1}}, "evil"),
        ({"model": [], "augment": {}}, "has no model"),
    ],
)
def test_the_configuration_of_a_commit_is_typed(tmp_path: Path, config: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_backbone(write(tmp_path, config=config))
