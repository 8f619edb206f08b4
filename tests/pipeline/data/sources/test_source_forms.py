"""The forms in which images come: whatever the form, the same images under the same classes; and bad ones are refused."""

import csv
import functools
import http.server
import io
import json
import os
import tarfile
import threading
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.prepare.prepare import prepare
from pipeline.data.sources.cards import load_card
from pipeline.data.sources.open_source import open_source
from pipeline.data.verify.verify import verify
from pipeline.errors import UserError
from pipeline.storage import objects
from tests.pipeline.data.sources.trees import iterate

CARD = load_card("images")
WNIDS = ("n01440764", "n01443537", "n02084071")


def image_bytes(number, kind="PNG"):
    buffer = io.BytesIO()
    noise = np.random.default_rng(number).integers(0, 255, (12, 12, 3), np.uint8)
    Image.fromarray(noise).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def tree(tmp_path):
    """name -> bytes of a small set with two splits."""
    files = {}
    for number in range(24):
        split = "val" if number % 4 == 0 else "train"
        files[f"{split}/{('cat', 'dog', 'ox')[number % 3]}/{number}.png"] = image_bytes(number)
    root = tmp_path / "tree"
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return files


def images_of(source, card=CARD, **options):
    return sorted((s.split, s.class_name, s.data) for s in iterate(card, str(source), **options))


def expected(tree):
    return sorted((*name.split("/")[:2], data) for name, data in tree.items())


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip(tree, tmp_path, method):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", method) as archive:
        for name, data in tree.items():
            archive.writestr(f"outer/{name}", data)
    assert images_of(tmp_path / "a.zip") == expected(tree)
    objects.put_file(tmp_path / "a.zip", "memory://forms/a.zip")
    assert images_of("memory://forms/a.zip") == expected(tree)


def test_a_damaged_zip_loses_one_image_under_its_name_or_is_refused(tree, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name, data in tree.items():
            archive.writestr(name, data)
    whole = (tmp_path / "a.zip").read_bytes()
    at = whole.index(tree["train/dog/1.png"]) + 40
    (tmp_path / "a.zip").write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
    manifest = prepare(CARD, str(tmp_path / "out"), source=str(tmp_path / "a.zip"), max_bad_share=0.1)
    assert [(s.key, s.reason) for s in manifest.skipped] == [
        ("dog/1.png", "damaged in the zip (size or checksum differs)")
    ]
    (tmp_path / "a.zip").write_bytes(whole[:-100])
    with pytest.raises(UserError, match="no readable zip"):
        images_of(tmp_path / "a.zip")


@pytest.mark.parametrize("name", ["../evil.png", "/evil.png", "a/../../evil.png", "..\\evil.png", "C:evil.png"])
def test_a_zip_member_outside_is_refused(tree, tmp_path, name):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("train/cat/1.png", image_bytes(0))
        archive.writestr(name, image_bytes(1))
    with pytest.raises(UserError, match="outside itself"):
        images_of(tmp_path / "a.zip")


@pytest.mark.parametrize("packing", ["gz", "bz2", "xz"])
def test_a_compressed_tar_is_unpacked_once_beside_the_output_and_cleared_away(tree, tmp_path, packing):
    with tarfile.open(tmp_path / "a.tar.packed", f"w:{packing}") as tar:
        tar.add(tmp_path / "tree", "tree")
    assert images_of(tmp_path / "a.tar.packed") == expected(tree)
    out = tmp_path / "out"
    first = prepare(CARD, str(tmp_path / "plain"), source=str(tmp_path / "tree"))
    assert prepare(CARD, str(out), source=str(tmp_path / "a.tar.packed")).digest == first.digest
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    data = (tmp_path / "a.tar.packed").read_bytes()
    (tmp_path / "a.tar.packed").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="cut short"):
        images_of(tmp_path / "a.tar.packed")


def rows_of(tree):
    return [{"path": name, "label": name.split("/")[1], "split": name.split("/")[0]} for name in sorted(tree)]


