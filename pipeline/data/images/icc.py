"""ICC profiles: what the numbers in a file mean, brought to sRGB.

A profile is a curve and a matrix or a table; the transform built from it is kept, since a dataset has few profiles and many
images. Most embedded profiles are sRGB itself under one of many names: that is found by trying, and such images are left
untouched, bit for bit.
"""

import functools
import io
from typing import Any

import numpy as np

_SPACES = {"RGB": "RGB ", "L": "GRAY", "CMYK": "CMYK"}
_SAME_WITHIN = 3
"""Of 255: a profile that moves no colour further than this is sRGB with other rounding."""


def to_srgb(image: Any, profile: bytes | None) -> Any:
    """The image in sRGB (mode RGB) by its profile; unchanged where the profile is sRGB or absent.

    A profile that cannot be read, or that is made for another kind of pixels, is no reason to lose an image: its numbers
    are then taken as sRGB, as they are in an image without a profile.
    """
    transform = _transform(profile, image.mode) if profile and image.mode in _SPACES else None
    if transform is None:
        return image
    from PIL import ImageCms

    return ImageCms.applyTransform(image, transform)


@functools.lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> Any:
    """Transform from `profile` to sRGB, None where none is needed or possible."""
    from PIL import Image, ImageCms

    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if opened.profile.xcolor_space != _SPACES[mode]:
            return None
        transform = ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (OSError, ImageCms.PyCMSError):
        return None
    if mode == "CMYK":
        return transform
    steps = np.linspace(0, 255, 9).round().astype(np.uint8)
    colours = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(1, -1, 3)
    probe = Image.fromarray(colours if mode == "RGB" else colours[..., 0])
    moved = np.asarray(ImageCms.applyTransform(probe, transform)).astype(int) - np.asarray(probe.convert("RGB"))
    return None if np.abs(moved).max() <= _SAME_WITHIN else transform
