"""A dataset of format 2 is converted by the command that indexes, without its images."""

import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.format import manifest as manifests
from pipeline.data.format.manifest import Manifest, Skipped
from pipeline.data.prepare import convert as converts
from pipeline.data.prepare.adopt import adopt
from pipeline.data.verify.verify import verify
from pipeline.errors import UserError
from pipeline.training import identity

SKIPPED = Skipped("train", "x/1.jpg", "empty file")


def stored(path: Path) -> dict[str, object]:
    return {
        "name": path.name,
        "size_bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }


def written_as_format_2(now: Manifest, folder: Path) -> Path:
    """What the release before wrote for the same shards."""
    splits = {}
    for name in now.splits:
        index = now.split(name)
        arrays = {
            column: np.asarray(getattr(index, column))
            for column in ("shard", "offset", "size", "label", "phash", "crc32")
        }
        batch = pa.record_batch(arrays)
        path, keys_path = folder / f"{name}.index.arrow", folder / f"{name}.keys.parquet"
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
        pq.write_table(
            pa.table({"key": pa.array(list(index.keys))}), keys_path, compression="zstd", row_group_size=8192
        )
        digests = {column: hashlib.sha256(values.tobytes()).hexdigest() for column, values in arrays.items()}
        files = {"columns": stored(path), "column_sha256": digests, "keys": stored(keys_path)}
        shards = [asdict(shard) for shard in index.shards]
        splits[name] = {"num_samples": index.num_samples, "shards": shards, "index": files}
        for shard in index.shards:
            shutil.copy(Path(now.url) / shard.name, folder)
    content = {
        "format": manifests.FORMAT,
        "format_version": 2,
        "name": now.name,
        "digest": "e" * 64,
        "classes": list(now.classes),
        "splits": splits,
        "skipped": [asdict(SKIPPED)],
        "recipe": dict(now.recipe),
        "source_note": now.source_note,
        "created_with": dict(now.created_with),
    }
    (folder / "manifest.json").write_text(json.dumps({**content, "checksum": manifests.checksum(content)}))
    return folder


@pytest.fixture
def old(digits, tmp_path):
    return written_as_format_2(Manifest.open(digits), tmp_path)


def test_it_is_the_dataset_that_it_was(old, digits):
    with pytest.raises(UserError, match=r"format version 2, .*'normfree data index .*' converts it"):
        Manifest.open(str(old))
    found, same = adopt(str(old)), Manifest.open(digits)
    assert (found.digest, found.classes, found.recipe) == (same.digest, same.classes, same.recipe)
    assert found.skipped == (SKIPPED,) and found.former_digest == "e" * 64
    assert list(found.split("val").keys) == list(same.split("val").keys)
    assert verify(str(old)).problems == ()
    assert not [path.name for path in old.iterdir() if path.name.endswith(("arrow", "train.keys.parquet"))]


def test_killed_while_it_is_converted_it_is_what_it_was_and_runs_again(old, monkeypatch):
    before = {path.name: path.read_bytes() for path in old.iterdir()}

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(converts, "write_skipped", killed)
        adopt(str(old))
    assert {name: (old / name).read_bytes() for name in before} == before
    assert adopt(str(old)).split("train").num_samples


def test_a_damaged_index_of_format_2_is_refused_and_kept(old):
    path = old / "train.index.arrow"
    path.write_bytes(path.read_bytes()[:-9] + b"x" * 9)
    with pytest.raises(UserError, match=r"train\.index\.arrow does not verify"):
        adopt(str(old))
    assert path.exists() and json.loads((old / "manifest.json").read_text())["format_version"] == 2


def test_a_run_on_the_dataset_before_goes_on(old, tmp_path):
    found = adopt(str(old))
    source = identity.SourceIdentity(
        url=found.url,
        split="train",
        digest=found.digest,
        num_samples=1,
        num_shards=1,
        shards="",
        former_digest=found.former_digest,
    )
    now = identity.Identity(sources=[source], names=["a"], classes=list(found.classes))
    identity.refuse_other_data("out", now, digest="e" * 64, classes=found.classes)
    with pytest.raises(UserError, match="holds a run on data with digest dddd"):
        identity.refuse_other_data("out", now, digest="d" * 64, classes=found.classes)
