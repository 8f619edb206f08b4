"""Which folders are splits, which are classes, and which are refused because they may be either."""

import pytest

from pipeline.data.sources.open_source import open_source
from pipeline.errors import UserError
from tests.pipeline.data.sources.trees import CARD, TREE, folder_of, found, note

CLASSES = ["{}/ant/1.png", "{}/bee/2.png"]


def in_folders(*splits):
    return [name.format(split) for split in splits for name in CLASSES]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([*in_folders("train"), "val/1.png", "val/2.png"], r"\(val/1.png and 1 more\).*if val has no labels"),
        ([*TREE, "test/0.png", "test/1.png"], r"outside the class folders \(test/0.png"),
        ([*TREE, "train/overview.png"], r"\(train/overview.png\)"),
        ([*TREE, "cover.png"], r"\(cover.png\)"),
        (in_folders("training_set", "test_set"), "look like splits.*test_set, training_set"),
        (in_folders("seg_train", "seg_test"), "look like splits"),
        (in_folders("seg_train/seg_train", "seg_test/seg_test"), "look like splits"),
        (in_folders("trainset", "testset"), "look like splits"),
        (in_folders("train2017", "val2017"), "look like splits"),
        (in_folders("TrainImages", "TestImages"), "look like splits"),
        (in_folders("cats-train", "cats-test"), "look like splits"),
        (["ant/1.png", "bee/2.png", "test/3.png"], r"look like splits.*\(test\)"),
        (["train/1.png", "test1/2.png"], "look like splits"),
        ([f"{name}/{n}.png" for n in range(2) for name in ("trainA", "trainB", "testA")], "look like splits"),
    ],
)
def test_what_may_be_a_split_or_a_class_is_refused_by_name(tmp_path, names, message):
    with pytest.raises(UserError, match=message):
        found(folder_of(tmp_path, names))


@pytest.mark.parametrize("odd", ["bullet_train", "test tube", "train station", "validator", "contest"])
def test_a_class_with_such_a_word_in_its_name_is_a_class(tmp_path, odd):
    names = ["ant/1.png", f"{odd}/1.png"]
    assert found(folder_of(tmp_path, names)) == sorted(f"train/{name}" for name in names)


def test_a_train_among_other_things_is_a_class_and_that_is_said(tmp_path):
    source = folder_of(tmp_path, ["ant/1.png", "bee/1.png", "train/1.png"])
    assert found(source) == ["train/ant/1.png", "train/bee/1.png", "train/train/1.png"]
    assert "the folder train was taken for a class" in note(source)


def test_a_split_that_is_not_wanted_is_not_looked_at(tmp_path):
    source = folder_of(tmp_path, [*TREE, "test/0.png"])
    opened = open_source(CARD, str(source), splits=["train", "val"])
    assert len(opened.entries) == len(TREE) and "1 images of other splits" in opened.note


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["ant/train/1.png", "ant/val/2.png", "bee/train/3.png"], "splits below a class folder .ant holds train, val"),
        (["ant/good/1.png", "bee/TEST/2.png"], "splits below a class folder .bee holds TEST"),
        ([*TREE, "train/ant/val/3.png"], "splits below a class folder .train/ant holds"),
        (in_folders("fold1", "fold2"), "same folders .ant, bee. in each of its folders .fold1, fold2"),
        (in_folders("train/photo", "train/sketch", "val/photo"), "same folders .ant, bee."),
        (["ant/data/test/1.png", "bee/data/1.png"], "splits below a class folder .ant holds data/test"),
        (in_folders("shop/images", "web/images"), "same folders .images/ant, images/bee. in each"),
        ([f"{a}/{b}/1.png" for a in ("ill", "well") for b in ("images", "masks")], "same folders .images, masks."),
    ],
)
def test_folders_below_classes_that_may_be_splits_or_classes_are_refused(tmp_path, names, message):
    with pytest.raises(UserError, match=message):
        found(folder_of(tmp_path, names))


@pytest.mark.parametrize(
    "names",
    [
        ["ant/left/1.png", "bee/left/2.png"],  # one folder below each says nothing
        ["ant/left/1.png", "ant/right/1.png", "bee/left/2.png"],
        ["ant/left/1.png", "ant/right/1.png", "ant/0.png", "bee/left/2.png", "bee/right/2.png", "bee/0.png"],
    ],
)
def test_other_folders_below_classes_are_theirs(tmp_path, names):
    assert found(folder_of(tmp_path, names)) == sorted(f"train/{name}" for name in names)


def test_folders_below_classes_are_said(tmp_path):
    assert "1 images lie in folders below" in note(folder_of(tmp_path, [*TREE, "train/ant/left/3.png"]))


HIDDEN = [
    "train/.ipynb_checkpoints/1.png",
    "train/@eaDir/1.png",
    "train/ant/@eaDir/1.png",
    "val/__MACOSX/1.png",
    "__MACOSX/train/ant/._0.png",
    ".git/objects/a.png",
    "train/.DS_Store",
    "train/ant/Thumbs.db",
    "train/ant/.thumb.png",
    "$RECYCLE.BIN/1.png",
    "$RECYCLE.BIN/deeper/2.png",
]


def test_hidden_folders_and_files_are_left_out_at_any_depth_and_counted(tmp_path):
    source = folder_of(tmp_path / "a", [*TREE, *HIDDEN, "train/ant/notes.txt", "README"])
    assert found(source) == TREE
    assert "13 files that are hidden or no images were skipped (11 hidden, 1 .txt, 1 without ending)" in note(source)


@pytest.mark.parametrize(
    "name", ["train/cow/.1.png", "train/cow/notes.txt", "train/cow/Thumbs.db", "test/cow/list.txt"]
)
def test_a_class_folder_without_a_visible_image_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="cow"):
        found(folder_of(tmp_path, [*TREE, name]))


def test_classes_that_read_alike_and_those_that_a_split_lacks_are_said(tmp_path):
    assert note(folder_of(tmp_path / "a", TREE)) == ""
    names = [f"train/{name}/1.png" for name in ("Cat", "cat ", "caf\u00e9", "cafe\u0301", "dog")]
    said = note(folder_of(tmp_path / "b", [*names, "val/dog/1.png"]))
    assert "these classes differ in case, spaces or Unicode form only: 'Cat', 'cat '" in said
    assert r"'cafe\u0301', 'caf\xe9'" in said
    assert "val has no images of 4 of 5 classes (Cat, cafe" in said
    names = [f"train/{'x' * 200}{number}{case}/1.png" for number in range(9) for case in "aA"]
    said = note(folder_of(tmp_path / "d", names))  # a note that is too long is not read again
    assert "so do 6 more groups of classes" in said and len(said) < 1500
    many = folder_of(tmp_path / "c", [f"train/person{i}/1.png" for i in range(100)])
    assert note(many) == "100 images have 100 classes: are these classes, or names of images"
