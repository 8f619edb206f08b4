"""Cards: one harness over all of them, and what a wrong one gets."""

import subprocess
import sys

import pytest
import yaml

from pipeline.data.cards import Card, datasets_dir, list_cards, load_card
from pipeline.errors import UserError


@pytest.mark.parametrize("name", list_cards())
def test_every_card(name):
    card = load_card(name)
    assert card.name == name
    assert "/work" not in (datasets_dir() / f"{name}.yaml").read_text()
    assert card.classes is None or list(card.classes) == sorted(card.classes)
    if card.num_classes is not None:
        assert set(card.splits) == {"train", "val"} and card.splits["train"] >= card.num_classes


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
    assert real | {"imagenet", "cifar10_full", "cifar100_full", "digits", "glyphs", "images"} == set(list_cards())


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
        ({"flipp": True}, "unknown field 'flipp'.*did you mean 'flip'"),
        ({"flip": "maybe"}, "flip must be true or false"),
        ({"kind": "zip"}, "kind 'zip'"),
        ({"metric": "f1"}, "metric 'f1'"),
        ({"num_classes": 1}, "num_classes 1"),
        ({"splits": {"dev": 3}}, "split 'dev"),
        ({"classes": ["a", "a"]}, "different names"),
        ({"member": "x"}, "member"),
        ({"licence": None}, "must be text"),
        ({"name": "Has Spaces"}, "name 'Has Spaces'"),
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
    for text, message in (("a: [", "not YAML"), ("- 1", "mapping"), ("name: x", "lacks title")):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            load_card(str(path))
        from pipeline.data import cards

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
    code = f"import sys, pipeline.data.prepare as _; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