def write_list(path, rows):
    if path.suffix in (".jsonl", ".ndjson"):
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl"])
def test_a_list_of_files(tree, tmp_path, name):
    assert images_of(write_list(tmp_path / "tree" / name, rows_of(tree))) == expected(tree)
    absolute = [{**row, "path": str(tmp_path / "tree" / row["path"])} for row in rows_of(tree)]
    assert images_of(write_list(tmp_path / name, absolute)) == expected(tree)


def test_a_list_of_addresses_in_a_store_and_on_a_server(tree, tmp_path):
    handler = functools.partial(_Quiet, directory=str(tmp_path / "tree"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    rows = []
    for number, row in enumerate(rows_of(tree)):
        objects.write_bytes(f"memory://listed/{row['path']}", tree[row["path"]])
        where = f"http://127.0.0.1:{server.server_port}" if number % 2 else "memory://listed"
        rows.append({**row, "path": f"{where}/{row['path']}"})
    try:
        source = write_list(tmp_path / "a.jsonl", rows)
        roots = ["memory://listed", f"http://127.0.0.1:{server.server_port}/"]
        assert images_of(source) == []  # none lies next to the list
        assert images_of(source, allow_roots=roots) == expected(tree)
        gone = {**rows[1], "path": f"http://127.0.0.1:{server.server_port}/no-such.png", "split": "train"}
        write_list(source, [*rows, gone])
        out = str(tmp_path / "out")
        manifest = prepare(CARD, out, source=str(source), max_bad_share=0.1, allow_roots=roots)
    finally:
        server.shutdown()
    assert [entry.reason for entry in manifest.skipped] == ["no such file"]
    assert sum(split.num_samples for split in manifest.splits.values()) == 24


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,klass\na.png,1\n", "columns path, klass: path and label are needed"),
        ("path,label\na.png,\n", "line 2: path and label"),
        ("path,label,split\na.png,x,tset\n", "line 2: split 'tset'"),
        ("path,label\na.png,x\nb.png,y\na.png,y\n", "line 4: a.png is on line 2 already"),
        ("path,label\n", "no rows"),
    ],
)
def test_a_bad_list_is_refused_with_its_line(tmp_path, text, message):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        images_of(tmp_path / "a.csv")


def test_labels_that_are_numbers_are_in_numeric_order(tmp_path):
    rows = [{"path": f"{number}.png", "label": number} for number in (10, 9, 100, 2)]
    assert open_source(CARD, str(write_list(tmp_path / "a.jsonl", rows))).classes == ("2", "9", "10", "100")


