"""Sources: what is taken from tars, folders and packages, and what is refused."""

import gzip
import io
import os
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.images.decode import decode_image
from pipeline.data.sources import glyphs
from pipeline.data.sources.cards import list_cards, load_card
from pipeline.data.sources.open_source import open_source
from pipeline.errors import UserError
from pipeline.storage import objects
from tests.pipeline.data.sources.trees import iterate

DATA = Path(os.environ.get("NORMFREE_TEST_DATA", Path(__file__).resolve().parents[5] / "shared" / "data"))
CARD = load_card("images")
TREE = ["train/cat/1.png", "train/cat/2.PNG", "train/dog/sub/1.jpeg", "val/cat/3.png", "val/dog/4.png"]


def image_bytes(name):
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2), (sum("/".join(name.split("/")[-3:]).encode()) % 256, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def folder_of(root, names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(image_bytes(name))
    return str(root)


def tar_of(path, names, *, mode="w", extra=()):
    with tarfile.open(path, mode) as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(image_bytes(name))
            tar.addfile(member, io.BytesIO(image_bytes(name)))
        for member in extra:
            tar.addfile(member)
    return str(path)


def content(source, card=CARD, **options):
    return sorted((s.split, s.class_name, s.key, s.extension, s.data) for s in iterate(card, source, **options))


def test_tar_gzip_folder_and_store_are_the_same(tmp_path):
    expected = content(folder_of(tmp_path / "folder", TREE))
    assert [row[:4] for row in expected] == [
        ("train", "cat", "1", "png"),
        ("train", "cat", "2", "png"),
        ("train", "dog", "sub/1", "jpeg"),
        ("val", "cat", "3", "png"),
        ("val", "dog", "4", "png"),
    ]
    assert content(tar_of(tmp_path / "a.tar", TREE)) == expected
    assert content(tar_of(tmp_path / "a.tgz", TREE, mode="w:gz")) == expected
    assert content(tar_of(tmp_path / "b.tar", [f"./outer/more/{name}" for name in TREE])) == expected
    for name in TREE:
        objects.write_bytes(f"memory://sources/folder/{name}", image_bytes(name))
    objects.put_file(tmp_path / "a.tar", "memory://sources/a.tar")
    assert content("memory://sources/folder") == content("memory://sources/a.tar") == expected


def test_names_of_splits(tmp_path):
    names = [n.replace("train/", "Training/").replace("val/", "validation/") for n in TREE] + ["test/cat/9.png"]
    splits = Counter(row[0] for row in content(folder_of(tmp_path, names)))
    assert splits == {"train": 3, "val": 2, "test": 1}


def test_only_regular_visible_images_are_taken(tmp_path):
    link = tarfile.TarInfo("train/cat/link.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    names = [*TREE, "README.md", "train/cat/.hidden.png", "train/cat/notes.txt", "__MACOSX/train/cat/._1.png"]
    source = tar_of(tmp_path / "a.tar", names, extra=[link])
    assert len(content(source)) == len(TREE)
    assert "4 files that are hidden or no images" in open_source(CARD, source).note


def test_val_share_is_a_stratified_function_of_the_names(tmp_path):
    names = [f"{name}/{number}.png" for name in ("a", "b", "c") for number in range(20)] + ["d/0.png", "d/1.png"]
    source = folder_of(tmp_path / "folder", names)
    assert {row[0] for row in content(source)} == {"train"}
    assert "no split folders" in open_source(CARD, source).note
    held = content(source, val_share=0.1)
    assert Counter(row[1] for row in held if row[0] == "val") == {"a": 2, "b": 2, "c": 2, "d": 1}
    assert content(tar_of(tmp_path / "a.tar", names[::-1]), val_share=0.1) == held
    more = {row[1:3] for row in content(source, val_share=0.5) if row[0] == "val"}
    assert {row[1:3] for row in held if row[0] == "val"} < more


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "missing or empty"),
        (["train/cat/readme.txt"], "no images: no file of 1 ends"),
        ([*TREE, "val/cow/1.png"], r"val has classes that train lacks \(cow, 1 in all; the first image is 1.png\)"),
        (["val/cat/1.png", "val/dog/1.png"], "no train split|one class"),
        (["train/cat/1.png", "val/cat/2.png"], r"one class only \(cat\)"),
        ([*TREE, "extra/cat/1.png"], "extra next to train"),
        ([*TREE, "valid/cat/1.png"], "two folders for one split"),
        (["cat/1.png", "dog/1.png", "3.png"], r"outside the class folders \(3.png\)"),
    ],
)
def test_bad_trees(tmp_path, names, message):
    (tmp_path / "folder").mkdir()
    for source in (folder_of(tmp_path / "folder", names), tar_of(tmp_path / "a.tar", names)):
        with pytest.raises(UserError, match=message):
            content(source)


