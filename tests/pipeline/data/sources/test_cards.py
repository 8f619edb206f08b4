"""Cards: one harness over all of them, and what a wrong one gets."""

import subprocess
import sys

import pytest
import yaml

from pipeline.data.sources.cards import Card, datasets_dir, list_cards, load_card
from pipeline.errors import UserError


@pytest.mark.parametrize("name", list_cards())
def test_every_card(name):
    card = load_card(name)
    assert card.name == name
    assert "/work" not in (datasets_dir() / f"{name}.yaml").read_text()
    assert (
        card.classes is None
        or card.boxes
        or card.masks
        or list(card.classes) == sorted(card.classes, key=int if card.indexed else str)
    )
    if card.tests_only:
        assert card.splits.keys() == {"test"} and (card.indexed or card.label_rule)
    elif card.num_classes is not None:
        assert set(card.splits) in ({"train", "val"}, {"train", "test"}, {"train", "val", "test"})
        assert card.splits["train"] >= card.num_classes and card.test_split in card.splits


def test_the_sets_that_must_be_there():
    real = {
        "cifar100",
        "caltech101",
        "cifar10",
        "clothing",
        "flowers",
        "signdigits",
        "omniglot",
        "pneumoniamnist",
        "mnist",
    }
    embedded_and_whole = {
        "imagenet",
        "cifar10_full",
        "cifar100_full",
        "digits",
        "glyphs",
        "shapes",
        "shape_boxes",
        "coco_boxes",
        "voc2007_boxes",
        "ade20k",
        "voc2012",
        "images",
        "imagenet_v2",
    }
    embedded_and_whole |= {"imagenet_a", "imagenet_r", "imagenet_sketch"}
    several_labels = {"glyph_sets", "voc2007", "chexpert"}
    assert {name for name in list_cards() if load_card(name).multi_label} == several_labels
    vtab = {name for name in list_cards() if name.startswith("vtab_")}
    assert len(vtab) == 19 and real | embedded_and_whole | several_labels | vtab | set(STANDARD) == set(list_cards())


# Classes, images of train (with val), images of test, metric: Kornblith et al. 2019, table 1.
STANDARD = {
    "food101": (101, 75_750, 25_250, "top1"),
    "birdsnap": (500, 47_386, 2443, "top1"),
    "sun397": (397, 19_850, 19_850, "top1"),
    "cars": (196, 8144, 8041, "top1"),
    "aircraft": (100, 6667, 3333, "mean_per_class"),
    "dtd": (47, 3760, 1880, "top1"),
    "pets": (37, 3680, 3669, "mean_per_class"),
    "caltech101_full": (102, 3060, 6084, "mean_per_class"),
    "flowers102": (102, 2040, 6149, "mean_per_class"),
    # Not in that table.
    "cub200": (200, 5994, 5794, "top1"),
    "eurosat": (10, 21_600, 5400, "top1"),
    "resisc45": (45, 25_200, 6300, "top1"),
}


@pytest.mark.parametrize("name", STANDARD)
def test_a_standard_set_has_its_published_counts_and_metric(name):
    card = load_card(name)
    fit = sum(num for split, num in card.splits.items() if split != "test")
    assert (card.num_classes, fit, card.splits["test"], card.metric) == STANDARD[name]


def test_no_python_in_datasets():
    assert not list(datasets_dir().rglob("*.py"))


def test_unknown_name_gets_the_nearest():
    with pytest.raises(UserError, match=r"'cifar10O'.*did you mean.*cifar10"):
        load_card("cifar10O")
    with pytest.raises(UserError, match=r"choose one of .*omniglot"):
        load_card("zzzzzz")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flipp": True}, "no field 'flipp'.*did you mean 'flip'"),
        ({"flip": "maybe"}, "flip is 'maybe'; set true or false"),
        ({"kind": "zip"}, "kind is 'zip'; set one of tar, folder"),
        ({"metric": "f1"}, "metric is 'f1'; set one of top1"),
        ({"num_classes": 1}, "num_classes is 1; set a whole number of 2 or more"),
        ({"splits": {"dev": 3}}, "splits is .*set a mapping of one of train, val, test"),
        ({"splits": {"test": 3}}, "without train need indexed"),
        ({"classes": ["a", "a"]}, "different values"),
        ({"member": "x"}, "member"),
        ({"licence": None}, "licence is None; set text"),
        ({"indexed": 1}, "indexed is 1; set true or false"),
        ({"label_rule": 3}, "label_rule is 3; set text"),
        ({"split_rule": ""}, "split_rule is ''; set text that is not empty"),
        ({"name": "Has Spaces"}, "name is 'Has Spaces'; set lower-case letters"),
    ],
)
def test_wrong_cards_are_refused(tmp_path, change, message):
    content = yaml.safe_load((datasets_dir() / "cifar10.yaml").read_text()) | change
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=message):
        load_card(str(path))


def test_files_that_are_no_cards(tmp_path):
    path = tmp_path / "x.yaml"
    with pytest.raises(UserError, match="no dataset card at"):
        load_card(str(path))
    for text, message in (("a: [", "not usable as YAML"), ("- 1", "mapping"), ("name: x", "lacks title")):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            load_card(str(path))
        from pipeline.data.sources import cards

        cards._read.cache_clear()


def test_a_card_of_ones_own(tmp_path):
    content = yaml.safe_load((datasets_dir() / "cifar10.yaml").read_text()) | {
        "name": "mine",
        "num_classes": 2,
        "classes": [0, 1],
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    card = load_card(str(tmp_path / "mine.yaml"))
    assert isinstance(card, Card) and card.classes == ("0", "1")


def test_importing_the_data_modules_is_light():
    heavy = ["fsspec", "webdataset", "torchvision", "sklearn", "matplotlib", "pyarrow", "PIL", "scipy", "torch", "yaml"]
    code = f"import sys, pipeline.data.prepare.prepare as _; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
