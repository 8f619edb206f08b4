"""The column `boxes` of a JSONL list: what each image shows, in pixels of the upright image.

{"path": "a.jpg", "split": "train", "boxes": [{"label": "dog", "xyxy": [left, top, right, bottom], "crowd": false}, ...]}
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline import documents
from pipeline.data.format.boxes import ListedBox, ListedBoxes
from pipeline.errors import UserError


@dataclass(frozen=True)
class _Row:
    label: documents.Text | int
    xyxy: tuple[float, float, float, float]
    crowd: bool = False


def boxes_of_row(row: dict[str, Any], classes: Sequence[str], where: str) -> ListedBoxes:
    """UserError, with the line: no boxes at all, a class that there is not, a box of no area, and what is no box."""
    if row.get("boxes") is None:
        raise UserError(f"{where}: boxes is not there; an image without objects has an empty list")
    found = documents.convert({"boxes": row["boxes"]}, _Rows, where, remedy="mend that line").boxes
    return ListedBoxes.of(
        [ListedBox(*box.xyxy, place_of(str(box.label), classes, where), box.crowd) for box in found], where
    )


@dataclass(frozen=True)
class _Rows:
    boxes: list[_Row]


def place_of(label: str, classes: Sequence[str], where: str) -> int:
    if label not in classes:
        raise UserError(f"{where}: {documents.excerpt(label)} is none of the {len(classes)} classes of the card")
    return classes.index(label)
