"""Cards: what a dataset is, as data. One YAML file each in `datasets/`; this module reads and checks them."""

import difflib
import functools
import re
import sysconfig
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pipeline import documents
from pipeline.errors import UserError
from pipeline.storage import objects

KINDS = ("tar", "folder", "embedded", "torchvision")
METRICS = ("top1", "mean_per_class", "balanced_accuracy", "auroc")
SPLIT_NAMES = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True)
class Card:
    """One dataset: where its raw images come from and what is true of them. Immutable."""

    name: str
    title: str
    kind: str
    """Where the raw images come from: `tar` and `folder` (either may be given for the other), `embedded` (made or
    carried by an installed package, no download) or `torchvision` (downloaded by it)."""
    num_classes: int | None
    """None where it depends on the user's own images."""
    splits: Mapping[str, int]
    """Images a complete source has in each split; empty where that is not known."""
    image_size: str
    """For people: pixels and mode of the raw images."""
    metric: str
    """What a result on it is, by the names of `transfer.metrics`: `top1` (share right), `mean_per_class` (mean of the
    per-class shares), `balanced_accuracy` (the same, as medicine calls it) or `auroc`."""
    flip: bool
    """Whether a horizontally mirrored image keeps its label."""
    licence: str
    citation: str
    source_hint: str
    """What to pass as the source, for people and for error messages."""
    classes: tuple[str, ...] | None = None
    """Class names in label order; None: the sorted names of the classes in the train split."""
    member: str | None = None
    """Which set inside the package: the generator of an embedded card, the class name of a torchvision one."""
    split_rule: str | None = None
    """Which images the splits are, where the source leaves a choice; for people and for whoever makes the list."""
    indexed: bool = False
    """Whether labels are the class indices 0 to `num_classes` - 1, of which train, being a small draw, may lack some."""
    label_rule: str | None = None
    """How labels follow from what the source says, where they are not its own."""
    faults: tuple[str, ...] = field(default=())
    """What is known to be wrong or odd with the images or labels."""

    @property
    def test_split(self) -> str:
        """The split that results are on: `test`, or `val` where that is the source's only other one."""
        return "test" if "test" in self.splits else "val"

    @property
    def tests_only(self) -> bool:
        """Whether nothing of it is to train on: a new test of classes that another set teaches."""
        return bool(self.splits) and "train" not in self.splits

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "splits": dict(self.splits)}  # the read-only view cannot be sent to a worker


def datasets_dir() -> Path:
    """The folder with the cards: beside the packages in a checkout, else the data folder of the installation."""
    candidates = [
        Path(__file__).resolve().parents[3] / "datasets",
        Path(sysconfig.get_path("data")) / "share" / "normfree" / "datasets",
    ]
    for folder in candidates:
        # An installed Hugging Face `datasets` lies at the first place too: a known card tells them apart.
        if (folder / "imagenet.yaml").is_file():
            return folder
    raise UserError(
        f"the dataset cards are missing: no *.yaml in {candidates[0]} or {candidates[1]}; reinstall normfree"
    )


def list_cards() -> list[str]:
    """Names of all cards, sorted."""
    return sorted(path.stem for path in datasets_dir().glob("*.yaml"))


def load_card(name_or_path: str) -> Card:
    """The card of that name, or the one in the YAML file at that path.

    Raises UserError for a name that does not exist (with the nearest ones) and for a file that is not a card.
    """
    if "/" in name_or_path or name_or_path.endswith((".yaml", ".yml")):
        if not objects.is_file(name_or_path):
            raise UserError(
                f"no dataset card at {name_or_path}: give the path of a YAML card or one of {', '.join(list_cards())}"
            )
        return _read(name_or_path)
    names = list_cards()
    if name_or_path not in names:
        near = difflib.get_close_matches(name_or_path, names, n=3, cutoff=0.5)
        advice = f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(names)}"
        raise UserError(f"no dataset card is called '{name_or_path}': {advice}")
    return _read(str(datasets_dir() / f"{name_or_path}.yaml"))


@functools.cache
def _read(path: str) -> Card:
    content = documents.parse_yaml(objects.read_bytes(path), f"the dataset card {path}")
    if not isinstance(content, dict):
        raise UserError(f"the dataset card {path} must be a mapping of field to value")
    return _card(content, path)


def _card(content: Mapping[str, Any], path: str) -> Card:
    known = {entry.name: entry for entry in fields(Card)}
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            advice = f"did you mean '{near[0]}'?" if near else f"the fields are {', '.join(known)}"
            raise UserError(f"the dataset card {path} has an unknown field '{key}': {advice}")
    missing = [name for name, entry in known.items() if entry.default is MISSING and name not in content]
    if missing:
        raise UserError(f"the dataset card {path} lacks {', '.join(missing)}")
    values = dict(content)
    for name in ("classes", "faults"):
        if values.get(name) is not None:
            # A class called 0 or yes is a number or a truth value to YAML.
            values[name] = tuple(str(item) for item in values[name])
    if values.get("indexed") is True and type(values["num_classes"]) is int:
        values.setdefault("classes", tuple(str(label) for label in range(values["num_classes"])))
    values["splits"] = MappingProxyType(dict(values["splits"] or {}))
    card = Card(**values)
    problem = _problem(card)
    if problem:
        raise UserError(f"the dataset card {path} is wrong: {problem}")
    return card


def _problem(card: Card) -> str | None:
    """The first thing wrong with the values of a card, or None."""
    texts = (card.title, card.image_size, card.licence, card.citation, card.source_hint)
    if not isinstance(card.name, str) or not re.fullmatch(r"[a-z0-9_]+", card.name):
        return f"name '{card.name}' must be lower-case letters, digits and _"
    if card.kind not in KINDS:
        return f"kind '{card.kind}' must be one of {', '.join(KINDS)}"
    if card.metric not in METRICS:
        return f"metric '{card.metric}' must be one of {', '.join(METRICS)}"
    if not all(isinstance(text, str) and text for text in texts):
        return "title, image_size, licence, citation and source_hint must be text"
    if not all(rule is None or (isinstance(rule, str) and rule) for rule in (card.split_rule, card.label_rule)):
        return "split_rule and label_rule must be text where they are set"
    if type(card.indexed) is not bool or (card.indexed and card.num_classes is None):
        return "indexed must be true or false, and needs num_classes"
    if type(card.flip) is not bool:
        return "flip must be true or false"
    if card.num_classes is not None and (type(card.num_classes) is not int or card.num_classes < 2):
        return f"num_classes {card.num_classes} must be a whole number of at least 2, or null"
    if card.classes is not None and (
        len(set(card.classes)) != len(card.classes) or len(card.classes) != card.num_classes
    ):
        return "classes must be num_classes different names"
    if (card.kind in ("embedded", "torchvision")) != (card.member is not None):
        return "member is needed for, and only for, the kinds embedded and torchvision"
    for split, num in card.splits.items():
        if split not in SPLIT_NAMES or type(num) is not int or num < 1:
            return f"split '{split}: {num}' must be one of {', '.join(SPLIT_NAMES)} with a count above 0"
    if card.tests_only and not card.indexed:
        return "splits without train need indexed: nothing else says which classes there are"
    return None