def test_bad_sources(tmp_path):
    with pytest.raises(UserError, match="no source at"):
        content(str(tmp_path / "none.tar"))
    with pytest.raises(UserError, match="missing or empty"):
        content("memory://nothing-here")
    with pytest.raises(UserError, match="needs a source"):
        content(None)
    (tmp_path / "text.tar").write_text("this is no tar" * 100)
    with pytest.raises(UserError, match="no readable tar"):
        content(str(tmp_path / "text.tar"))
    with pytest.raises(UserError, match="card 'cifar10' says 10"):
        content(folder_of(tmp_path / "folder", TREE), replace(load_card("cifar10")))
    card = replace(CARD, num_classes=2, classes=("bird", "cat"))
    with pytest.raises(UserError, match="differ in classes: bird, dog"):
        content(str(tmp_path / "folder"), card)
    for share in (0.0, 1.0, 0.5):
        with pytest.raises(UserError, match="val_share"):
            content(str(tmp_path / "folder"), val_share=share)
    with pytest.raises(UserError, match="needs no source"):
        content("x", load_card("digits"))


def test_a_tar_that_was_cut_is_refused_wherever_the_cut_is(tmp_path):
    whole = Path(tar_of(tmp_path / "a.tar", TREE)).read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        ends = [member.offset_data + 512 for member in tar]
    packed = gzip.compress(whole, mtime=0)
    cuts = [whole[:end] for end in ends] + [whole[: ends[2] - 300], whole[: ends[2] - 700], packed[:-9], packed[:100]]
    for cut in cuts:
        (tmp_path / "cut.tar").write_bytes(cut)
        with pytest.raises(UserError, match="cut short"):
            content(str(tmp_path / "cut.tar"))


@pytest.mark.parametrize("name", ["../evil.png", "/etc/evil.png", "train/../../evil.png"])
def test_a_member_that_escapes_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="outside itself"):
        content(tar_of(tmp_path / "a.tar", [*TREE, name]))


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    bunch = load_digits()
    samples = list(iterate(load_card("digits")))
    assert Counter(s.split for s in samples) == load_card("digits").splits
    assert sorted(int(s.key) for s in samples) == list(range(1797))
    for s in samples[::50]:
        pixels = decode_image(s.data)[..., 0]
        assert np.array_equal(pixels, np.round(bunch.images[int(s.key)] * 15.9375)) and s.class_name == str(
            bunch.target[int(s.key)]
        )


def test_glyphs_are_a_pure_function_and_all_are_drawn():
    card = load_card("glyphs")
    opened = open_source(card)
    assert Counter(entry.split for entry in opened.entries) == card.splits
    assert len(opened.classes) == card.num_classes and list(opened.classes) == sorted(opened.classes)
    some = opened.entries[::1000]
    first = list(opened.reader.read(some))
    glyphs.glyph_fields.cache_clear()
    assert list(opened.reader.read(some[::-1])) == first[::-1]
    assert len(set(first)) == len(first)
    empty = [entry for entry in opened.entries[::97] if decode_image(next(opened.reader.read([entry]))).max() < 100]
    assert len(empty) <= 3  # thin, small and seen at eight pixels: a few may be faint


def test_torchvision_sets(tmp_path, monkeypatch):
    import torchvision.datasets

    class Fake:
        classes = load_card("cifar10_full").classes

        def __init__(self, root, train, download):
            self.targets = list(range(10)) * (2 if train else 1)
            self.data = np.arange(len(self.targets), dtype=np.uint8)[:, None, None, None] * np.ones(
                (1, 32, 32, 3), np.uint8
            )

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Fake)
    samples = list(iterate(load_card("cifar10_full"), str(tmp_path)))
    assert Counter(s.split for s in samples) == {"train": 20, "val": 10}
    assert samples[3].class_name == "cat" and decode_image(samples[3].data)[0, 0].tolist() == [3, 3, 3]

    def offline(*_, **__):
        raise RuntimeError("no network")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", offline)
    with pytest.raises(UserError, match="needs a network once"):
        list(iterate(load_card("cifar10_full"), str(tmp_path)))


@pytest.mark.parametrize("name", [n for n in list_cards() if load_card(n).kind == "tar"])
def test_every_real_tar_is_what_its_card_says(name):
    source = DATA / f"{name}.tar"
    if not source.is_file():
        pytest.skip(f"no {source} (set NORMFREE_TEST_DATA)")
    card = load_card(name)
    opened = open_source(card, str(source))
    assert Counter(entry.split for entry in opened.entries) == card.splits and len(opened.classes) == card.num_classes
