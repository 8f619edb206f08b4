"""The index of a split: small, mapped and not read, equal to what was written."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from pipeline.data.format.index import Shard, SplitIndex, index_problem, write_index

ROOT = Path(__file__).parents[4]


def synthetic(folder, num):
    """An index as ImageNet's would be: shuffled keys of a wnid and a number, 600 images a shard."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, 1000, num)
    wnids = np.array([f"n{number:08d}" for number in rng.integers(1_400_000, 15_000_000, 1000)])
    keys = pc.binary_join_element_wise(pa.array(wnids[label]), pa.array(np.arange(num)).cast(pa.string()), "_")
    arrays = {
        "shard": np.arange(num) // 600,
        "offset": np.arange(num) % 600 * 110_000,
        "size": rng.integers(1000, 110_000, num),
        "label": label,
        "phash": rng.integers(0, 1 << 63, num, dtype=np.uint64),
        "crc32": rng.integers(0, 1 << 32, num, dtype=np.uint32),
    }
    files = write_index(folder, "train", arrays, keys)
    shards = tuple(Shard(f"{i}", 1 << 26, "", min(600, num - i * 600)) for i in range(-(-num // 600)))
    paths = folder / files.columns.name, folder / files.keys.name
    return SplitIndex("train", shards, 1000, num, *paths, files.column_sha256), arrays, keys, files


def test_what_was_written_is_read(tmp_path):
    index, arrays, keys, _ = synthetic(tmp_path, 20_000)
    for name, values in arrays.items():
        assert np.array_equal(getattr(index, name), values) and not getattr(index, name).flags.writeable
    assert list(index.keys) == keys.to_pylist() == np.asarray(index.keys).tolist()
    assert index.keys[19_999] == index.keys[-1] == keys[19_999].as_py() and len(index.keys) == 20_000
    places = np.array([19_000, 3, 8_192, 3])
    assert index.keys[places].tolist() == [keys[place].as_py() for place in places.tolist()]
    assert index.keys[5:7].tolist() == keys[5:7].to_pylist()
    with pytest.raises(IndexError):
        index.keys[20_000]
    assert index.class_counts().tolist() == np.bincount(arrays["label"], minlength=1000).tolist()


def test_a_sample_costs_less_than_fifty_bytes(tmp_path):
    _, _, _, files = synthetic(tmp_path, 200_000)
    assert files.columns.size_bytes + files.keys.size_bytes < 50 * 200_000


def test_other_readers_open_both_files(tmp_path):
    import pyarrow.parquet as pq

    _, arrays, keys, files = synthetic(tmp_path, 1000)
    table = pa.ipc.open_file(tmp_path / files.columns.name).read_all()
    assert table.column("label").to_pylist() == arrays["label"].tolist()
    assert pq.read_table(tmp_path / files.keys.name).column("key").to_pylist() == keys.to_pylist()


@pytest.mark.parametrize(
    ("column", "value", "problem"),
    [
        ("shard", 1, "numbers of samples|out of order"),
        ("offset", 1 << 26, "outside their shard"),
        ("size", -1, "outside their shard"),
        ("label", 1000, "outside the classes"),
    ],
)
def test_an_index_that_contradicts_its_shards(tmp_path, column, value, problem):
    import re

    index, arrays, _, _ = synthetic(tmp_path, 1300)
    places = {name: np.array(arrays[name]) for name in ("shard", "offset", "size", "label")}
    assert index_problem(index.shards, 1000, **places) is None
    places[column][0] = value
    assert re.search(problem, index_problem(index.shards, 1000, **places) or "")


@pytest.mark.slow
def test_ten_million_samples_take_half_a_gigabyte_of_disk_and_opening_does_not_read_them(tmp_path):
    index, *_, files = synthetic(tmp_path, 10_000_000)
    assert files.columns.size_bytes + files.keys.size_bytes < 500_000_000
    import pickle

    (tmp_path / "index").write_bytes(pickle.dumps(index))
    program = (
        "import pickle, resource, sys\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "import pyarrow.parquet, pipeline.data.format.index\n"
        "before = peak()\n"
        f"index = pickle.loads(open({str(tmp_path / 'index')!r}, 'rb').read())\n"
        "index._batch, index.keys[7_654_321]\n"
        "print(peak() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env=dict(os.environ), check=True
    )
    assert int(done.stdout) < 64 << 20
