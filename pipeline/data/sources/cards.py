"""Cards: what a dataset is, as data. One YAML file each in `datasets/`; this module reads and checks them."""

import difflib
import functools
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pipeline.configuration import check_fields, from_dict
from pipeline.errors import UserError
from pipeline.field_types import Count, Form, Items, Range, Text
from pipeline.storage import objects
from pipeline.yaml_files.parse import parse_yaml, read_yaml
from pipeline.yaml_files.refusals import located

SPLIT_NAMES = ("train", "val", "test")
BOX_METRICS = ("box_map", "box_map50")
MULTI_LABEL_METRICS = ("map11", "map_area", "map", "auroc")


Metric = Literal[
    "top1", "mean_per_class", "balanced_accuracy", "auroc", "map11", "map_area", "map", "miou", "box_map", "box_map50"
]


@dataclass(frozen=True, kw_only=True)
class Card:
    """One dataset: where its raw images come from and what is true of them. Immutable."""

    name: Annotated[str, Form(r"[a-z0-9_]+", "lower-case letters, digits and _")]
    title: Text
    kind: Literal["tar", "folder", "embedded", "torchvision"]
    """Where the raw images come from: `tar` and `folder` (either may be given for the other), `embedded` (made or
    carried by an installed package, no download) or `torchvision` (downloaded by it)."""
    num_classes: Annotated[int, Range(2)] | None
    """None where it depends on the user's own images."""
    splits: Mapping[Annotated[str, Form("|".join(SPLIT_NAMES), f"one of {', '.join(SPLIT_NAMES)}")], Count]
    """Images a complete source has in each split; empty where that is not known."""
    image_size: Text
    """For people: pixels and mode of the raw images."""
    metric: Metric
    """What a result on it is, by the names of `transfer.metrics`: `top1` (share right), `mean_per_class` (mean of the
    per-class shares), `balanced_accuracy` (the same, as medicine calls it), `auroc`, and of several labels an image `map11`
    (VOC2007), `map_area` (VOC2010) or `map`, and of masks `miou`, of boxes `box_map`
    (COCO's mean over IoU 0.5 to 0.95) or `box_map50`."""
    flip: bool
    """Whether a horizontally mirrored image keeps its label."""
    licence: Text
    citation: Text
    source_hint: Text
    """What to pass as the source, for people and for error messages."""
    classes: Annotated[tuple[str, ...], Items(unique=True)] | None = None
    """Class names in label order; None: the sorted names of the classes in the train split."""
    member: Text | None = None
    """Which set inside the package: the generator of an embedded card, the class name of a torchvision one."""
    split_rule: Text | None = None
    """Which images the splits are, where the source leaves a choice; for people and for whoever makes the list."""
    indexed: bool = False
    """Whether labels are the class indices 0 to `num_classes` - 1, of which train, being a small draw, may lack some."""
    multi_label: str = ""
    """Where an image has several labels: what stands between them in a list's cell; `classes` and `num_classes` are then of
    the labels. Empty: one label an image."""
    masks: bool = False
    """Whether each pixel has a class: `classes` are then of pixels, and a list has a column `mask`."""
    mask_of_first: Annotated[int, Range(0, 254)] = 0
    """What the first class is in the source's masks; pixels with less are void (255 is always). ADE20K: 1, since 0 is "other"."""
    boxes: bool = False
    """Whether images have boxes: `classes` are then of boxes, and a list has a column `boxes`."""
    ordered: bool = False
    """Whether the classes are steps of one quantity, in the order of their labels: kappa and absolute error are then reported."""
    label_rule: Text | None = None
    """How labels follow from what the source says, where they are not its own."""
    faults: tuple[str, ...] = ()
    """What is known to be wrong or odd with the images or labels."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.mask_of_first and not self.masks:
            raise UserError("mask_of_first is of masks, and masks is false; leave it out")
        if self.masks and self.num_classes is not None and self.num_classes > 255:
            raise UserError(
                f"masks hold 255 classes at most, one byte a pixel with 255 for none, and num_classes is {self.num_classes}"
            )
        if self.indexed and self.num_classes is None:
            raise UserError("indexed is true, which needs num_classes")
        if self.indexed and self.classes is None:
            object.__setattr__(self, "classes", tuple(map(str, range(self.num_classes or 0))))
        if self.classes is not None and len(self.classes) != self.num_classes:
            raise UserError(
                f"classes has {len(self.classes)} names and num_classes is {self.num_classes}; give one for each"
            )
        if (self.multi_label and self.metric not in MULTI_LABEL_METRICS) or (
            not self.multi_label and self.metric.startswith("map")
        ):
            raise UserError(
                f"metric is {self.metric}, and multi_label is {self.multi_label!r}; several labels an image are measured by "
                f"{', '.join(MULTI_LABEL_METRICS)}, and mean average precision is of several labels"
            )
        for name, of_them in (("masks", ("miou",)), ("boxes", BOX_METRICS)):
            has = bool(getattr(self, name))
            if has != (self.metric in of_them) or (has and (self.classes is None or self.multi_label)):
                raise UserError(
                    f"{name}, the metric {' or '.join(of_them)} and the names of classes go together, without multi_label; "
                    "give all three or none"
                )
        if self.ordered and self.classes is None:
            raise UserError(
                "ordered is true, which needs classes in their order (or indexed): sorted names have no order"
            )
        if (self.kind in ("embedded", "torchvision")) != (self.member is not None):
            raise UserError("member is needed for, and only for, the kinds embedded and torchvision")
        if self.tests_only and not (self.indexed or self.label_rule):
            raise UserError(
                "splits without train need indexed, or a label_rule: nothing else says which classes there are"
            )
        object.__setattr__(self, "splits", MappingProxyType(dict(self.splits)))

    @property
    def test_split(self) -> str:
        """The split that results are on: `test`, or `val` where that is the source's only other one."""
        return "test" if "test" in self.splits else "val"

    @property
    def tests_only(self) -> bool:
        """Whether nothing of it is to train on: a new test of classes that another set teaches."""
        return bool(self.splits) and "train" not in self.splits

    def with_several_labels(self, separator: str) -> "Card":
        """The same set, an image of which has several labels. UserError for what cannot stand between two labels."""
        if not separator.strip() or separator == "?":
            raise UserError(
                f"--multi-label {separator!r}: give what stands between two labels of a cell, for example '|'"
            )
        metric = self.metric if self.metric in MULTI_LABEL_METRICS else "map"
        return replace(self, multi_label=separator, metric=metric)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "splits": dict(self.splits)}  # the read-only view cannot be sent to a worker


def datasets_dir() -> Path:
    """The folder with the cards: next to the packages in a checkout, else the data folder of the installation."""
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
        raise UserError(f"no dataset card is called '{name_or_path}': {advice}; images of your own are the card images")
    return _read(str(datasets_dir() / f"{name_or_path}.yaml"))


@functools.cache
def _read(path: str) -> Card:
    where = f"the dataset card {path}"
    data = read_yaml(path)
    content = parse_yaml(data, where)
    with located(where, data):
        if isinstance(content, dict):
            content = {**content, "splits": content.get("splits") or {}}
            # A class called 0 is a number to YAML.
            for name in ("classes", "faults"):
                if isinstance(content.get(name), list):
                    content[name] = [str(item) if type(item) is int else item for item in content[name]]
        return from_dict(Card, content)
