"""A 64-bit perceptual hash: the signs of the low frequencies of an image, equal or nearly so after re-encoding and resizing.

Luminance is brought to 32x32, its discrete cosine transform taken, and of the 64 lowest frequencies (without the mean)
each gives one bit: above their median or not. Images of one colour have the hash 0.
"""

import functools

import numpy as np

_SIDE, _KEPT = 32, 16
FLAT_HASH = 0
"""Of images without structure: equal hashes say nothing there."""
_MIN_AMPLITUDE = 1e-6


def perceptual_hash(pixels: np.ndarray) -> int:
    """Hash of uint8 RGB pixels, (H, W, 3), as an unsigned 64-bit integer. Compare with the Hamming distance."""
    from PIL import Image

    small = Image.fromarray(pixels).convert("L").resize((_SIDE, _SIDE), Image.Resampling.BILINEAR)
    basis, rows, columns = _transform()
    values = (basis @ np.asarray(small, dtype=np.float64) @ basis.T)[rows, columns]
    if np.abs(values).max() < _MIN_AMPLITUDE:
        return FLAT_HASH
    bits = np.packbits(values > np.median(values), bitorder="little")
    return int(bits.view("<u8")[0])


def mirrored(hashes: np.ndarray) -> np.ndarray:
    """What the hashes of the images would be, left and right exchanged, but for bits whose frequencies lie near the median.

    The cosine transform of a mirrored image has the other sign at the odd frequencies along its width. (n,) uint64.
    """
    bits = np.packbits(_transform()[2] % 2 == 1, bitorder="little")
    return hashes ^ bits.view("<u8")[0]


@functools.cache
def _transform() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The cosine basis, (16, 32), and the places of the 64 lowest frequencies in order of their sum."""
    places = np.arange(_SIDE)
    basis = np.cos(np.pi * (2 * places + 1) * np.arange(_KEPT)[:, None] / (2 * _SIDE))
    by_frequency = sorted(((u, v) for u in range(_KEPT) for v in range(_KEPT)), key=lambda place: (sum(place), place))
    rows, columns = np.array(by_frequency[1:65]).T
    return basis, rows, columns
