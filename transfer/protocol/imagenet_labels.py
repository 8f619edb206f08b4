"""What a task is measured by besides its test split: ReaL's labels and ImageNet-V2, other images of its classes, corruptions.

Class indices are those of everybody's ImageNet: the place of the wnid among the 1,000 sorted ones. ImageNet-V2 is a dataset of
its own (the card `imagenet_v2`, whose labels are the numbers of its folders); ReaL is one file of labels. A suite states them
next to the task; final trials then hold `real_top1` and `v2_top1`, measured when the task's own test split is open. Other sets
(ImageNet-A, R, Sketch, or anybody's) have some of the task's classes by name: `top1_on_NAME`, the choice being among theirs.
"""

import functools
import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline import documents
from pipeline.data.augment.corruptions import names_of
from pipeline.data.format.manifest import Manifest
from pipeline.errors import UserError
from pipeline.models.timm_models import imagenet_names
from pipeline.storage import objects
from transfer import metrics

NUM_VAL, NUM_CLASSES = 50_000, 1000
REMEDY = "give real.json of google-research/reassessed-imagenet"
REAL, V2 = "real_top1", "v2_top1"
ON, CORRUPTED = "top1_on_", "top1_corrupted"
"""Names of these metrics in a trial; what follows the third is the other set's name."""


def is_extra(metric: str) -> bool:
    return metric in (REAL, V2, CORRUPTED) or metric.startswith(ON)


@dataclass(frozen=True)
class OtherTestSet:
    """Other images of the task's classes."""

    metric: str
    what: str
    """For people."""
    url: str
    digest: str
    split: str
    columns: tuple[int, ...] = ()
    """Places of its classes among the task's; empty = they are the same, in the same order."""


@dataclass(frozen=True)
class ExtraTestSets:
    """What else final trials of a task are measured by: places, and digests of what lies there; empty where not configured."""

    real_url: str = ""
    real_sha256: str = ""
    others: tuple[OtherTestSet, ...] = ()
    corruptions: tuple[str, ...] = ()
    """Of the test split, by their names."""

    @property
    def needs_passes(self) -> bool:
        """Over other images than the test split's own."""
        return bool(self.others or self.corruptions)

    def digests(self) -> dict[str, str]:
        """Of the labels or images behind each metric, by its name."""
        found = {REAL: self.real_sha256, **{other.metric: other.digest for other in self.others}}
        found[CORRUPTED] = f"severities 1 to 5 of {', '.join(self.corruptions)}" if self.corruptions else ""
        return {k: v for k, v in found.items() if v}


def find_extra_test_sets(
    task: Manifest,
    test: str,
    *,
    real_labels: str = "",
    v2: str = "",
    also: Sequence[str] = (),
    corruptions: Sequence[str] = (),
    data_root: str,
) -> ExtraTestSets:
    """The label file and the dataset that a suite configures for a task with the test split `test`.

    No label meets a score here.

    Args:
        real_labels: `real.json`; a path that is not absolute lies under `data_root`. "" = not measured.
        v2: the prepared ImageNet-V2, likewise.
        also: prepared datasets whose classes are all or some of the task's, likewise.
        corruptions: of `pipeline.data.augment.corruptions`; ("all",) = each.
    Raises:
        UserError: something is not there, or does not go with the task's classes and images.
    """
    found: dict[str, str] = {}
    others: list[OtherTestSet] = []
    if (real_labels or v2) and not is_imagenet(task.classes):
        raise UserError(
            f"the classes of {task.url} are not ImageNet's 1,000 wnids; real_labels and v2 are for ImageNet, leave them out here"
        )
    if real_labels:
        url = _place(real_labels, data_root)
        _check_names(task.url, task.digest, test)
        found |= {"real_url": url, "real_sha256": _sha256(url)}
    if v2:
        manifest = Manifest.open(_place(v2, data_root))
        # Who sorts the folders 0 to 999 as text, as folder datasets do, gives 988 of them the wrong class.
        if not is_v2(manifest.classes):
            raise UserError(
                f"the classes of {manifest.url} are not 0 to 999 in order; prepare it with the card imagenet_v2"
            )
        others.append(OtherTestSet(V2, "ImageNet-V2", manifest.url, manifest.digest, _test_split(manifest)))
    if (also or corruptions) and (task.labels or task.masks or task.boxes):
        raise UserError(
            f"also and corruptions are for one class an image, which {task.url} has not; leave them out here"
        )
    others += [_other(task, _place(place, data_root)) for place in also]
    if twice := [o.metric for n, o in enumerate(others) if o.metric in {p.metric for p in others[:n]}]:
        raise UserError(f"two datasets would be {twice[0]}; give one of their folders another name")
    names = names_of(corruptions, "corruptions") if corruptions else ()
    return ExtraTestSets(**found, others=tuple(others), corruptions=names)


def _test_split(manifest: Manifest) -> str:
    split = next((s for s in ("test", "val") if s in manifest.splits), "")
    if not split:
        raise UserError(f"{manifest.url} has no split test; prepare it with the card of its name (normfree data cards)")
    return split