def parquet_of(path, rows, *, struct=True, names=None):
    """As Hugging Face's datasets writes it: {bytes, path} and a ClassLabel described in the schema's metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = (
        [{"bytes": data, "path": f"{n}.png"} for n, (data, _) in enumerate(rows)] if struct else [d for d, _ in rows]
    )
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()}) if struct else pa.binary()
    table = pa.table({"image": pa.array(images, kind), "label": pa.array([label for _, label in rows])})
    if names:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=4)


@pytest.mark.parametrize("struct", [True, False])
def test_parquet_as_hugging_face_writes_it(tree, tmp_path, struct):
    names = ["cat", "dog", "ox"]
    for split, stem in (("train", "train"), ("val", "validation")):
        rows = [(data, names.index(n.split("/")[1])) for n, data in tree.items() if n.startswith(split)]
        for part in range(2):
            path = tmp_path / "hub" / "data" / f"{stem}-0000{part}-of-00002.parquet"
            parquet_of(path, rows[part::2], struct=struct, names=names)
    assert images_of(tmp_path / "hub") == expected(tree)
    manifest = prepare(CARD, str(tmp_path / "out"), source=str(tmp_path / "hub"), shard_samples=5)
    assert manifest.classes == ("cat", "dog", "ox") and verify(manifest.url).problems == ()
    assert not (tmp_path / "out" / ".staging").exists()


def test_class_folders_with_a_stray_parquet_file_are_class_folders(tree, tmp_path):
    parquet_of(tmp_path / "tree" / "notes.parquet", [(image_bytes(1), "x")])
    (tmp_path / "tree" / "cover.png").write_bytes(image_bytes(5))
    with pytest.raises(UserError, match="outside the class folders"):
        images_of(tmp_path / "tree")


def test_parquet_rows_without_label_or_bytes_are_counted(tree, tmp_path):
    rows = [(data, name.split("/")[1]) for name, data in sorted(tree.items())]
    parquet_of(tmp_path / "a.parquet", [*rows, (image_bytes(77), None), (None, "ox")], struct=True)
    manifest = prepare(CARD, str(tmp_path / "out"), source=str(tmp_path / "a.parquet"), max_bad_share=0.1)
    assert "1 rows without a label" in manifest.source_note
    assert [entry.reason for entry in manifest.skipped] == ["empty file"]
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(data[:-50])
    with pytest.raises(UserError, match="no readable parquet"):
        images_of(tmp_path / "a.parquet")


def ilsvrc(root, tree_of_train, val):
    """The files of ILSVRC-2012 in small: a tar of class tars, a tar of validation images, a devkit with meta.mat."""
    from scipy.io import savemat

    def add(tar, name, data):
        member = tarfile.TarInfo(name)
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))

    root.mkdir()
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as outer:
        for wnid, images in tree_of_train.items():
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for name, data in images.items():
                    add(tar, name, data)
            add(outer, f"{wnid}.tar", inner.getvalue())
    with tarfile.open(root / "ILSVRC2012_img_val.tar", "w") as tar:
        for number, (_, data) in enumerate(val, start=1):
            add(tar, f"ILSVRC2012_val_{number:08d}.JPEG", data)
    ids = {wnid: number for number, wnid in enumerate(reversed(WNIDS), start=1)}
    kinds = [("ILSVRC2012_ID", "f8"), ("WNID", "O"), ("words", "O")]
    meta = io.BytesIO()
    synsets = np.array([(number, wnid, "word") for wnid, number in ids.items()], dtype=kinds)
    savemat(meta, {"synsets": synsets[:, None]})
    truth = "".join(f"{ids[wnid]}\n" for wnid, _ in val).encode()
    with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        add(tar, "ILSVRC2012_devkit_t12/data/meta.mat", meta.getvalue())
        add(tar, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", truth)


@pytest.fixture
def imagenet(tmp_path):
    train = {
        wnid: {f"{wnid}_{n}.JPEG": image_bytes(100 * k + n, "JPEG") for n in range(4)} for k, wnid in enumerate(WNIDS)
    }
    val = [(WNIDS[n % 3], image_bytes(900 + n, "JPEG")) for n in (0, 2, 1, 1, 2)]
    ilsvrc(tmp_path / "raw", train, val)
    images = [("train", wnid, data) for wnid, files in train.items() for data in files.values()]
    return tmp_path / "raw", sorted(images + [("val", *row) for row in val]), [wnid for wnid, _ in val]


def test_imagenet_as_distributed(imagenet, tmp_path):
    raw, images, _ = imagenet
    assert images_of(raw) == images
    manifest = prepare(CARD, str(tmp_path / "out"), source=str(raw), shard_samples=4, workers=2)
    assert manifest.classes == WNIDS and verify(manifest.url).problems == ()
    assert sorted(manifest.split("train").keys)[0] == "n01440764_0"
    with pytest.raises(UserError, match="card 'imagenet' says 1000"):
        open_source(load_card("imagenet"), str(raw))


@pytest.mark.parametrize("form", ["synsets", "pairs", "kaggle"])
def test_imagenet_with_labels_as_text(imagenet, form):
    raw, images, wnids = imagenet
    (raw / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    with pytest.raises(UserError, match="validation images but not their labels"):
        images_of(raw)
    names = [f"ILSVRC2012_val_{number:08d}" for number in range(1, 6)]
    pairs = list(zip(names, wnids, strict=True))[::-1]
    if form == "synsets":
        (raw / "imagenet_2012_validation_synset_labels.txt").write_text("\n".join(wnids) + "\n")
    elif form == "pairs":
        (raw / "val_labels.txt").write_text("".join(f"{name}.JPEG {wnid}\n" for name, wnid in pairs))
    else:
        lines = "".join(f"{name},{wnid} 85 1 499 272 {wnid} 1 2 3 4\n" for name, wnid in pairs)
        (raw / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + lines)
    assert images_of(raw) == images


def test_a_devkit_that_is_a_bomb_is_refused(imagenet):
    raw, _, _ = imagenet
    matlab = bytes(128) + (15).to_bytes(4, "little") + (1 << 20).to_bytes(4, "little") + zlib.compress(bytes(80 << 20))
    truth = b"1\n" * 5
    with tarfile.open(raw / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        for name, data in (("meta.mat", matlab), ("ILSVRC2012_validation_ground_truth.txt", truth)):
            member = tarfile.TarInfo(f"data/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    with pytest.raises(UserError, match=r"meta\.mat unpacks to more than"):
        images_of(raw)


def test_hidden_files_beside_the_class_tars_are_left_out(imagenet):
    raw, images, _ = imagenet
    with tarfile.open(raw / "ILSVRC2012_img_train.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("._n01440764.tar"))
    assert images_of(raw) == images
    assert "1 hidden files were skipped" in open_source(CARD, str(raw)).note


def test_imagenet_with_one_label_too_few_or_a_cut_class_tar_is_refused(imagenet):
    raw, _, wnids = imagenet
    (raw / "val_labels.txt").write_text("\n".join(wnids[:-1]))
    with pytest.raises(UserError, match="4 labels for 5 validation images"):
        images_of(raw)
    (raw / "val_labels.txt").unlink()
    data = (raw / "ILSVRC2012_img_train.tar").read_bytes()
    (raw / "ILSVRC2012_img_train.tar").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="cut short"):
        images_of(raw)


def test_an_empty_class_folder_or_one_without_images_is_no_class_fewer(tree, tmp_path):
    (tmp_path / "tree" / "train" / "yak").mkdir()
    with pytest.raises(UserError, match=r"empty folder \(train/yak\)"):
        images_of(tmp_path / "tree")
    (tmp_path / "tree" / "train" / "yak" / "readme.txt").write_text("none yet")
    with pytest.raises(UserError, match="no image in the class folder train/yak"):
        images_of(tmp_path / "tree")


def test_names_that_are_no_utf8_are_kept_apart_and_shown(tree, tmp_path):
    for name in (b"\xff", b"\xfe"):
        path = os.path.join(os.fsencode(tmp_path / "tree" / "train" / "cat"), name + b".png")
        Path(os.fsdecode(path)).write_bytes(image_bytes(ord(name)))
        os.makedirs(os.path.join(os.fsencode(tmp_path / "tree" / "train"), b"caf\xe9"), exist_ok=True)
    Path(os.fsdecode(os.fsencode(tmp_path / "tree" / "train") + b"/caf\xe9/1.png")).write_bytes(b"no image")
    Path(os.fsdecode(os.fsencode(tmp_path / "tree" / "train") + b"/caf\xe9/2.png")).write_bytes(image_bytes(2))
    manifest = prepare(CARD, str(tmp_path / "out"), source=str(tmp_path / "tree"), max_bad_share=0.1)
    assert "caf\\xe9" in manifest.classes and manifest.skipped[0].key == "caf\\xe9/1.png"
    assert manifest.splits["train"].num_samples == 21 and verify(manifest.url).problems == ()
    assert (tmp_path / "out" / "manifest.json").read_bytes().isascii()


def test_a_class_of_which_no_image_decodes_stops(tree, tmp_path):
    (tmp_path / "tree" / "train" / "yak").mkdir()
    (tmp_path / "tree" / "train" / "yak" / "1.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="class yak has no image in train that can be read"):
        prepare(CARD, str(tmp_path / "out"), source=str(tmp_path / "tree"), max_bad_share=0.1)


def test_the_later_of_two_files_of_one_name_in_an_archive_counts(tree, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "tree", "tree")
        member = tarfile.TarInfo("tree/train/dog/1.png")
        member.size = len(image_bytes(99))
        tar.addfile(member, io.BytesIO(image_bytes(99)))
    assert images_of(tmp_path / "a.tar") == expected({**tree, "train/dog/1.png": image_bytes(99)})
    assert "1 files were replaced" in open_source(CARD, str(tmp_path / "a.tar")).note
