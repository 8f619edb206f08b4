"""COCO's detection set as it is distributed and unpacked, and sets in its form:

    <source>/annotations/instances_<split><anything>.json       split = train, val or test
    <source>/<split><anything>/<file_name>                      for example train2017/000000000009.jpg

Boxes are [left, top, width, height] there. What is rounded beyond the image's edge by less than a pixel is cut off; boxes of no
area, which such files may have, are left out and counted.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline import documents
from pipeline.data.format.boxes import ListedBox, ListedBoxes
from pipeline.data.sources.boxes.listed import place_of
from pipeline.data.sources.entry import IMAGES, SPLIT_WORDS, ImageEntry
from pipeline.data.sources.list_access import AllowedPlaces
from pipeline.errors import UserError
from pipeline.storage import listing, objects

FOLDER = "annotations"
MAX_BYTES = 1 << 30
"""Of a file; COCO's own has 448 MB, and takes some 4 GB of memory while it is read."""
SLACK_PX = 1.0
_NAME = re.compile(r"instances_(([a-z]+)[A-Za-z0-9_-]*)\.json")


@dataclass(frozen=True)
class _Image:
    id: int
    file_name: documents.RelativePath
    width: documents.Positive
    height: documents.Positive


@dataclass(frozen=True)
class _Annotation:
    id: int
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    iscrowd: int = 0


@dataclass(frozen=True)
class _Category:
    id: int
    name: documents.Text


@dataclass(frozen=True)
class _Instances:
    images: list[_Image]
    annotations: list[_Annotation]
    categories: list[_Category]


def open_coco(source: str, classes: Sequence[str]) -> tuple[list[ImageEntry], str]:
    """All images of all splits, those without a box included, and a note.

    Raises:
        UserError: a file that is none of this form, a class that the card does not have, an image or annotation that stands
            twice or belongs to nothing, a box outside its image; each with the file and the annotation.
    """
    entries: list[ImageEntry] = []
    num_flat = 0
    for name, folder, split in annotations(source):
        url = objects.join(source, FOLDER, name)
        found = documents.read(url, _Instances, max_bytes=MAX_BYTES)
        by_image, flat = _boxes(found, classes, url)
        num_flat += flat
        places = AllowedPlaces(objects.join(source, FOLDER), [source])
        for image in found.images:
            path = objects.join(source, folder, image.file_name)
            _, locator, size = places.locate(path)
            stem, _, extension = image.file_name.rpartition(".")
            boxes = ListedBoxes.of(by_image[image.id], f"{url}, image {image.id}")
            entries.append(
                ImageEntry(split, IMAGES, stem, extension.lower(), locator, size, boxes=boxes, beside_name=boxes.digest)
            )
    return entries, f"{num_flat} boxes of no area are left out" if num_flat else ""


def annotations(source: str) -> list[tuple[str, str, str]]:
    """(name of the file, folder of its images, split), by name."""
    found = []
    for item in listing.items(objects.join(source, FOLDER)):
        match = _NAME.fullmatch(item.name)
        if match and match[2] in SPLIT_WORDS:
            found.append((item.name, match[1], SPLIT_WORDS[match[2]]))
    return sorted(found)


def _boxes(found: _Instances, classes: Sequence[str], url: str) -> tuple[dict[int, list[ListedBox]], int]:
    """Boxes by image, and how many have no area."""
    images = {image.id: image for image in found.images}
    for what, num in (("images", len(images)), ("annotations", len({a.id for a in found.annotations}))):
        if num < len(getattr(found, what)):
            raise UserError(f"{url}: two {what} have the same id; give each its own")
    labels = {category.id: place_of(category.name, classes, url) for category in found.categories}
    by_image: dict[int, list[ListedBox]] = {number: [] for number in images}
    num_flat = 0
    for annotation in found.annotations:
        where = f"{url}, annotation {annotation.id}"
        image = images.get(annotation.image_id)
        if image is None or annotation.category_id not in labels:
            lacks = f"image {annotation.image_id}" if image is None else f"category {annotation.category_id}"
            raise UserError(f"{where}: the file has no {lacks}; mend it, or leave it out")
        left, top, width, height = annotation.bbox
        if width <= 0 or height <= 0:
            num_flat += 1
            continue
        box = ListedBox(left, top, left + width, top + height, labels[annotation.category_id], annotation.iscrowd > 0)
        by_image[image.id].append(_inside(box, image, where))
    return by_image, num_flat


def _inside(box: ListedBox, image: _Image, where: str) -> ListedBox:
    edges = (image.width, image.height, image.width, image.height)
    if any(not -SLACK_PX <= at <= most + SLACK_PX for at, most in zip(box[:4], edges, strict=True)):
        shown = ", ".join(f"{at:g}" for at in box[:4])
        raise UserError(
            f"{where}: its box ({shown}) is not inside its image of {image.width} x {image.height} pixels; mend it, or leave it "
            "out"
        )
    left, top, right, bottom = (min(max(at, 0.0), float(most)) for at, most in zip(box[:4], edges, strict=True))
    return box._replace(left=left, top=top, right=right, bottom=bottom)
