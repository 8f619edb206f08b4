"""The embedded set `shapes`: one to three shapes on parts of two photographs, with exact masks and boxes.

The photographs come with scikit-learn (`china.jpg`, `flower.jpg`; CC BY 2.0, their authors are in its documentation). What a
shape is filled with is another part of them, brighter or darker, so that neither colour nor texture alone gives it away.
Pictures of train, val and test are cut from different thirds of the photographs. Everything follows from a picture's number.
"""

import functools

import numpy as np

from pipeline.data.format.boxes import ListedBox

VERSION, SEED = 1, 2
"""The version goes up whenever any pixel changes."""
LABELS = ("background", "cross", "disc", "ring", "square", "triangle")
BOX_LABELS = LABELS[1:]
COUNTS = {"train": 160, "val": 40, "test": 80}
SIDE = 96  # pixels


@functools.cache
def _photographs() -> tuple[np.ndarray, ...]:
    from sklearn.datasets import load_sample_image

    return tuple(load_sample_image(name) for name in ("china.jpg", "flower.jpg"))


def render(index: int) -> tuple[np.ndarray, np.ndarray, list[ListedBox]]:
    """(pixels (96, 96, 3) uint8, mask (96, 96) uint8: the place of each pixel's class in LABELS, boxes).

    A box is around what is seen of a shape, its label a place in BOX_LABELS; those of which others hide more than half have none.
    """
    draw = np.random.default_rng([SEED, index])
    third = int(np.searchsorted(np.cumsum(list(COUNTS.values())), index, side="right"))
    pixels, mask = _part(draw, third).astype(np.float32), np.zeros((SIDE, SIDE), np.uint8)
    seen: list[tuple[int, np.ndarray, int]] = []  # number, pixels that are seen, how many there are
    for _ in range(int(draw.integers(1, 4))):
        number = int(draw.integers(1, len(LABELS)))
        inside = _inside(LABELS[number], draw)
        fill = _part(draw, third) * draw.uniform(0.5, 0.8) + draw.choice((0.0, 80.0))
        pixels[inside], mask[inside] = fill[inside], number
        seen = [(n, place & ~inside, num) for n, place, num in seen] + [(number, inside, int(inside.sum()))]
    boxes = [_box(number, place) for number, place, num in seen if 2 * place.sum() >= num]
    return pixels.clip(0, 255).astype(np.uint8), mask, boxes


def _box(number: int, place: np.ndarray) -> ListedBox:
    rows, columns = np.flatnonzero(place.any(1)), np.flatnonzero(place.any(0))
    return ListedBox(columns[0], rows[0], columns[-1] + 1, rows[-1] + 1, number - 1, False)


def _part(draw: np.random.Generator, third: int) -> np.ndarray:
    photograph = _photographs()[int(draw.integers(2))]
    width = photograph.shape[1] // 3
    top = int(draw.integers(photograph.shape[0] - SIDE + 1))
    left = third * width + int(draw.integers(width - SIDE + 1))
    return photograph[top : top + SIDE, left : left + SIDE]


def _inside(name: str, draw: np.random.Generator) -> np.ndarray:
    """(96, 96) bool: the pixels whose centres lie in a shape of drawn size, place and angle."""
    size, angle = draw.uniform(12, 24), draw.uniform(0, 2 * np.pi)
    center = draw.uniform(size, SIDE - size, 2)
    rows, columns = np.mgrid[:SIDE, :SIDE] - center[:, None, None]
    x, y = (
        (np.cos(angle) * columns + np.sin(angle) * rows) / size,
        (np.cos(angle) * rows - np.sin(angle) * columns) / size,
    )
    radius = np.hypot(x, y)
    match name:
        case "disc":
            return radius <= 1
        case "ring":
            return (radius <= 1) & (radius >= 0.55)
        case "square":
            return np.maximum(abs(x), abs(y)) <= 0.75
        case "cross":
            return (np.minimum(abs(x), abs(y)) <= 0.28) & (np.maximum(abs(x), abs(y)) <= 0.95)
    return (y <= 0.5) & (y >= 1.732 * abs(x) - 1)
