"""The manifest: opened only if it verifies, and `verify` finds every byte that changed."""

import hashlib
import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.format.manifest import Manifest
from pipeline.data.prepare.prepare import prepare
from pipeline.data.sources.cards import load_card
from pipeline.data.verify.verify import verify
from pipeline.errors import UserError
from tests.pipeline.data.format.forged import forge


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits") / "out"
    prepare(load_card("digits"), str(out), shard_bytes=1 << 20)
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.fixture
def dataset(original, tmp_path):
    for name, data in original.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def test_what_it_gives(dataset):
    manifest = Manifest.open(str(dataset))
    assert manifest.name == "digits" and manifest.classes == tuple("0123456789") and manifest.num_classes == 10
    assert set(manifest.splits) == {"train", "val"} and len(manifest.digest) == 64
    index = manifest.split("train")
    assert (index.shard.dtype, index.offset.dtype, index.size.dtype, index.label.dtype) == ("i4", "i8", "i4", "i4")
    assert index.num_samples == len(index.keys) == len(index.label) == 1100
    assert sum(shard.num_samples for shard in index.shards) == 1100 and len(index.shards) > 1
    assert (np.diff(index.shard) >= 0).all()
    sent = pickle.dumps(index)  # as it goes to a worker: places of files, not arrays
    copy = pickle.loads(sent)
    assert len(sent) < 4000
    assert np.array_equal(copy.offset, index.offset) and list(copy.keys) == list(index.keys)
    assert manifest.created_with["webdataset"]


def test_verify_counts(dataset):
    found = verify(str(dataset))
    assert found.problems == () and found.num_samples == 1797
    assert found.num_bytes == sum(path.stat().st_size for path in dataset.glob("*.tar"))


def test_unknown_split_and_no_dataset(dataset, tmp_path):
    with pytest.raises(UserError, match=r"no split 'test': choose train or val"):
        Manifest.open(str(dataset)).split("test")
    with pytest.raises(UserError, match=r"no dataset at .*data prepare"):
        Manifest.open(str(tmp_path / "nothing"))


def edited(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["classes"].reverse(), "does not verify"),
        (lambda c: c["splits"]["val"].update(num_samples=1), "does not verify"),
        (lambda c: c["splits"].pop("val"), "does not verify"),
        (lambda c: c.pop("skipped_list"), "does not verify"),
        (lambda c: c.update(format_version=1), "format version 1, .*: prepare the dataset again"),
        (lambda c: c.update(format_version=2), "format version 2, .*: 'normfree data index .*' converts it"),
        (lambda c: c.update(format="other"), "not a dataset manifest"),
    ],
)
def test_an_edited_manifest_is_refused(dataset, change, message):
    edited(dataset / "manifest.json", change)
    with pytest.raises(UserError, match=message):
        Manifest.open(str(dataset))


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"\xff\xfe", None])
def test_a_damaged_manifest_is_refused(dataset, data):
    path = dataset / "manifest.json"
    path.write_bytes(path.read_bytes()[:-500] if data is None else data)
    with pytest.raises(UserError, match=r"manifest\.json is .*; restore it, or prepare the dataset again elsewhere$"):
        Manifest.open(str(dataset))


@pytest.mark.parametrize("column", ["offset", "label"])
def test_changed_rows_are_never_used(dataset, column):
    values = getattr(Manifest.open(str(dataset)).split("val"), column)
    path = dataset / "val-00000.rows.npy"
    rows = np.load(path)
    rows[column][5] = values[5] + 1
    np.save(path, rows)
    index = Manifest.open(str(dataset)).split("val")
    with pytest.raises(UserError, match=r"val-00000\.rows\.npy does not verify"):
        getattr(index, column)
    with pytest.raises(UserError, match=r"val-00000\.rows\.npy does not verify"):
        index.rows([3])
    if column == "label":
        assert any("does not verify" in problem for problem in verify(str(dataset)).problems)


def test_changed_keys_are_never_used(dataset):
    path = dataset / "val-00000.keys.parquet"
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"val-00000\.keys\.parquet do not verify"):
        list(Manifest.open(str(dataset)).split("val").keys)


@pytest.mark.parametrize("name", ["val-00000.index.json", "val-00000.rows.npy", "val-00000.keys.parquet"])
def test_a_cut_or_missing_piece_is_refused_and_the_rest_is_used(dataset, name):
    path = dataset / name

    def use():
        index = Manifest.open(str(dataset)).split("val")
        _ = index.label, index.keys[0]

    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{name} does not verify"):
        use()
    path.unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        use()
    assert any(f"{name} is missing" in problem for problem in verify(str(dataset)).problems)
    assert Manifest.open(str(dataset)).split("train").keys[0]


def test_verify_names_every_shard_that_changed(dataset):
    flipped, cut, missing = (dataset / f"train-{number:06d}.tar" for number in range(3))
    data = bytearray(flipped.read_bytes())
    data[3000] ^= 1
    flipped.write_bytes(data)
    cut.write_bytes(cut.read_bytes()[:-1024])
    missing.unlink()
    problems = verify(str(dataset)).problems
    for shard, word in ((flipped, "have changed"), (cut, "bytes where"), (missing, "missing")):
        assert any(problem.startswith(f"{shard.name}: ") and word in problem for problem in problems)
    assert {problem.partition(":")[0] for problem in problems} == {flipped.name, cut.name, missing.name}


def test_verify_names_every_image_that_does_not_decode_any_more(dataset):
    index = Manifest.open(str(dataset)).split("train")
    path = dataset / index.shards[0].name
    data = bytearray(path.read_bytes())
    for place in (2, 5, 9):
        data[index.offset[place] + index.size[place] // 2] ^= 255
    path.write_bytes(data)
    problems = verify(str(dataset), workers=1).problems
    for place in (2, 5, 9):
        assert sum(f"sample {index.keys[place]} cannot be used" in problem for problem in problems) == 1
    assert len(problems) == 4 and "SHA-256" in problems[0]


def test_verify_reads_what_lies_behind_a_damage(dataset):
    index = Manifest.open(str(dataset)).split("train")
    path = dataset / index.shards[0].name
    data = bytearray(path.read_bytes())
    data[index.offset[3] - 512] ^= 255  # the header of the image
    path.write_bytes(data)
    problems = verify(str(dataset)).problems
    assert any("bad checksum" in problem for problem in problems)
    behind = [problem for problem in problems if "its image is still at its place" in problem]
    assert len(behind) == index.shards[0].num_samples - 3


def test_verify_holds_the_members_against_the_index(dataset):
    """A tar that was rewritten together with its digests still has to agree with the index."""
    path = dataset / "train-000000.tar"
    with tarfile.open(path) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, (member, data) in enumerate(members):
            label = b"3" if member.name.endswith(".cls") and number < 2 and data != b"3" else data
            tar.addfile(member, io.BytesIO(label))
    path.write_bytes(buffer.getvalue())
    forge(dataset, sha256=hashlib.sha256(buffer.getvalue()).hexdigest(), size_bytes=len(buffer.getvalue()))
    problems = verify(str(dataset)).problems
    assert len(problems) == 1 and "another label" in problems[0]
