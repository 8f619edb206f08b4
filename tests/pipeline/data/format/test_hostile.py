"""Manifests and indices that somebody else wrote: typed, consistent with themselves, and bounded."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.format import manifest as manifests
from pipeline.data.format.index import COLUMNS, Shard, SplitIndex, write_index
from pipeline.data.format.manifest import Manifest, Split
from pipeline.errors import UserError
from tests.fuzzing import fuzz, mutants

ARRAYS = {name: np.arange(4).astype(kind) for name, kind in COLUMNS.items()}
ARRAYS["shard"][:] = 0


def sealed(content: dict[str, Any]) -> bytes:
    """With the checksum that a forger would write, too."""
    return json.dumps({**content, "checksum": manifests._checksum(content)}).encode()


@pytest.fixture
def content(tmp_path: Path) -> dict[str, Any]:
    files = write_index(tmp_path, "train", ARRAYS, ["a", "b", "c", "d"])
    split = Split(4, (Shard("x/train-0.tar", 100, "0" * 64, 4),), files)
    digest = manifests.dataset_digest(("k", "l", "m", "n"), {"train": split})
    made = Manifest(str(tmp_path), "x", ("k", "l", "m", "n"), digest, {"train": split}, (), {}, "", {})
    (tmp_path / manifests.NAME).write_bytes(made.to_json())
    return json.loads(made.to_json())


def use(folder: str) -> None:
    manifest = Manifest.open(folder)
    for name in manifest.splits:
        index = manifest.split(name)
        for column in COLUMNS:
            getattr(index, column)
        index.class_counts(), list(index.keys)


def test_the_fixture_is_read(content: dict[str, Any], tmp_path: Path) -> None:
    use(str(tmp_path))


EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "a digest that is a path": lambda c: c["splits"]["train"]["index"]["columns"].update(sha256="/home/you/.bashrc"),
    "a name that leads out": lambda c: c["splits"]["train"]["index"]["keys"].update(name="../keys"),
    "an absolute shard": lambda c: c["splits"]["train"]["shards"][0].update(name="/etc/passwd"),
    "a shard that climbs": lambda c: c["splits"]["train"]["shards"][0].update(name="a/../../b.tar"),
    "a negative size": lambda c: c["splits"]["train"]["shards"][0].update(size_bytes=-1),
    "a count that is text": lambda c: c["splits"]["train"]["shards"][0].update(num_samples="4"),
    "another count": lambda c: c["splits"]["train"].update(num_samples=10**12),
    "classes that are text": lambda c: c.update(classes="klmn"),
    "classes that are numbers": lambda c: c.update(classes=[1, 2, 3, 4]),
    "a split that is a list": lambda c: c["splits"].update(train=[]),
    "a split that is a path": lambda c: c["splits"].update({"../x": c["splits"]["train"]}),
    "no index": lambda c: c["splits"]["train"].pop("index"),
    "a column too few": lambda c: c["splits"]["train"]["index"]["column_sha256"].pop("label"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_sealed_manifest_is_held_against_its_types(edit: str, content: dict[str, Any], tmp_path: Path) -> None:
    EDITS[edit](content)
    (tmp_path / manifests.NAME).write_bytes(sealed(content))
    with pytest.raises(UserError, match=r"manifest\.json"):
        Manifest.open(str(tmp_path))


@pytest.mark.parametrize(
    ("column", "value"), [("label", -1), ("label", 4), ("shard", 1), ("shard", -1), ("offset", -5), ("size", -1)]
)
def test_an_index_points_to_what_there_is(tmp_path: Path, column: str, value: int) -> None:
    arrays = {name: values.copy() for name, values in ARRAYS.items()}
    arrays[column][3] = value
    files = write_index(tmp_path, "train", arrays, ["a", "b", "c", "d"])
    paths = tmp_path / files.columns.name, tmp_path / files.keys.name
    index = SplitIndex("train", (Shard("x", 100, "", 4),), 4, 4, *paths, files.column_sha256)
    with pytest.raises(UserError, match=f"its column {column} has values outside"):
        getattr(index, column)


def test_an_index_of_other_columns_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.arrow"
    batch = pa.record_batch({name: pa.array(["a", None]) for name in COLUMNS})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    index = SplitIndex("train", (), 4, 2, path, path, dict.fromkeys(COLUMNS, "0" * 64))
    with pytest.raises(UserError, match="does not verify"):
        _ = index.label
    with pytest.raises(UserError, match="do not verify"):
        _ = index.keys[0]


def test_keys_of_a_bomb_are_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "k.parquet"
    pq.write_table(pa.table({"key": ["x" * 10_000] * 8192}), path, compression="zstd", use_dictionary=False)
    assert path.stat().st_size < 1_000_000
    index = SplitIndex("train", (), 4, 8192, path, path, {})
    with pytest.raises(UserError, match="huge"):
        _ = index.keys[0]


@pytest.mark.parametrize("num", [200, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [manifests.NAME, "train.index.arrow", "train.keys.parquet"])
def test_no_manifest_or_index_hurts(content: dict[str, Any], tmp_path: Path, name: str, num: int) -> None:
    seed = (tmp_path / name).read_bytes()
    tokens = [b"/home/you/.bashrc", b"../", b"null", b"1e9", b"999999999999"]

    def read(data: bytes) -> None:
        if name == manifests.NAME:  # half of them with a checksum that holds, so that more than that is read
            try:
                value = json.loads(data)
                data = sealed(value) if isinstance(value, dict) and len(data) % 2 else data
            except (ValueError, RecursionError):
                pass
        else:  # a forger's digests hold
            file = content["splits"]["train"]["index"]["columns" if "arrow" in name else "keys"]
            file.update(size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
            (tmp_path / manifests.NAME).write_bytes(sealed(content))
        (tmp_path / name).write_bytes(data)
        use(str(tmp_path))

    counts = fuzz(read, mutants([seed], num, tokens=tokens), tmp_path)
    assert counts["read"] and counts["refused"]
