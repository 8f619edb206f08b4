"""Manifests and indices that somebody else wrote: typed, consistent with themselves, and bounded."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import documents
from pipeline.data.format import manifest as manifests
from pipeline.data.format.index import SplitIndex
from pipeline.data.format.keys import Keys
from pipeline.data.format.keys import write as write_keys
from pipeline.data.format.manifest import Manifest, Split
from pipeline.data.format.pieces import ROW, Piece, PieceTable, Shard, StoredFile, write_piece
from pipeline.errors import UserError
from tests.fuzzing import fuzz, mutants

ROWS = np.empty(4, ROW)
for column in ROW.names or ():
    ROWS[column] = np.arange(4)
SHARD = Shard("x/train-0.tar", 4096, "0" * 64, 4)
FILES = ("train-00000.index.json", "train-00000.rows.npy", "train-00000.keys.parquet")


def written(folder: Path, rows: np.ndarray = ROWS) -> Split:
    piece, _ = write_piece(folder, "train", 0, [SHARD], rows, ["a", "b", "c", "d"], np.arange(4, dtype=np.uint64))
    return Split(4, (piece,))


def sealed(content: dict[str, Any]) -> bytes:
    """With the checksum that a forger would write, too."""
    return json.dumps({**content, "checksum": manifests.checksum(content)}).encode()


@pytest.fixture
def content(tmp_path: Path) -> dict[str, Any]:
    split = written(tmp_path)
    digest = manifests.dataset_digest(("k", "l", "m", "n"), {"train": split})
    made = Manifest(str(tmp_path), "x", ("k", "l", "m", "n"), digest, {"train": split}, None, {}, "", {})
    (tmp_path / manifests.NAME).write_bytes(made.to_json())
    return json.loads(made.to_json())


def use(folder: str) -> None:
    manifest = Manifest.open(folder)
    for name in manifest.splits:
        index = manifest.split(name)
        for column in (*(ROW.names or ()), "shard", "phash"):
            getattr(index, column)
        list(index.keys), index.rows(range(index.num_samples))


def test_the_fixture_is_read(content: dict[str, Any], tmp_path: Path) -> None:
    use(str(tmp_path))


def piece_of(content: dict[str, Any]) -> dict[str, Any]:
    return content["splits"]["train"]["pieces"][0]


EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "a digest that is a path": lambda c: piece_of(c)["table"].update(sha256="/home/you/.bashrc"),
    "a name that leads out": lambda c: piece_of(c)["table"].update(name="../keys"),
    "a negative size": lambda c: piece_of(c).update(num_bytes=-1),
    "a count that is text": lambda c: piece_of(c).update(num_samples="4"),
    "another count": lambda c: c["splits"]["train"].update(num_samples=10**12),
    "classes that are text": lambda c: c.update(classes="klmn"),
    "classes that are numbers": lambda c: c.update(classes=[1, 2, 3, 4]),
    "a split that is a list": lambda c: c["splits"].update(train=[]),
    "a split that is a path": lambda c: c["splits"].update({"../x": c["splits"]["train"]}),
    "no pieces": lambda c: c["splits"]["train"].pop("pieces"),
    "other rows": lambda c: piece_of(c).update(rows_sha256="1" * 64),
}
TABLE_EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "an absolute shard": lambda t: t["shards"][0].update(name="/etc/passwd"),
    "a shard that climbs": lambda t: t["shards"][0].update(name="a/../../b.tar"),
    "rows that lead out": lambda t: t["rows"].update(name="../rows"),
    "a shard more": lambda t: t["shards"].append(t["shards"][0]),
    "rows of another size": lambda t: t["rows"].update(size_bytes=1 << 40),
    "another digest of rows": lambda t: t.update(row_digests=["2" * 64]),
}


@pytest.mark.parametrize("edit", TABLE_EDITS)
def test_a_sealed_table_is_held_against_its_types_and_the_manifest(
    edit: str, content: dict[str, Any], tmp_path: Path
) -> None:
    table = json.loads((tmp_path / FILES[0]).read_bytes())
    TABLE_EDITS[edit](table)
    seal(content, tmp_path, FILES[0], json.dumps(table).encode())
    with pytest.raises(UserError, match=r"train-00000\.index\.json"):
        use(str(tmp_path))


def seal(content: dict[str, Any], folder: Path, name: str, data: bytes) -> None:
    """A piece's object in place of what is there, with the digests that a forger would write too."""
    (folder / name).write_bytes(data)
    stored = {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    if name != FILES[0]:
        table = json.loads((folder / FILES[0]).read_bytes())
        table["rows" if "rows" in name else "keys"].update(stored)
        (folder / FILES[0]).write_text(json.dumps(table))
        data = (folder / FILES[0]).read_bytes()
        stored = {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    piece_of(content)["table"].update(stored)
    (folder / manifests.NAME).write_bytes(sealed(content))


@pytest.mark.parametrize("edit", EDITS)
def test_a_sealed_manifest_is_held_against_its_types(edit: str, content: dict[str, Any], tmp_path: Path) -> None:
    EDITS[edit](content)
    (tmp_path / manifests.NAME).write_bytes(sealed(content))
    with pytest.raises(UserError, match=r"manifest\.json"):
        Manifest.open(str(tmp_path))


@pytest.mark.parametrize(
    ("column", "value"), [("label", -1), ("label", 4), ("offset", -5), ("size", -1), ("size", 4094)]
)
def test_an_index_points_to_what_there_is(tmp_path: Path, column: str, value: int) -> None:
    rows = ROWS.copy()
    rows[column][3] = value
    index = SplitIndex(str(tmp_path), "train", 4, written(tmp_path, rows).pieces)
    with pytest.raises(UserError, match=r"does not verify \((images|labels) outside"):
        index.rows([0])
    with pytest.raises(UserError, match=r"does not verify \((images|labels) outside"):
        _ = index.label


@pytest.mark.parametrize("num_bytes", [100_000, 10**15])
def test_counts_that_the_files_do_not_have_take_no_memory(tmp_path: Path, num_bytes: int) -> None:
    """A shard of a trillion samples: too small for them, or as large as that would be, in a lie with all its digests."""
    written(tmp_path)
    num, path = 10**12, tmp_path / FILES[0]
    table = json.loads(path.read_text())
    table["shards"][0] |= {"num_samples": num, "size_bytes": num_bytes}
    table["rows"]["size_bytes"] += (num - 4) * ROW.itemsize
    path.write_text(json.dumps(table))
    stored = StoredFile(path.name, path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    summary = documents.convert(table, PieceTable, "here").summary()
    index = SplitIndex(str(tmp_path), "train", 4, [Piece(**asdict(summary), table=stored)])
    for use_it in (lambda: index.label, lambda: index.shard, lambda: index.rows([num - 1])):
        with pytest.raises(UserError, match="does not verify"):
            use_it()


def test_keys_of_other_columns_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"key": pa.array(["a", None]), "phash": pa.array([1, 2])}), path)
    keys = Keys(np.array([0, 2]), lambda _: path)
    with pytest.raises(UserError, match="do not verify"):
        _ = keys[0]
    with pytest.raises(UserError, match="do not verify"):
        keys.hashes(0)


