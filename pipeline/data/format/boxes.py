"""Boxes: which objects an image shows, and where. A member `<key>.boxes.json` beside the image in its shard:

    {"size": [640, 480], "boxes": [[12.5, 40, 200, 310], ...], "labels": [14, ...], "crowd": [false, ...]}

Edges are left, top, right and bottom in pixels of the upright image of that width and height, from 0 to its size; labels are
places in the manifest's `boxes`. A crowd (COCO's `iscrowd`) is a region of objects that are not told apart: it is not learnt, and
what is found in it is neither right nor wrong.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import msgspec
import numpy as np

from pipeline import documents
from pipeline.data.format.index import SplitIndex
from pipeline.data.format.members import members_of
from pipeline.errors import UserError

ENDING = "boxes.json"
MAX_BYTES = 4 << 20
"""Of a member."""
_WIDTH = 6


class ListedBox(NamedTuple):
    """Of one object, as a list has it."""

    left: float
    top: float
    right: float
    bottom: float
    label: int
    crowd: bool


@dataclass(frozen=True, slots=True)
class ListedBoxes:
    """Of one image, before its size is known; small, since a list may have a hundred thousand images."""

    data: bytes
    """Rows of six float64."""
    where: str
    """The file and the line that say so."""

    @staticmethod
    def of(found: Sequence[ListedBox], where: str) -> "ListedBoxes":
        """UserError for a box of no area."""
        for number, box in enumerate(found, start=1):
            if not (box.left < box.right and box.top < box.bottom):
                raise UserError(
                    f"{where}: box {number} has no area ({_edges(box)} from left, top to right, bottom); mend it, or leave it out"
                )
        return ListedBoxes(np.array(found, np.float64).reshape(-1, _WIDTH).tobytes(), where)

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    def encode(self, height: int, width: int) -> bytes:
        """The member of an image of that size. UserError for a box that leaves it."""
        rows = np.frombuffer(self.data, np.float64).reshape(-1, _WIDTH)
        edge = np.array([width, height, width, height])
        outside = ((rows[:, :4] < 0) | (rows[:, :4] > edge)).any(1)
        if outside.any():
            number = int(outside.argmax())
            raise UserError(
                f"{self.where}: box {number + 1} ({_edges(rows[number])}) is not inside its image of {width} x {height} pixels; "
                "mend it, or leave it out"
            )
        content = {
            "size": [width, height],
            "boxes": rows[:, :4].tolist(),
            "labels": rows[:, 4].astype(int).tolist(),
            "crowd": (rows[:, 5] > 0).tolist(),
        }
        return json.dumps(content).encode()


def _edges(box: Sequence[float]) -> str:
    return ", ".join(f"{edge:g}" for edge in box[:4])


@dataclass(frozen=True)
class Boxes:
    """Of one image."""

    width: int
    height: int
    edges: np.ndarray
    """(B, 4) float64: left, top, right, bottom in pixels."""
    labels: np.ndarray
    """(B,) int64."""
    crowd: np.ndarray
    """(B,) bool."""

    @property
    def scale(self) -> np.ndarray:
        """(4,): edges in shares of the image times this are edges in pixels."""
        return np.array([self.width, self.height, self.width, self.height], np.float64)

    def counts(self, num_classes: int) -> np.ndarray:
        """(C,) int64: boxes of each class that are to be found."""
        return np.bincount(self.labels[~self.crowd], minlength=num_classes)


@dataclass(frozen=True)
class _Member:
    size: tuple[documents.Positive, documents.Positive]
    boxes: list[tuple[float, float, float, float]]
    labels: list[Annotated[int, msgspec.Meta(ge=0)]]
    crowd: list[bool]


def decode_boxes(data: bytes, num_classes: int, where: str) -> Boxes:
    """UserError for what `ListedBoxes.encode` does not write."""
    remedy = "prepare the dataset again"
    found = documents.convert(
        documents.parse_json(data, where, max_bytes=MAX_BYTES, remedy=remedy), _Member, where, remedy=remedy
    )
    edges = np.array(found.boxes, np.float64).reshape(-1, 4)
    width, height = found.size
    if not (
        len(found.boxes) == len(found.labels) == len(found.crowd)
        and max(found.labels, default=0) < num_classes
        and (edges[:, :2] < edges[:, 2:]).all()
        and (edges >= 0).all()
        and (edges <= [width, height, width, height]).all()
    ):
        raise UserError(f"{where} holds boxes that no image of {width} x {height} pixels has; {remedy}")
    return Boxes(width, height, edges, np.array(found.labels, np.int64), np.array(found.crowd, bool))


def boxes_of(index: SplitIndex, num_classes: int) -> Iterator[Boxes]:
    """The boxes of a split, in the order of its index. Errors as of `members_of`, and for a member that is damaged."""
    for where, data in members_of(index, ENDING):
        yield decode_boxes(data, num_classes, where)
