"""Boxes: as they were drawn or listed, in shards; COCO's files; refusals with file and line."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline import recipes
from pipeline.data.format.boxes import boxes_of, decode_boxes
from pipeline.data.format.manifest import Manifest
from pipeline.data.prepare.prepare import prepare
from pipeline.data.prepare.reencode import Reencode
from pipeline.data.sources import shapes
from pipeline.data.sources.cards import load_card
from pipeline.data.verify.verify import verify
from pipeline.errors import UserError
from pipeline.training.check_run import check_loss

CARD = replace(load_card("shape_boxes"), kind="folder", member=None)
BOX = {"label": "disc", "xyxy": [0, 1, 6, 8]}


def test_a_drawn_box_is_around_the_pixels_of_its_shape() -> None:
    num_shown = num_outside = 0
    for number in range(30):
        _, mask, boxes = shapes.render(number)
        outside = mask > 0
        for box in boxes:
            place = np.s_[int(box.top) : int(box.bottom), int(box.left) : int(box.right)]
            shown = mask[place] == shapes.LABELS.index(shapes.BOX_LABELS[box.label])
            assert (
                shown[0].any() and shown[-1].any() and shown[:, 0].any() and shown[:, -1].any()
            )  # it cannot be smaller
            num_shown += int(shown.sum())
            outside[place] = False
        num_outside += int(outside.sum())
    assert num_outside < 0.05 * num_shown  # of shapes that others hide


def test_boxes_come_back_as_they_were_drawn(tmp_path: Path) -> None:
    url = str(tmp_path / "shape_boxes")
    found = prepare(load_card("shape_boxes"), url, shard_samples=100)
    assert found.outputs == shapes.BOX_LABELS and found.classes == ("images",) and not verify(url).problems
    index = Manifest.open(url).split("val")
    for key, boxes in zip(index.keys, boxes_of(index, 5), strict=True):
        _, _, drawn = shapes.render(int(str(key).rpartition("_")[2]))
        assert (boxes.width, boxes.height) == (96, 96) and not boxes.crowd.any()
        np.testing.assert_array_equal(boxes.edges, [box[:4] for box in drawn])
        assert boxes.labels.tolist() == [box.label for box in drawn]
    run = recipes.get("nfnet_tiny_cifar100")
    with pytest.raises(UserError, match=r"each box of .* has a class"):
        check_loss(replace(run, data=replace(run.data, url=url)))


def list_of_boxes(folder: Path, *of_val: Any, name: str = "list.jsonl") -> str:
    rows: list[dict[str, Any]] = [{"split": "train", "boxes": [BOX]}]
    rows += [{"split": "val", "boxes": boxes} for boxes in of_val]
    for number, row in enumerate(rows):
        Image.fromarray(np.full((8, 6, 3), number * 60, np.uint8)).save(folder / f"{number}.png")
        row["path"] = f"{number}.png"
    (folder / name).write_text("\n".join(map(json.dumps, rows)))
    return str(folder / name)


def test_a_list_with_boxes_is_prepared(tmp_path: Path) -> None:
    crowd = {"label": "ring", "xyxy": [1.5, 0, 2, 0.5], "crowd": True}
    found = prepare(CARD, str(tmp_path / "out"), source=list_of_boxes(tmp_path, [BOX, crowd], []), shard_samples=9)
    by_key = dict(zip(found.split("val").keys, boxes_of(found.split("val"), 5), strict=True))
    one, none = by_key["images_1"], by_key["images_2"]
    assert (one.width, one.height) == (6, 8) and one.edges.tolist() == [[0, 1, 6, 8], [1.5, 0, 2, 0.5]]
    assert one.labels.tolist() == [1, 2] and one.crowd.tolist() == [False, True] and not len(none.edges)
    assert one.counts(5).tolist() == [0, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        (
            [BOX, {**BOX, "xyxy": [0, 0, 7, 8]}],
            r"list.jsonl, line 2: box 2 \(0, 0, 7, 8\) is not inside its image of 6 x 8",
        ),
        ([{**BOX, "xyxy": [-1, 0, 3, 8]}], r"line 2: box 1 \(-1, 0, 3, 8\) is not inside"),
        ([{**BOX, "xyxy": [3, 4, 3, 8]}], r"list.jsonl, line 2: box 1 has no area \(3, 4, 3, 8"),
        ([{**BOX, "label": "star"}], r"list.jsonl, line 2: star is none of the 5 classes of the card"),
        ([{"label": "disc", "xyxy": [1, 2, 3]}], r"list.jsonl, line 2 is not usable: at boxes\[0\].xyxy"),
        ([{"label": "disc"}], r"list.jsonl, line 2 is not usable: at boxes\[0\]: it lacks 'xyxy'"),
        (None, r"list.jsonl, line 2: boxes is not there; an image without objects has an empty list"),
    ],
)
def test_a_box_that_does_not_fit_is_refused_with_file_and_line(tmp_path: Path, boxes: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare(CARD, str(tmp_path / "out"), source=list_of_boxes(tmp_path, boxes))


def test_changed_boxes_are_another_source_and_scaled_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="leave out --resize-shortest"):
        prepare(CARD, str(tmp_path / "small"), source=list_of_boxes(tmp_path, [BOX]), reencode=Reencode(longest_px=8))
    prepare(CARD, str(tmp_path / "out"), source=list_of_boxes(tmp_path, [BOX]))
    with pytest.raises(UserError, match="source"):
        prepare(CARD, str(tmp_path / "out"), source=list_of_boxes(tmp_path, [BOX, BOX]))
    with pytest.raises(UserError, match="boxes do not fit into a cell"):
        prepare(CARD, str(tmp_path / "csv"), source=list_of_boxes(tmp_path, [BOX], name="list.csv"))
    with pytest.raises(UserError, match="is no list; images with boxes are read from a JSONL file"):
        prepare(CARD, str(tmp_path / "folder"), source=str(tmp_path))


def coco(folder: Path, **changed: Any) -> str:
    """COCO's layout: two images a split; `changed` annotations of val."""
    classes = [{"id": 3 * i + 1, "name": name, "supercategory": "shape"} for i, name in enumerate(shapes.BOX_LABELS)]
    for split in ("train", "val"):
        place = folder / f"{split}2017"
        place.mkdir(parents=True)
        images = []
        for number in (7, 9) if split == "val" else (17, 19):
            name = f"{number:012d}.jpg"
            Image.fromarray(np.full((30, 40, 3), number * 9, np.uint8)).save(place / name)
            images.append({"id": number, "file_name": name, "width": 40, "height": 30, "license": 1})
        common = {"image_id": images[0]["id"], "segmentation": [[0, 0, 1, 1, 1, 0]], "iscrowd": 0}
        rows = [
            {**common, "id": 1, "category_id": 4, "bbox": [1.5, 2, 10, 20]},
            {**common, "id": 2, "category_id": 13, "bbox": [30, 5.5, 10.004, 24], "iscrowd": 1},
            {**common, "id": 3, "category_id": 1, "bbox": [3, 3, 0, 5]},
        ]
        if split == "val":
            rows[0] |= changed
        content = {"info": {}, "images": images, "annotations": rows, "categories": classes}
        (folder / "annotations").mkdir(exist_ok=True)
        (folder / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    (folder / "annotations" / "captions_val2017.json").write_text("{}")
    return str(folder)


def test_cocos_folder_is_prepared_as_it_is_distributed(tmp_path: Path) -> None:
    found = prepare(CARD, str(tmp_path / "out"), source=coco(tmp_path / "coco"))
    assert {name: split.num_samples for name, split in found.splits.items()} == {"train": 2, "val": 2}
    assert "6 boxes of no area" not in found.source_note and "2 boxes of no area are left out" in found.source_note
    by_key = dict(zip(found.split("val").keys, boxes_of(found.split("val"), 5), strict=True))
    one = by_key["images_000000000007"]
    assert one.edges.tolist() == [
        [1.5, 2, 11.5, 22],
        [30, 5.5, 40, 29.5],
    ]  # what rounding left beyond the edge is cut off
    assert one.labels.tolist() == [1, 4] and one.crowd.tolist() == [False, True]
    assert not len(by_key["images_000000000009"].edges)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"bbox": [1, 2, 50, 5]},
            r"instances_val2017.json, annotation 1: its box \(1, 2, 51, 7\) is not inside its image of 40 x 30",
        ),
        ({"image_id": 8}, r"instances_val2017.json, annotation 1: the file has no image 8"),
        ({"category_id": 2}, r"instances_val2017.json, annotation 1: the file has no category 2"),
        ({"id": 2}, r"instances_val2017.json: two annotations have the same id"),
        ({"bbox": "all"}, r"instances_val2017.json is not usable: at annotations\[0\].bbox"),
    ],
)
def test_an_annotation_that_does_not_fit_is_refused_with_its_file(tmp_path: Path, changed: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare(CARD, str(tmp_path / "out"), source=coco(tmp_path / "coco", **changed))


@pytest.mark.parametrize(
    "content",
    [
        b'{"size": [6, 8], "boxes": [[0, 0, 7, 8]], "labels": [0], "crowd": [false]}',
        b'{"size": [6, 8], "boxes": [[3, 0, 2, 8]], "labels": [0], "crowd": [false]}',
        b'{"size": [6, 8], "boxes": [[0, 0, 2, 8]], "labels": [5], "crowd": [false]}',
        b'{"size": [6, 8], "boxes": [[0, 0, 2, 8]], "labels": [], "crowd": [false]}',
        b'{"size": [6], "boxes": [], "labels": [], "crowd": []}',
        b"[",
    ],
)
def test_a_member_that_somebody_changed_is_refused(content: bytes) -> None:
    with pytest.raises(UserError, match=r"shard\.tar, key"):
        decode_boxes(content, 5, "shard.tar, key")
