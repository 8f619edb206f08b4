"""Which tars become a dataset: nothing is taken for train, skipped or merged in silence."""

import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.format.manifest import Manifest
from pipeline.data.prepare.adopt import adopt
from pipeline.data.prepare.find_tars import find_tars
from pipeline.data.verify.verify import verify
from pipeline.errors import UserError


def picture(number: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 255, (8, 8, 3), np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def samples(first: int = 0, num: int = 2, stem: str = "s", labels: tuple[str, ...] = ("0", "1")) -> dict[str, bytes]:
    found = {f"{stem}{i:04d}.png": picture(i) for i in range(first, first + num)}
    return found | {f"{stem}{first + i:04d}.cls": labels[i % len(labels)].encode() for i in range(num)}


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("imagenet-val-000000.tar", "val"),
        ("imagenet1k-validation-00.tar", "val"),
        ("wds_val_0.tar", "val"),
        ("imagenetTest-3.tar", "test"),
        ("shards/dev/x-0.tar", "val"),
        ("VAL_3.TAR", "val"),
        ("latest-train-7.tar", "train"),
    ],
)
def test_the_word_of_a_split_is_seen_wherever_it_stands(tmp_path: Path, name: str, split: str) -> None:
    tar(tmp_path / "w" / "a-train-0.tar", {})
    tar(tmp_path / "w" / name, {})
    _, found, notes = find_tars(str(tmp_path / "w"), None)
    assert {t.name: t.split for t in found}[name] == split and not notes


@pytest.mark.parametrize("name", ["trainval-0.tar", "train-val-0.tar", "ValTest0.tar", "other-0.tar"])
def test_a_name_of_two_splits_or_none_is_asked_for(tmp_path: Path, name: str) -> None:
    tar(tmp_path / "train-0.tar", {})
    tar(tmp_path / name, {})
    with pytest.raises(UserError, match=r"--split train="):
        find_tars(str(tmp_path), None)


def test_what_is_guessed_and_what_is_left_out_are_said(tmp_path: Path) -> None:
    tar(tmp_path / "a.tar", samples())
    assert "all tars are taken for train" in adopt(str(tmp_path)).source_note
    tar(tmp_path / "b.tar", samples(5))
    assert find_tars(str(tmp_path), {"train": "b.tar"})[2] == [
        "1 tars match no pattern of a split and are skipped, such as a.tar"
    ]


def test_compressed_tars_are_named_and_other_spellings_read(tmp_path: Path) -> None:
    plain = tar(tmp_path / "w" / "train-0.tar", samples()).read_bytes()
    tar(tmp_path / "w" / "train-1.TAR", samples(5))
    assert [t.name for t in find_tars(str(tmp_path / "w"), None)[1]] == ["train-0.tar", "train-1.TAR"]
    for name in ("train-2.tar.gz", "train-3.tgz"):
        (tmp_path / "w" / name).write_bytes(gzip.compress(plain))
    for url in (str(tmp_path / "w"), str(tmp_path / "w" / "*.[tT]*")):
        with pytest.raises(UserError, match=r"2 of 4 tars .* are compressed, such as train-2\.tar\.gz"):
            find_tars(url, None)
    (tmp_path / "w" / "train-0.tar").unlink(), (tmp_path / "w" / "train-1.TAR").unlink()
    with pytest.raises(UserError, match="2 of 2 tars"):
        find_tars(str(tmp_path / "w"), None)


@pytest.mark.parametrize("name", ["wds [v1]", "{a,b}", "what?", "50%*"])
def test_a_folder_that_is_there_is_no_pattern(tmp_path: Path, name: str) -> None:
    tar(tmp_path / name / "train-0.tar", samples())
    tar(tmp_path / name / "train-1.tar", samples(5))
    folder = str(tmp_path / name)
    assert find_tars(folder, None)[0] == folder and len(find_tars(folder, None)[1]) == 2
    assert len(find_tars(f"{folder}/train-{{0..1}}.tar", None)[1]) == 2
    assert [t.name for t in find_tars(f"{folder}/train-1.tar", None)[1]] == ["train-1.tar"]
    assert adopt(folder).splits["train"].num_samples == 4


