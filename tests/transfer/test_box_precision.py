"""Average precision of boxes: pycocotools' number, and that of a second implementation that knows nothing of ours."""

import contextlib
import io

import numpy as np
import pytest

from pipeline.data.format.boxes import Boxes
from pipeline.errors import UserError
from tests.transfer import recompute
from transfer import box_precision, metrics

NUM_CLASSES = 4


def _drawn(seed: int, num_images: int = 12, *, crowds: bool = True) -> tuple[list[Boxes], list[np.ndarray]]:
    """Boxes, and detections that are some of them moved a little, doubles, wrong classes and things that are not there."""
    draw = np.random.default_rng(seed)
    truth, said = [], []
    for _ in range(num_images):
        width, height = draw.integers(40, 200, 2)
        num = int(draw.integers(0, 6))
        low = draw.uniform(0, 0.6, (num, 2))
        edges = np.concatenate([low, low + draw.uniform(0.1, 0.4, (num, 2))], 1) * [width, height, width, height]
        labels = draw.integers(0, NUM_CLASSES - 1, num)  # the last class has no box: it is not counted
        crowd = draw.random(num) < (0.2 if crowds else 0)
        truth.append(Boxes(int(width), int(height), edges, labels, crowd))
        moved = [edges + draw.normal(0, 0.03, edges.shape).clip(-0.04, 0.04) * truth[-1].scale for _ in range(3)]
        low = draw.uniform(0, 0.5, (4, 2)) * [width, height]
        found = np.concatenate([*moved, np.concatenate([low, low + draw.uniform(5, 30, (4, 2))], 1)])
        names = np.concatenate([labels, labels, draw.integers(0, NUM_CLASSES, num + 4)])
        rows = np.column_stack([found / truth[-1].scale, draw.random(len(found)), names])
        said.append(rows[np.argsort(-rows[:, 4])])
    return truth, said


def _cocos(truth: list[Boxes], said: list[np.ndarray]) -> tuple[float, float]:
    """(AP, AP at 0.5) of pycocotools."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def sides(edges: np.ndarray) -> list[float]:
        return [edges[0], edges[1], edges[2] - edges[0], edges[3] - edges[1]]

    boxes, found = [], []
    for image, (b, rows) in enumerate(zip(truth, said, strict=True)):
        for edges, label, crowd in zip(b.edges, b.labels, b.crowd, strict=True):
            more = {"id": len(boxes) + 1, "iscrowd": int(crowd), "area": float(np.prod(sides(edges)[2:]))}
            boxes.append({"image_id": image, "category_id": int(label), "bbox": sides(edges), **more})
        for row in rows:
            box = sides(row[:4] * b.scale)
            found.append({"image_id": image, "category_id": int(row[5]), "bbox": box, "score": row[4]})
    with contextlib.redirect_stdout(io.StringIO()):
        there = COCO()
        there.dataset = {
            "images": [{"id": i, "width": b.width, "height": b.height} for i, b in enumerate(truth)],
            "annotations": boxes,
            "categories": [{"id": c, "name": str(c)} for c in range(NUM_CLASSES)],
        }
        there.createIndex()
        judged = COCOeval(there, there.loadRes(found), "bbox")
        judged.evaluate()
        judged.accumulate()
        judged.summarize()
    return judged.stats[0], judged.stats[1]


def _ours(truth: list[Boxes], said: list[np.ndarray]) -> tuple[float, float]:
    found, counts = box_precision.matched(said, truth), np.stack([b.counts(NUM_CLASSES) for b in truth])
    return metrics.compute("box_map", found, counts), metrics.compute("box_map50", found, counts)


@pytest.mark.parametrize("seed", range(6))
def test_average_precision_is_pycocotools(seed: int) -> None:
    drawn = _drawn(seed)
    assert _ours(*drawn) == pytest.approx(_cocos(*drawn), abs=1e-12) and _ours(*drawn)[0] > 0.05


@pytest.mark.parametrize("seed", range(6))
def test_average_precision_is_that_of_a_second_implementation(seed: int) -> None:
    truth, said = _drawn(seed)
    detections = [[(r[4], int(r[5]), *(r[:4] * b.scale)) for r in rows] for b, rows in zip(truth, said, strict=True)]
    boxes = [[(int(c), bool(w), *e) for c, w, e in zip(b.labels, b.crowd, b.edges, strict=True)] for b in truth]
    ious = [0.5 + i / 20 for i in range(10)]
    for ours, which in zip(_ours(truth, said), (ious, ious[:1]), strict=True):
        assert ours == pytest.approx(recompute.box_precision(detections, boxes, which), abs=1e-9)


def test_the_right_boxes_are_all_of_it_and_none_is_nothing() -> None:
    truth, _ = _drawn(0, crowds=False)
    right = [np.column_stack([b.edges / b.scale, np.linspace(1, 0.5, len(b.labels)), b.labels]) for b in truth]
    assert _ours(truth, right) == pytest.approx((1, 1))
    assert _ours(truth, [np.zeros((0, 6))] * len(truth)) == (0, 0)


def test_guessing_the_boxes_of_other_images_reaches_what_is_right_by_chance() -> None:
    truth, _ = _drawn(1, 30, crowds=False)
    one = [Boxes(10, 10, np.array([[2.0, 2, 8, 8]]), np.array([1]), np.array([False]))] * 5
    assert box_precision.guessed(slice(None), one, one, NUM_CLASSES) == pytest.approx(1)  # all images are alike
    assert 0 < box_precision.guessed(slice(1), truth, truth, NUM_CLASSES) < 0.1


def test_no_box_at_all_is_refused() -> None:
    empty = Boxes(4, 4, np.zeros((0, 4)), np.zeros(0, int), np.zeros(0, bool))
    with pytest.raises(UserError, match="needs an image with a box"):
        _ours([empty], [np.zeros((0, 6))])
