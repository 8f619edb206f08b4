"""The embedded set `glyph_sets`: none to three of ten characters in one picture, for what several labels an image needs.

Labels are of unequal frequency, as in the sets that it stands for: the first is in more than every fourth picture, the last
in one of twelve. Everything is a pure function of a picture's number.
"""

import numpy as np

from pipeline.data.sources import glyphs

VERSION, SEED = 1, 1
"""The version goes up whenever any pixel or label changes."""
LABELS = ("a", "b", "d", "e", "f", "g", "h", "k", "m", "q")
COUNTS = {"train": 600, "val": 100, "test": 300}
SIDE = 2 * glyphs.SIDE
"""Pixels of a picture: room for four characters, of which at most three are drawn."""
_WEIGHTS = np.linspace(3.0, 0.75, len(LABELS))


def shown(index: int) -> tuple[str, ...]:
    """The labels of a picture, in order."""
    return tuple(LABELS[i] for i in sorted(number for number, _ in _places(index)))


def render(index: int) -> np.ndarray:
    """(64, 64) uint8, white on black."""
    names = glyphs.class_names()
    picture = np.zeros((SIDE, SIDE), np.uint8)
    for number, quarter in _places(index):
        label = next(i for i, name in enumerate(names) if name.startswith(f"u{ord(LABELS[number]):04x}_"))
        row, column = (glyphs.SIDE * part for part in divmod(quarter, 2))
        picture[row : row + glyphs.SIDE, column : column + glyphs.SIDE] = glyphs.render(SEED, label, index)
    return picture


def _places(index: int) -> list[tuple[int, int]]:
    """(number of the label, quarter of the picture) of each character in it."""
    draw = np.random.default_rng([SEED, index])
    num = int(draw.choice(4, p=(0.04, 0.36, 0.36, 0.24)))
    chosen = draw.choice(len(LABELS), num, replace=False, p=_WEIGHTS / _WEIGHTS.sum())
    return list(zip(chosen.tolist(), draw.permutation(4)[:num].tolist(), strict=True))
