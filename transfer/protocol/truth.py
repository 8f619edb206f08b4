"""What an image of a task says: one class, several labels, a class a pixel, or boxes; and what follows from that for a protocol.

This is the one place that tells them apart; heads and metrics see arrays:

    one class       (N,) int64
    several labels  (N, L) int8: 1 shown, 0 not shown, -1 not said
    pixels          (N,) of objects: the mask of each image, (H, W) uint8, 255 where nothing is said
    boxes           (N,) of objects: the `Boxes` of each image
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from pipeline.data.format.boxes import boxes_of
from pipeline.data.format.manifest import Manifest
from pipeline.data.format.masks import masks_of
from transfer.metrics import OF_BOXES, OF_PIXELS, OF_SEVERAL_LABELS
from transfer.protocol.method_settings import ALL_IMAGES, DetectSettings, KnnSettings, SegmentSettings, Settings

TEXTS = {
    "one": "",
    "several": "several labels an image; parts drawn over all images; ridge onto 2 t - 1, 0 where nothing is said; else binary "
    "cross-entropy of what is said",
    "pixels": "a class a pixel; parts drawn over all images; images squeezed to a square, scores brought to each mask's own size",
    "boxes": "boxes with classes; parts drawn over all images; images squeezed to a square, boxes measured in its own pixels; "
    "crowds are not learnt, and what is found in them counts nowhere",
}
"""They enter protocol digests."""
WHAT = {
    "one": "an image has one class",
    "several": "an image has several labels",
    "pixels": "each pixel has a class",
    "boxes": "images have boxes",
}
METRICS_OF = {"several": OF_SEVERAL_LABELS, "pixels": OF_PIXELS, "boxes": OF_BOXES}
"""The first is the usual one."""
OWN_METHOD: dict[str, tuple[str, type[Settings]]] = {
    "pixels": ("segment", SegmentSettings),
    "boxes": ("detect", DetectSettings),
}
"""Kinds whose images have no label, and the one method that takes them."""


@dataclass(frozen=True)
class Truth:
    kind: Literal["one", "several", "pixels", "boxes"] = "one"
    targets: np.ndarray | None = field(default=None, repr=False, compare=False)
    """Of several labels: (sets, labels) int8, as `pipeline.data.format.label_sets.targets`."""
    num_classes: int = 0
    """Of boxes."""

    @staticmethod
    def of_dataset(found: Manifest) -> "Truth":
        if found.boxes:
            return Truth("boxes", num_classes=len(found.boxes))
        return Truth("several" if found.labels else "pixels" if found.masks else "one", found.targets)

    def of(self, labels: np.ndarray, url: str = "", split: str = "") -> np.ndarray:
        """What heads and metrics take. Args: labels: of all images of a split; of several labels any number of them."""
        if self.kind in OWN_METHOD:
            index, said = Manifest.open(url).split(split), np.empty(len(labels), object)
            found = masks_of(index) if self.kind == "pixels" else boxes_of(index, self.num_classes)
            for place, one in enumerate(found):
                said[place] = one
            return said
        return labels if self.targets is None else self.targets[labels]

    def text(self, settings: Settings) -> str:
        """What the protocol says of it."""
        votes = "; neighbours that say something of a label vote for it" if isinstance(settings, KnnSettings) else ""
        return TEXTS[self.kind] + (votes if self.kind == "several" else "")

    def strata(self, labels: np.ndarray) -> np.ndarray:
        """Within what parts are drawn, as `Manifest.strata`."""
        return labels if self.kind == "one" else np.zeros_like(labels)

    def metric(self, asked: str, of_card: str) -> str:
        """The protocol's metric; where neither says one that fits, the usual one."""
        fitting = METRICS_OF.get(self.kind)
        return asked or (of_card if fitting is None or of_card in fitting else fitting[0])

    def cannot(self, settings: Settings, shots: int, metric: str, name: str) -> str | None:
        """Why a method does not fit what an image of the task `name` says, or None."""
        for kind, (method, own) in OWN_METHOD.items():
            if isinstance(settings, own) and self.kind != kind:
                what = "masks" if kind == "pixels" else "boxes"
                return f"{name} has no {what}, which the method {method} needs; leave the method out, or take data with {what}"
            if not isinstance(settings, own) and self.kind == kind:
                return f"{name}: {WHAT[kind]}; take the method {method}"
        fitting = METRICS_OF.get(self.kind)
        if fitting is None:
            others = {metric for of_kind in METRICS_OF.values() for metric in of_kind} - {"auroc"}
            return f"{metric} is not of one class an image, and {name} has one" if metric in others else None
        what = WHAT[self.kind]
        if shots != ALL_IMAGES:
            return f"{name}: {what}, so that images of each class cannot be drawn; set split: full"
        if getattr(settings, "teacher", None) is not None:
            return f"{name}: {what}, and a teacher's softmax is over one class an image; leave the teacher out"
        return None if metric in fitting else f"{name}: {what}; set metric to one of {', '.join(fitting)}"
