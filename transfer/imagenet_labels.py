"""The other labels of ImageNet: ReaL for its validation images, and the classes of ImageNet-V2's new ones.

Class indices are those of everybody's ImageNet: the place of the wnid among the 1,000 sorted ones.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

NUM_VAL, NUM_CLASSES = 50_000, 1000


def load_real(path: str | Path) -> list[tuple[int, ...]]:
    """`real.json` of Beyer et al. 2020 (github.com/google-research/reassessed-imagenet).

    Returns:
        50,000 tuples of class indices in the order of the files, ILSVRC2012_val_00000001.JPEG first; empty where the
        annotators agreed on none, which `transfer.metrics` leaves out.
    Raises:
        UserError: the file is missing, or is not that list.
    """
    content = _json(path, "real.json of google-research/reassessed-imagenet")
    if not isinstance(content, list) or len(content) != NUM_VAL:
        found = f"a list of {len(content):,}" if isinstance(content, list) else f"a {type(content).__name__}"
        raise UserError(f"{path} holds {found}, not the label sets of 50,000 images; give ReaL's real.json")
    for number, row in enumerate(content, 1):
        if not isinstance(row, list) or not all(type(c) is int and 0 <= c < NUM_CLASSES for c in row):
            raise UserError(f"{path}: image {number} has {row!r}, not a list of class indices; give ReaL's real.json")
    return [tuple(row) for row in content]


def real_sets(real: list[tuple[int, ...]], names: Iterable[str]) -> list[tuple[int, ...]]:
    """The label sets of images by their file names or sample keys, in any order (a prepared split is shuffled).

    Raises:
        UserError: a name has no ILSVRC2012_val_<8 digits> in it.
    """
    found = []
    for name in names:
        match = re.search(r"ILSVRC2012_val_(\d{8})(?!\d)", name)
        if match is None or not 1 <= int(match[1]) <= len(real):
            raise UserError(f"ReaL has labels for ILSVRC2012_val_00000001 to {len(real):08d}; {name!r} is not of them")
        found.append(real[int(match[1]) - 1])
    return found


def load_v2_classes(path: str | Path) -> tuple[str, ...]:
    """`class_info.json` of ImageNet-V2 (github.com/modestyachts/ImageNetV2): the wnid of each of its folders 0 to 999.

    Raises:
        UserError: the file is missing, is not that list, or its numbers are not the places of the sorted wnids.
    """
    content = _json(path, "class_info.json of modestyachts/ImageNetV2")
    try:
        wnids = {int(row["cid"]): str(row["wnid"]) for row in content}
    except (TypeError, KeyError, ValueError):
        raise UserError(f"{path} is no list of cid and wnid; give ImageNet-V2's class_info.json") from None
    if sorted(wnids) != list(range(NUM_CLASSES)) or sorted(wnids.values()) != [wnids[c] for c in sorted(wnids)]:
        raise UserError(f"{path}: its 1,000 cids are not the places of the sorted wnids; give the published file")
    return tuple(wnids[c] for c in range(NUM_CLASSES))


def v2_label(path: str) -> int:
    """The class index of an image of ImageNet-V2: its folder's name.

    The folders are called 0 to 999 without leading zeros; who sorts them as text, as folder datasets do, gives 988 of
    them the wrong class.

    Raises:
        UserError: the folder is no such number.
    """
    folder = Path(path).parent.name
    if not re.fullmatch(r"0|[1-9]\d{0,2}", folder):
        raise UserError(f"{path} does not lie in a folder 0 to 999 of ImageNet-V2")
    return int(folder)


def _json(path: str | Path, what: str) -> Any:
    try:
        return json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); give {what}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON ({error}); give {what}") from None