def test_a_dot_inside_a_name_hides_no_image(tmp_path: Path) -> None:
    tar(tmp_path / "train-0.tar", samples(0, 6) | samples(0, 3, "scan_2."))
    with pytest.raises(UserError, match=r"3 of 9 samples .*dot inside"):
        adopt(str(tmp_path))
    found = adopt(str(tmp_path), max_bad_share=0.5)
    assert found.splits["train"].num_samples == 6 and len(found.skipped) == 3


def test_a_mask_beside_an_image_is_no_lost_image(tmp_path: Path) -> None:
    tar(tmp_path / "train-0.tar", samples() | {"s0000.seg.png": picture(9)})
    assert not adopt(str(tmp_path)).skipped


def test_hidden_members_are_no_samples(tmp_path: Path) -> None:
    hidden = ("data/._s0000.png", "._s0000.cls", ".ipynb_checkpoints/x.png", "__MACOSX/data/._s.png", "a/@eaDir/x.png")
    tar(tmp_path / "train-0.tar", samples() | dict.fromkeys(hidden, b"x"))
    found = adopt(str(tmp_path))
    assert found.splits["train"].num_samples == 2 and not found.skipped


def test_labels_that_mix_numbers_and_names_are_asked_for(tmp_path: Path) -> None:
    tar(tmp_path / "train-0.tar", samples(0, 4, labels=("0", "ant", "1", "bee")))
    with pytest.raises(
        UserError, match=r"2 labels are numbers, such as '0', and 2 are names, such as 'ant'.*--classes"
    ):
        adopt(str(tmp_path))
    found = adopt(str(tmp_path), classes=["ant", "bee"])
    assert found.split("train").label.tolist() == [0, 0, 1, 1] and not verify(str(tmp_path)).problems


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM"])
def test_every_format_that_is_prepared_is_indexed_and_verified(tmp_path: Path, kind: str) -> None:
    ending = {"TIFF": "tif"}.get(kind, kind.lower())
    tar(
        tmp_path / "train-0.tar",
        {f"a.{ending}": picture(0, kind), "a.cls": b"0", f"b.{ending}": picture(1, kind), "b.cls": b"1"},
    )
    adopt(str(tmp_path))
    assert Manifest.open(str(tmp_path)).splits["train"].num_samples == 2 and not verify(str(tmp_path)).problems


@pytest.mark.parametrize("word", ["eval", "holdout", "Heldout", "query", "unlabelled"])
def test_a_set_that_is_not_trained_on_by_its_name_is_not_taken_for_train(tmp_path, word):
    for name in ("shard", word):
        tar(tmp_path / f"{name}-000.tar", samples())
    with pytest.raises(UserError, match=f"not clear which split {word}-000.tar belongs to"):
        find_tars(str(tmp_path), None)


def note(folder: Path) -> str:
    found = adopt(str(folder))
    assert found is not None
    return found.source_note


def test_what_is_odd_about_labels_and_tars_is_said(tmp_path):
    tar(tmp_path / "a" / "train-0.tar", samples(labels=("a cat",)))
    tar(tmp_path / "a" / "train-1.tar", {})
    assert "all samples are of one class (a cat)" in note(tmp_path / "a")
    assert "1 tars have no sample, such as train-1.tar" in Manifest.open(str(tmp_path / "a")).source_note
    tar(tmp_path / "b" / "train-0.tar", samples(num=6, labels=("0", "5", "9")))
    assert "the labels are 3 numbers from 0 to 9, numbered anew in their order" in note(tmp_path / "b")
    tar(tmp_path / "c" / "train-0.tar", samples(num=6, labels=("0", "1", "3")))
    assert note(tmp_path / "c") == "existing tars, indexed in place; 1 classes have no sample in train"


def test_a_label_without_end_is_no_class_of_a_manifest_that_nobody_reads_again(tmp_path):
    tar(tmp_path / "train-0.tar", samples(labels=("ant", "x" * 70_000)))
    with pytest.raises(UserError, match="its cls holds 70000 characters, and a label 4000 at most"):
        adopt(str(tmp_path))


@pytest.mark.parametrize("labels", [[f"a photo of {i}" for i in range(100)], [str(i) for i in range(100)]])
def test_captions_and_numbers_of_images_are_no_classes(tmp_path, labels):
    tar(tmp_path / "train-0.tar", samples(num=100, labels=tuple(labels)))
    with pytest.raises(UserError, match=r"100 different labels, such as '(a photo of )?0', which look like captions"):
        adopt(str(tmp_path))
    found = adopt(str(tmp_path), classes=labels)
    assert found is not None and len(found.classes) == 100