def test_keys_of_a_bomb_are_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "k.parquet"
    pq.write_table(pa.table({"key": ["x" * 10_000] * 8192}), path, compression="zstd", use_dictionary=False)
    assert path.stat().st_size < 1_000_000
    with pytest.raises(UserError, match="huge"):
        _ = Keys(np.array([0, 8192]), lambda _: path)[0]


def test_pages_that_hold_fewer_rows_than_the_foot_says_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "k.parquet"
    write_keys(path, ["a", "b", "c", "d"], np.arange(4, dtype=np.uint64))
    good, num_refused = path.read_bytes(), 0
    for place in [n for n, byte in enumerate(good) if byte == 8]:  # 4, as parquet writes it
        path.write_bytes(good[:place] + b"\0" + good[place + 1 :])
        keys = Keys(np.array([0, 4]), lambda _: path)
        try:
            assert len(keys.hashes(0)) == len(list(keys)) == 4
        except UserError as refused:
            num_refused += "0 rows where its description says 4" in str(refused)
    assert num_refused >= 2


@pytest.mark.parametrize("num", [200, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [manifests.NAME, *FILES])
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
            (tmp_path / name).write_bytes(data)
        else:
            seal(content, tmp_path, name, data)
        use(str(tmp_path))

    counts = fuzz(read, mutants([seed], num, tokens=tokens), tmp_path)
    assert counts["read"] and counts["refused"]
