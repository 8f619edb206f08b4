"""Records of finished shards: one that is damaged, or of another shard, is no record."""

import json

import numpy as np
import pytest

from pipeline.data.format.pieces import Shard
from pipeline.data.prepare.assemble import PieceMaker, PlannedPiece
from pipeline.data.prepare.journal import Record, read_record, write_record
from pipeline.errors import UserError

NAME = "train-000000.tar"


@pytest.fixture
def out(tmp_path):
    numbers = np.arange(2)
    record = Record(
        "p" * 64, "train", Shard(NAME, 5, "a" * 64, 2), ("a", "b"), numbers, numbers, numbers, numbers, numbers, ()
    )
    (tmp_path / NAME).write_bytes(b"12345")
    write_record(str(tmp_path), record)
    return tmp_path


def test_a_record_is_read_as_it_was_written(out):
    record = read_record(str(out), NAME, "p" * 64)
    assert record is not None and record.keys == ("a", "b")
    assert read_record(str(out), NAME, "q" * 64) is None and read_record(str(out), "train-000001.tar", "p" * 64) is None


@pytest.mark.parametrize(
    "change",
    [
        {"shard": {"name": "../other.tar", "size_bytes": 5, "sha256": "a" * 64, "num_samples": 2}},
        {"keys": ["a"]},
        {"label": [1, 1 << 40]},
        {"phash": [1, 1 << 70]},
        {"offset": "12"},
        {"skipped": [{"split": "train"}]},
    ],
)
def test_a_record_that_cannot_be_is_none(out, change):
    path = out / "PREPARING" / f"{NAME}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert read_record(str(out), NAME, "p" * 64) is None


def test_a_cut_record_is_none(out):
    path = out / "PREPARING" / f"{NAME}.json"
    for text in (path.read_text()[:-20], "", "[" * 100_000):
        path.write_text(text)
        assert read_record(str(out), NAME, "p" * 64) is None


@pytest.mark.parametrize(
    ("change", "numbers"),
    [
        ({"label": [0, -1]}, None),
        ({"label": [0, 2]}, None),
        ({"label": [0, (1 << 31) - 1]}, None),  # 16 GB of counts
        ({}, {"x": 0}),  # of an adopted tar, and without its words
        ({"label_texts": ["x"]}, {"x": 0}),
        ({"label_texts": ["x", "y"]}, {"x": 0}),
    ],
)
def test_labels_of_a_record_are_classes_before_an_index_is_made_of_them(out, change, numbers):
    path = out / "PREPARING" / f"{NAME}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match="labels that are none of the classes: remove it"):
        PieceMaker(str(out), out / "work", 2, numbers)(PlannedPiece("train", 0, {NAME: "p" * 64}))