def _other(task: Manifest, url: str) -> OtherTestSet:
    manifest, places = Manifest.open(url), {name: place for place, name in enumerate(task.classes)}
    if missing := [name for name in manifest.outputs if name not in places]:
        raise UserError(
            f"{manifest.url} has classes that {task.url} lacks ({len(missing)}, {missing[0]} is the first); also is for datasets "
            "with all or some of the task's classes, by their names"
        )
    name = re.sub(r"[^a-z0-9]+", "_", manifest.url.rstrip("/").rpartition("/")[2].lower()).strip("_")
    same = list(manifest.outputs) == list(task.classes)
    columns = () if same else tuple(places[one] for one in manifest.outputs)
    return OtherTestSet(f"{ON}{name}", name, manifest.url, manifest.digest, _test_split(manifest), columns)


def real_top1(real_url: str, data_url: str, split: str, samples: np.ndarray, scores: np.ndarray) -> float:
    """ReaL accuracy of scores (N, 1000) of the images at the places `samples` (N,) of a prepared split of ImageNet.

    Raises:
        UserError: the file is not ReaL's, or an image has no place in it.
    """
    keys = Manifest.open(data_url).split(split).keys
    return metrics.compute("real", scores, real_sets(load_real(real_url), map(str, keys[samples])))


def is_imagenet(classes: Sequence[str]) -> bool:
    """Whether these are 1,000 wnids in their order, so that a label is everybody's class index."""
    return (
        len(classes) == NUM_CLASSES
        and all(re.fullmatch(r"n\d{8}", name) for name in classes)
        and list(classes) == sorted(classes)
    )


def is_same(data: Sequence[str], head: Sequence[str]) -> bool:
    """Whether labels of `data` are the classes of a head: by name, or of ImageNet by number.

    A published file's head says no names but 0 to 999, as ImageNet-V2's folders do.
    """
    of_imagenet = [is_imagenet(classes) or is_v2(classes) for classes in (data, head)]
    return list(data) == list(head) or all(of_imagenet)


def columns_of(data: Sequence[str], head: Sequence[str]) -> list[int] | None:
    """Places in a head of the classes of a dataset that are some of them, by WordNet's names; None where they are not.

    ImageNet-A, R and Sketch name their folders by wnids. A published file's head says 0 to 999, which are the sorted wnids: their
    names are then timm's list of them.
    """
    names = list(head)
    if is_v2(names):
        names = imagenet_names()
    places = {name: place for place, name in enumerate(names)}
    if not all(re.fullmatch(r"n\d{8}", name) and name in places for name in data):
        return None
    return [places[name] for name in data]


def is_v2(classes: Sequence[str]) -> bool:
    """Whether these are the folders of ImageNet-V2, in the order of numbers."""
    return list(classes) == [str(index) for index in range(NUM_CLASSES)]


def _place(path: str, data_root: str) -> str:
    path = os.path.expanduser(path)
    return path if "://" in path or path.startswith("/") else objects.join(data_root, path)


@functools.cache  # a task is opened for each of its trials
def _check_names(url: str, digest: str, split: str) -> None:  # noqa: ARG001
    for name in Manifest.open(url).split(split).keys:
        number_of(name)


@functools.cache
def _sha256(url: str) -> str:
    load_real(url)  # a file that is something else is refused before anything is run
    return hashlib.sha256(_read(url)).hexdigest()


def load_real(url: str) -> list[tuple[int, ...]]:
    """`real.json` of Beyer et al. 2020 (github.com/google-research/reassessed-imagenet).

    Returns:
        50,000 tuples of class indices in the order of the files, ILSVRC2012_val_00000001.JPEG first; empty where the
        annotators agreed on none, which `transfer.metrics` leaves out.
    Raises:
        UserError: the file is missing, or is not that list.
    """
    content: Any = documents.parse_json(_read(url), url, remedy=REMEDY)
    if not isinstance(content, list) or len(content) != NUM_VAL:
        found = f"a list of {len(content):,}" if isinstance(content, list) else f"a {type(content).__name__}"
        raise UserError(f"{url} holds {found}, not the label sets of 50,000 images; give ReaL's real.json")
    for number, row in enumerate(content, 1):
        if not isinstance(row, list) or not all(type(c) is int and 0 <= c < NUM_CLASSES for c in row):
            found = documents.excerpt(str(row)[:200])
            raise UserError(f"{url}: image {number} has {found}, not a list of class indices; give ReaL's real.json")
    return [tuple(row) for row in content]


def real_sets(real: list[tuple[int, ...]], names: Iterable[str]) -> list[tuple[int, ...]]:
    """The label sets of images by their file names or sample keys, in any order (a prepared split is shuffled).

    Raises:
        UserError: a name has no ILSVRC2012_val_<8 digits> in it.
    """
    return [real[number_of(name) - 1] for name in names]


def number_of(name: str) -> int:
    """1 to 50,000, of an image by its file name or sample key. UserError if it has no ILSVRC2012_val_<8 digits> in it."""
    match = re.search(r"ILSVRC2012_val_(\d{8})(?!\d)", name)
    if match is None or not 1 <= int(match[1]) <= NUM_VAL:
        raise UserError(f"ReaL has labels for ILSVRC2012_val_00000001 to {NUM_VAL:08d}; {name!r} is not of them")
    return int(match[1])


def _read(url: str) -> bytes:
    try:
        return objects.read_bytes(url, max_bytes=documents.MAX_BYTES + 1)
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise UserError(f"cannot read {url} ({why}); {REMEDY}") from None
