"""ADE20K and VOC 2012 as they are distributed, tiny: prepared, void where they say nothing, measured; what is missing."""

import shutil
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.format.manifest import Manifest
from pipeline.data.format.masks import VOID, masks_of
from pipeline.data.prepare.prepare import prepare
from pipeline.data.sources.cards import load_card
from pipeline.data.verify.verify import verify
from pipeline.errors import UserError
from tests.transfer.conftest import claimed_sweep
from tests.transfer.probes.test_segment import SOURCE
from transfer.protocol.method_settings import SegmentSettings
from transfer.protocol.methods import Method
from transfer.protocol.suite_files import load_suite
from transfer.results.sweep_results import load_findings
from transfer.sweep import probe_job
from transfer.sweep.cells import plan

SIZE = (40, 32)
"""Width and height."""


def _image(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((SIZE[1], SIZE[0], 3), number * 20, np.uint8)).save(path)


def _mask(path: Path, upper: int, lower: int, *, palette: bool = False) -> None:
    """Two halves of a mask."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = np.repeat(np.array([upper, lower], np.uint8), SIZE[1] // 2)[:, None].repeat(SIZE[0], 1)
    image = Image.fromarray(mask)
    if palette:  # VOC's colours
        image.putpalette([(7 * i) % 256 for i in range(768)])
    image.save(path)


def ade(folder: Path) -> Path:
    root = folder / "ADEChallengeData2016"
    for split, num in (("training", 6), ("validation", 3)):
        for number in range(num):
            name = f"{split}/ADE_{split[:5]}_{number:08d}"
            _image(root / "images" / f"{name}.jpg", number)
            _mask(root / "annotations" / f"{name}.png", number % 3, 150)  # wall is 1 there; 0 is other
    (root / "objectInfo150.txt").write_text("Idx\tRatio\n")
    (root / "sceneCategories.txt").write_text("ADE_train_00000001 bathroom\n")
    return root


def voc(folder: Path) -> Path:
    root = folder / "VOCdevkit" / "VOC2012"
    for number in range(9):
        _image(root / "JPEGImages" / f"2007_{number:06d}.jpg", number)
        if number < 7:  # most images have boxes and no mask
            _mask(root / "SegmentationClass" / f"2007_{number:06d}.png", number, VOID, palette=True)
            _mask(root / "SegmentationObject" / f"2007_{number:06d}.png", 1, VOID, palette=True)
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for name, numbers in (("train", range(4)), ("val", range(4, 7)), ("trainval", range(7))):
        (lists / f"{name}.txt").write_text("".join(f"2007_{number:06d}\n" for number in numbers))
    return root


def test_ade20k_is_prepared_from_its_folder_and_from_its_zip(tmp_path: Path) -> None:
    root = ade(tmp_path)
    with zipfile.ZipFile(tmp_path / "ADEChallengeData2016.zip", "w") as file:
        for path in sorted(root.rglob("*")):
            file.write(path, path.relative_to(tmp_path))
    found = prepare(load_card("ade20k"), str(tmp_path / "a"), source=str(root))
    assert found.digest == prepare(load_card("ade20k"), str(tmp_path / "b"), source=f"{root}.zip").digest
    assert {name: split.num_samples for name, split in found.splits.items()} == {"train": 6, "val": 3}
    assert "train has 6 images where the card says 20210" in found.source_note
    assert len(found.outputs) == 150 and found.outputs[0] == "wall" and found.outputs[149] == "flag"
    index = Manifest.open(str(tmp_path / "a")).split("train")
    for key, mask in zip(index.keys, masks_of(index), strict=True):
        number = int(str(key)[-8:])
        assert mask.shape == (32, 40) and set(mask[16:].ravel()) == {149}
        assert set(mask[:16].ravel()) == {VOID if number % 3 == 0 else number % 3 - 1}
    assert not verify(str(tmp_path / "a")).problems


def test_voc_is_prepared_from_its_tar_and_a_class_is_the_number_in_the_palette(tmp_path: Path) -> None:
    root = voc(tmp_path)
    with tarfile.open(tmp_path / "VOCtrainval_11-May-2012.tar", "w") as file:
        file.add(root.parent, "VOCdevkit")
    found = prepare(load_card("voc2012"), str(tmp_path / "a"), source=str(tmp_path / "VOCtrainval_11-May-2012.tar"))
    assert found.digest == prepare(load_card("voc2012"), str(tmp_path / "b"), source=str(root)).digest
    assert {name: split.num_samples for name, split in found.splits.items()} == {"train": 4, "val": 3}
    index = found.split("val")
    tops = {str(key)[-6:]: set(np.unique(mask)) for key, mask in zip(index.keys, masks_of(index), strict=True)}
    assert tops == {f"{number:06d}": {number, VOID} for number in (4, 5, 6)}


def test_the_suite_is_of_these_cards_and_a_sweep_measures_them(tmp_path: Path) -> None:
    assert [task.name for task in load_suite("segmentation").tasks] == ["ade20k", "voc2012"]
    prepare(load_card("ade20k"), str(tmp_path / "ade20k"), source=str(ade(tmp_path)))
    settings = SegmentSettings(split="full", learning_rates=(1e-2,), num_steps=5, batch=2, train_mask_px=8)
    method = Method(name="segment", kind="segment", settings=settings)
    sweep = claimed_sweep(
        tmp_path / "s", str(tmp_path / "ade20k"), SOURCE, (method,), card="ade20k", holdout=1, num_seeds=1
    )
    assert all(entry.is_ok for entry in probe_job.run_probes(sweep, plan(sweep)[0]))
    (final,) = load_findings(str(tmp_path / "s")).finals
    assert final.metric == "miou" and final.num_train == 6 and final.num_test == 3 and final.value is not None


@pytest.mark.parametrize(
    ("card", "change", "message"),
    [
        ("ade20k", "rm annotations/validation/ADE_valid_00000001.png", r"images/validation/ADE_valid_00000001.jpg has no mask"),
        ("ade20k", "rm annotations", r"has no mask annotations/training/ADE_train_0000000\d.png; restore it"),
        ("ade20k", "rm images", "has no masks in a form that is known: give a folder, tar or zip with images/<split>/"),
        ("ade20k", "mask annotations/training/ADE_train_00000002.png 151", r"its mask has the class 151; there are 1 to 150"),
        ("ade20k", "rm images/training", "has no train split, only val"),
        ("voc2012", "rm JPEGImages/2007_000005.jpg", r"Segmentation/val.txt, line 2: there is no JPEGImages/2007_000005"),
        ("voc2012", "rm SegmentationClass/2007_000001.png", r"2007_000001.jpg has no mask SegmentationClass/2007_000001"),
        ("voc2012", "text ImageSets/Segmentation/val.txt 2007_000001", r"line 1: 2007_000001 is in train already"),
        ("voc2012", "text ImageSets/Segmentation/val.txt ../x", r"val.txt, line 1: '../x' is no name of an image"),
        ("voc2012", "text ImageSets/Segmentation/val.txt", r"ImageSets/Segmentation/val.txt is empty"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named(card: str, change: str, message: str, tmp_path: Path) -> None:
    root = (ade if card == "ade20k" else voc)(tmp_path)
    what, name, *rest = change.split()
    path = root / name
    if what == "rm":
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif what == "mask":
        _mask(path, int(rest[0]), 1)
    else:
        path.write_text(" ".join(rest))
    with pytest.raises(UserError, match=message):
        prepare(load_card(card), str(tmp_path / "out"), source=str(root))


def test_two_sets_below_one_folder_and_a_card_that_fits_not_are_refused(tmp_path: Path) -> None:
    ade(tmp_path / "a")
    ade(tmp_path / "b")
    with pytest.raises(UserError, match=r"has several sets \(a/ADEChallengeData2016/, b/ADEChallengeData2016/\)"):
        prepare(load_card("ade20k"), str(tmp_path / "out"), source=str(tmp_path))
    with pytest.raises(UserError, match="mask_of_first is of masks"):
        replace(load_card("digits"), mask_of_first=1)


def test_masks_of_more_classes_than_a_byte_holds_are_refused() -> None:
    card, names = load_card("ade20k"), [str(i) for i in range(256)]
    assert replace(card, classes=tuple(names[:255]), num_classes=255).masks
    with pytest.raises(UserError, match="masks hold 255 classes at most"):
        replace(card, classes=tuple(names), num_classes=256)
