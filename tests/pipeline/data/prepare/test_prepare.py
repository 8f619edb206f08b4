"""Preparing: shards that a reader we did not write agrees with, equal bytes every time, nothing half done."""

import dataclasses
import io
import json
import os
import tarfile
import time
import uuid
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.format.manifest import UNFINISHED_NAME, Manifest
from pipeline.data.images.decode import decode_image
from pipeline.data.prepare import assemble, output_folder, shard_writer
from pipeline.data.prepare.prepare import prepare
from pipeline.data.sources.cards import load_card
from pipeline.data.verify.verify import verify
from pipeline.errors import UserError
from pipeline.storage import objects, ownership, process_identity
from tests.pipeline.data.sources.trees import iterate

DATA = Path(os.environ.get("NORMFREE_TEST_DATA", Path(__file__).resolve().parents[5] / "shared" / "data"))
CARD = load_card("images")
CUT_JPEG = b"\xff\xd8\xff\xe0 cut"


def png(red, side=4):
    buffer = io.BytesIO()
    noise = np.random.default_rng(red).integers(0, 255, (side, side, 3), np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def source(tmp_path):
    """Three classes, 8 train and 2 val images each, with names that are hard on tars and on WebDataset."""
    names = ["a.b.c", "a b", "ä/ö", "x" * 150, "A", "a", "a.tar", "-"]
    number = 0
    for name in ("cat", "dog.v2", "Éléphant"):
        for split, stems in (("train", names), ("val", ["a", "1"])):
            for stem in stems:
                path = tmp_path / "source" / split / name / f"{stem}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(png(number))
                number += 1
    return str(tmp_path / "source")


def files_of(out):
    return {url.rpartition("/")[2]: objects.read_bytes(url) for url in objects.list_urls(out)}


def image_at(manifest, index, sample):
    url = objects.join(manifest.url, index.shards[index.shard[sample]].name)
    return objects.read_range(url, int(index.offset[sample]), int(index.size[sample]))


def read_by_webdataset(folder, index):
    import webdataset

    urls = [str(Path(folder) / shard.name) for shard in index.shards]
    return list(webdataset.WebDataset(urls, shardshuffle=False, nodesplitter=None, empty_check=False))


def assert_sound(manifest, raw):
    """Manifest, offsets and webdataset's own reader agree with the raw samples, image by image."""
    assert verify(manifest.url).problems == ()
    expected = Counter((s.split, manifest.classes.index(s.class_name), s.data) for s in raw)
    found: Counter = Counter()
    for split in manifest.splits:
        index = manifest.split(split)
        records = read_by_webdataset(manifest.url, index)
        assert [record["__key__"] for record in records] == list(index.keys)
        assert [int(record["cls"]) for record in records] == index.label.tolist()
        for sample, record in enumerate(records):
            (data,) = (value for key, value in record.items() if key not in ("cls",) and not key.startswith("__"))
            assert data == image_at(manifest, index, sample)
            found[split, int(index.label[sample]), data] += 1
        assert len(index.label) == index.num_samples == manifest.splits[split].num_samples
    assert found == expected


def test_a_hard_tree(source, tmp_path):
    manifest = prepare(CARD, str(tmp_path / "out"), source=source, shard_bytes=16384)
    assert_sound(manifest, list(iterate(CARD, source)))
    assert manifest.classes == ("cat", "dog.v2", "Éléphant")
    index = manifest.split("train")
    assert np.bincount(index.label).tolist() == [8, 8, 8] and len(index.shards) > 1
    assert all(shard.size_bytes <= 16384 for shard in index.shards)
    keys = [*index.keys, *manifest.split("val").keys]
    assert len({key.lower() for key in keys}) == 30
    assert all(len(key) <= 90 and "." not in key and "/" not in key and key.isascii() for key in keys)
    assert sorted(index.label.tolist()) != index.label.tolist()  # shuffled
    assert {p.name for p in (tmp_path / "out").iterdir()} == set(files_of(str(tmp_path / "out")))  # no staging, no mark
    assert UNFINISHED_NAME not in files_of(str(tmp_path / "out"))


def test_equal_bytes_from_folder_tar_and_store(source, tmp_path):
    with tarfile.open(tmp_path / "source.tar", "w") as tar:
        tar.add(source, "anything")
    outs = [str(tmp_path / "a"), str(tmp_path / "b"), f"memory://{uuid.uuid4().hex}"]
    first, second, third = (
        prepare(CARD, out, source=raw, shard_bytes=16384)
        for out, raw in zip(outs, [source, str(tmp_path / "source.tar"), source], strict=True)
    )
    assert first.digest == second.digest == third.digest
    assert files_of(outs[0]) == files_of(outs[1]) == files_of(outs[2])
    assert prepare(CARD, str(tmp_path / "c"), source=source, shard_bytes=16384, seed=1).digest != first.digest


def test_present_already(source, tmp_path):
    out = str(tmp_path / "out")
    first = prepare(CARD, out, source=source)
    times = {path: path.stat().st_mtime_ns for path in Path(out).iterdir()}
    assert prepare(CARD, out, source=source).digest == first.digest
    assert prepare(CARD, out, source=None).digest == first.digest  # the raw images are not needed any more
    assert {path: path.stat().st_mtime_ns for path in Path(out).iterdir()} == times
    with pytest.raises(UserError, match=r"prepared otherwise.*seed 0"):
        prepare(CARD, out, source=source, seed=1)
    with pytest.raises(UserError, match=r"another dataset \('images'\)"):
        prepare(load_card("digits"), out)
    (Path(source) / "train" / "cat" / "new.png").write_bytes(png(99))
    with pytest.raises(UserError, match="another source"):
        prepare(CARD, out, source=source)
    assert verify(out).problems == ()


def test_an_output_with_other_files_is_not_touched(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train-000000.tar").write_bytes(b"somebody's")
    with pytest.raises(UserError, match="holds other files"):
        prepare(CARD, str(tmp_path / "out"), source=source)
    assert files_of(str(tmp_path / "out")) == {"train-000000.tar": b"somebody's"}
    with pytest.raises(UserError, match="is a file"):
        prepare(CARD, str(tmp_path / "out" / "train-000000.tar"), source=source)


@pytest.mark.parametrize("dies_at", ["train-000001.tar", "val-00000.index.json", "manifest.json"])
def test_killed_before_the_manifest_is_no_dataset_and_runs_again(source, tmp_path, monkeypatch, dies_at):
    out = str(tmp_path / "out")
    expected = files_of(prepare(CARD, str(tmp_path / "unbroken"), source=source, shard_bytes=16384).url)

    def dying(original, argument):
        def call(*args):
            if str(args[argument]).endswith(dies_at):
                raise KeyboardInterrupt
            original(*args)

        return call

    with monkeypatch.context() as patch:
        for module in (shard_writer, assemble):
            patch.setattr(module, "publish", dying(output_folder.publish, 1))
        patch.setattr(objects, "write_bytes", dying(objects.write_bytes, 0))
        with pytest.raises(KeyboardInterrupt):
            # Smaller shards than below: the run that finishes must also clear away what it does not need.
            prepare(CARD, out, source=source, shard_bytes=12288)
    with pytest.raises(UserError, match="is not finished"):
        Manifest.open(out)
    with pytest.raises(UserError, match="unfinished 'images'"):
        prepare(load_card("digits"), out)
    prepare(CARD, out, source=source, shard_bytes=16384)
    assert files_of(out) == expected


def test_images_that_do_not_decode(source, tmp_path):
    bad = Path(source) / "train" / "cat" / "bad.jpg"
    bad.write_bytes(CUT_JPEG)
    out = str(tmp_path / "out")
    with pytest.raises(UserError, match=r"1 of the first \d+ images \(of 31\).*train/cat/bad.jpg"):
        prepare(CARD, out, source=source)
    assert "manifest.json" not in files_of(out)
    manifest = prepare(CARD, out, source=source, max_bad_share=0.05)
    (skipped,) = Manifest.open(out).skipped
    assert (skipped.split, skipped.key) == ("train", "cat/bad.jpg") and "Truncated" in skipped.reason
    assert manifest.split("train").num_samples == 24
    assert_sound(manifest, [s for s in iterate(CARD, source) if s.data != CUT_JPEG])


def test_splits_val_share_and_arguments(source, tmp_path):
    assert set(prepare(CARD, str(tmp_path / "a"), source=source, splits=["train"]).splits) == {"train"}
    flat = str(Path(source) / "train")
    with pytest.raises(UserError, match=r"no split val.*val_share"):
        prepare(CARD, str(tmp_path / "b"), source=flat, splits=["train", "val"])
    manifest = prepare(CARD, str(tmp_path / "b"), source=flat, splits=["train", "val"], val_share=0.25)
    assert np.bincount(manifest.split("val").label).tolist() == [2, 2, 2]
    assert "held out" in manifest.source_note
    for options, message in (
        ({"splits": ["val"]}, "must include train"),
        ({"max_bad_share": 1.0}, "max_bad_share"),
        ({"shard_bytes": 10}, "shard_bytes"),
    ):
        with pytest.raises(UserError, match=message):
            prepare(CARD, str(tmp_path / "c"), source=source, **options)
    with pytest.raises(UserError, match="no source at"):
        prepare(CARD, str(tmp_path / "c"), source=str(tmp_path / "none"))
    assert not (tmp_path / "c").exists()


def test_progress_ends_at_the_total(source, tmp_path):
    calls = []
    prepare(CARD, str(tmp_path / "out"), source=source, progress=lambda *call: calls.append(call))
    assert calls[0] == ("writing", 0, 30) and calls[-1] == ("writing", 30, 30)


def test_digits(tmp_path):
    card = load_card("digits")
    manifest = prepare(card, str(tmp_path / "digits"))
    assert {name: split.num_samples for name, split in manifest.splits.items()} == card.splits
    assert_sound(manifest, list(iterate(card)))
    assert prepare(card, str(tmp_path / "digits")).digest == manifest.digest
    index = manifest.split("val")
    pixels = decode_image(image_at(manifest, index, 0))
    assert pixels.shape == (8, 8, 3)


@pytest.mark.parametrize("name", ["signdigits", "omniglot", "mnist", "flowers"])
def test_real_tars(name, tmp_path):
    raw = DATA / f"{name}.tar"
    if not raw.is_file():
        pytest.skip(f"no {raw} (set NORMFREE_TEST_DATA)")
    card = load_card(name)
    manifest = prepare(card, str(tmp_path / name), source=str(raw), shard_bytes=4 << 20)
    assert {split: entry.num_samples for split, entry in manifest.splits.items()} == card.splits
    assert manifest.skipped == () and manifest.source_note == ""
    assert_sound(manifest, list(iterate(card, str(raw))))
    assert "/work" not in json.dumps(json.loads((tmp_path / name / "manifest.json").read_bytes()))


def test_a_place_that_another_process_writes_to_is_refused_by_its_name(tmp_path: Path) -> None:
    out = str(tmp_path / "digits")
    other = dataclasses.replace(
        process_identity.this_process(), pid=os.getppid(), started=process_identity.started_at(os.getppid())
    )
    now_s = time.time()
    record = ownership.Record(what="dataset", token="ab" * 16, since_s=now_s, beat_s=now_s, processes=(other,))
    objects.write_bytes(objects.join(out, ownership.NAME), record.to_json())
    with pytest.raises(UserError, match=rf"a dataset of process {os.getppid()} on "):
        prepare(load_card("digits"), out)
    objects.remove(objects.join(out, ownership.NAME))
    prepare(load_card("digits"), out)
    assert not (tmp_path / "digits" / ownership.NAME).exists()


@pytest.mark.parametrize("text", ["", '{"card": ', "[" * 100_000, '{"card": 3}', "{}"])
def test_a_damaged_mark_of_an_unfinished_preparation_is_named(tmp_path, text):
    (tmp_path / "PREPARING.json").write_text(text)
    with pytest.raises(UserError, match=r"PREPARING\.json .*choose another --out"):
        prepare(load_card("digits"), str(tmp_path))
