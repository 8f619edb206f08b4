"""The index of a split: small, read in parts, equal to what was written."""

import hashlib
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from pipeline.data.format import pieces
from pipeline.data.format.index import SplitIndex
from pipeline.data.format.pieces import PIECE_SHARDS, ROW, Shard, write_piece
from pipeline.errors import UserError

ROOT = Path(__file__).parents[4]
SHARD_SAMPLES = 60


def synthetic(folder, num):
    """An index as ImageNet's would be: shuffled keys of a wnid and a number."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, 1000, num)
    wnids = np.array([f"n{number:08d}" for number in rng.integers(1_400_000, 15_000_000, 1000)])
    keys = pc.binary_join_element_wise(pa.array(wnids[label]), pa.array(np.arange(num)).cast(pa.string()), "_")
    rows = np.empty(num, ROW)
    rows["offset"], rows["size"] = np.arange(num) % SHARD_SAMPLES * 110_000, rng.integers(1000, 110_000, num)
    rows["label"], rows["crc32"] = label, rng.integers(0, 1 << 32, num, dtype=np.uint32)
    hashes = rng.integers(0, 1 << 63, num, dtype=np.uint64)
    made = []
    for number, begin in enumerate(range(0, num, PIECE_SHARDS * SHARD_SAMPLES)):
        part = slice(begin, min(begin + PIECE_SHARDS * SHARD_SAMPLES, num))
        counts = [min(SHARD_SAMPLES, part.stop - at) for at in range(begin, part.stop, SHARD_SAMPLES)]
        shards = [Shard(f"{number}-{i}", 1 << 26, "0" * 64, count) for i, count in enumerate(counts)]
        made.append(write_piece(folder, "train", number, shards, rows[part], keys[part], hashes[part])[0])
    return SplitIndex(str(folder), "train", 1000, made), rows, keys, hashes


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return synthetic(tmp_path_factory.mktemp("index"), 20_011)


def test_what_was_written_is_read(written):
    index, rows, keys, hashes = written
    shard = np.arange(20_011) // SHARD_SAMPLES
    for name, values in {**{n: rows[n] for n in ROW.names}, "shard": shard, "phash": hashes}.items():
        assert np.array_equal(getattr(index, name), values) and not getattr(index, name).flags.writeable
    assert list(index.keys) == keys.to_pylist() == np.asarray(index.keys).tolist()
    assert index.keys[19_999] == index.keys[-12] == keys[19_999].as_py() and len(index.keys) == 20_011
    places = np.array([19_000, 3, 8_192, 3])
    assert index.keys[places].tolist() == [keys[place].as_py() for place in places.tolist()]
    assert index.keys[5:7].tolist() == keys[5:7].to_pylist()
    assert index.keys.hashes_of(places).tolist() == hashes[places].tolist()
    with pytest.raises(IndexError):
        index.keys[20_011]
    assert len(index.pieces) == 2 and len(index.shards) == 334 and index.shards[-1].num_samples == 31


def test_rows_of_some_samples_are_those_of_the_columns(written):
    index, rows, *_ = written
    numbers = np.random.default_rng(1).integers(0, 20_011, 500)
    found = index.rows(numbers)
    assert found["shard"].tolist() == (numbers // SHARD_SAMPLES).tolist()
    assert all(found[name].tolist() == rows[name][numbers].tolist() for name in ROW.names)
    assert len(index.rows([])) == 0
    assert index.samples_of(333) == range(19_980, 20_011)


def test_a_few_samples_cost_their_shards_and_not_the_index(written, monkeypatch):
    index, *_ = written
    read = []
    original = pieces.PieceFiles._read
    monkeypatch.setattr(
        pieces.PieceFiles,
        "_read",
        lambda self, name, start, length: (read.append((name, length)), original(self, name, start, length))[1],
    )
    copy = pickle.loads(pickle.dumps(index))  # as it goes to a worker
    copy.rows([7, 8, 20_000])
    assert [(name.partition(".")[2], length) for name, length in read if "rows" in name] == [
        ("rows.npy", SHARD_SAMPLES * ROW.itemsize),
        ("rows.npy", 31 * ROW.itemsize),
    ]
    assert len([name for name, _ in read if name.endswith("index.json")]) == 2


def test_the_sizes_of_all_pieces_are_asked_for_once_whatever_is_read(written, monkeypatch):
    index, asked = written[0], []
    index = SplitIndex(index.url, index.name, index.num_classes, index.pieces)
    size_bytes = pieces.objects.size_bytes
    monkeypatch.setattr(pieces.objects, "size_bytes", lambda url: asked.append(url) or size_bytes(url))
    assert len(index.label) == len(index.offset) == len(index.shard) == index.num_samples
    assert len(asked) == len(set(asked)) == len(index.pieces)


def test_a_sample_costs_less_than_fifty_bytes(written):
    folder = Path(written[0].url)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 50 * 20_011


def test_other_readers_open_the_files(written):
    import pyarrow.parquet as pq

    index, rows, keys, _ = written
    found = [np.load(Path(index.url) / f"train-0000{i}.rows.npy", mmap_mode="r") for i in range(2)]
    assert np.array_equal(np.concatenate(found), rows)
    table = pa.concat_tables([pq.read_table(Path(index.url) / f"train-0000{i}.keys.parquet") for i in range(2)])
    assert table.column("key").to_pylist() == keys.to_pylist()


def test_a_start_at_three_hundred_million_samples_needs_neither_time_nor_memory(tmp_path):
    """470,000 shards of which one piece is there: what a process holds of the others is what the manifest says."""
    index, *_ = synthetic(tmp_path, SHARD_SAMPLES)
    piece = index.pieces[0]
    many = [piece] + [
        pieces.Piece(
            PIECE_SHARDS, 640 * PIECE_SHARDS, 1 << 34, "0" * 64, hashlib.sha256(b"%d" % i).hexdigest(), piece.table
        )
        for i in range(1830)
    ]
    (tmp_path / "index").write_bytes(pickle.dumps(SplitIndex(str(tmp_path), "train", 1000, many)))
    program = (
        "import pickle, resource, sys\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "import pipeline.data.format.index\n"
        "before = peak()\n"
        f"index = pickle.loads(open({str(tmp_path / 'index')!r}, 'rb').read())\n"
        "assert index.num_samples > 299_000_000 and len(index.rows([3])) == 1\n"
        "assert 'pyarrow' not in sys.modules\n"
        "print(peak() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env=dict(os.environ), check=True
    )
    assert int(done.stdout) < 32 << 20


def test_a_piece_of_another_dataset_is_refused(written, tmp_path):
    index, *_ = written
    for path in Path(index.url).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "train-00000.index.json").write_bytes((tmp_path / "train-00001.index.json").read_bytes())
    other = SplitIndex(str(tmp_path), "train", 1000, index.pieces)
    with pytest.raises(UserError, match=r"train-00000\.index\.json does not verify"):
        other.rows([3])
    assert len(other.rows([20_000])) == 1
