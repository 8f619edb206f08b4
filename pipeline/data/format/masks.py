"""Masks: what each pixel of an image shows. A member `<key>.seg.png` beside the image in its shard, one byte a pixel.

A pixel holds the number of its class in the manifest's `masks`, or 255 where nothing is said of it. A mask has the size of its
image, upright.
"""

import io
from collections.abc import Iterator

import numpy as np

from pipeline.data.format.index import SplitIndex
from pipeline.data.format.members import members_of
from pipeline.errors import UserError

ENDING = "seg.png"
VOID = 255
"""Of pixels that nothing is said of: neither trained on nor counted."""


def decode_mask(data: bytes, where: str) -> np.ndarray:
    """(H, W) uint8 of a PNG of one byte a pixel, gray or with a palette, whose numbers are then meant. UserError for others."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as opened:
            mode, found = opened.mode, np.array(opened) if opened.mode in ("L", "P") else None
    except Exception as error:  # Pillow raises what it likes on bytes that are none
        raise UserError(f"{where}: its mask is no readable PNG ({error}); write it anew") from None
    if found is None:
        raise UserError(
            f"{where}: its mask is a PNG of mode {mode}; one byte a pixel is needed, gray or with a palette"
        )
    return found


def from_first(mask: np.ndarray, first: int) -> tuple[np.ndarray, bytes]:
    """(mask, its PNG) of a source whose first class is `first`: that becomes 0, what is below it or void becomes void."""
    from PIL import Image

    found = np.where((mask < first) | (mask == VOID), VOID, mask - np.uint8(first)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(found).save(file, "PNG")
    return found, file.getvalue()


def check_mask(mask: np.ndarray, size: tuple[int, int], num_classes: int, where: str, first: int = 0) -> None:
    """UserError for a mask of another size (height, width) than its image, or with a class that there is not.

    Args:
        first: what the first class was in the source, for the sentence.
    """
    if mask.shape != size:
        raise UserError(
            f"{where}: its mask has {mask.shape[1]} x {mask.shape[0]} pixels and the image {size[1]} x {size[0]}; mend "
            "one of them"
        )
    others = np.setdiff1d(mask, (*range(num_classes), VOID))
    if len(others):
        raise UserError(
            f"{where}: its mask has the class {others[0] + first}; there are {first} to {num_classes - 1 + first}, and {VOID} "
            "for none"
        )


def masks_of(index: SplitIndex) -> Iterator[np.ndarray]:
    """The masks of a split, in the order of its index. Errors as of `members_of`, and for a member that is damaged."""
    for where, data in members_of(index, ENDING):
        yield decode_mask(data, where)
