"""Image bytes -> RGB pixels, for every mode that Pillow reads.

ICC profiles are left alone: the numbers in the file are taken as sRGB, as the published ImageNet pipelines do.
"""

import io
from typing import Any

import numpy as np

MAX_PIXELS = 100_000_000
"""Images above this are refused before their pixels are decoded: 300 MB of RGB, or an attack."""

_ORIENTATION = 0x0112  # EXIF tag


class DecodeError(ValueError):
    """These bytes are not an image that can be read whole; the message is the reason, without a name."""


def decode_image(data: bytes) -> np.ndarray:
    """Pixels of an image as uint8 RGB of shape (H, W, 3), upright (EXIF orientation applied), writable.

    Grayscale and 1-bit are repeated over the channels (1-bit: 0 and 255), 16-bit is scaled to 8, CMYK and YCbCr go
    through Pillow's conversion, and transparent pixels are laid on white, the ground that drawings and cut-outs are
    made for. The first frame of an animation counts.

    Raises:
        DecodeError: not an image, cut short, damaged, too large, or with pixels that have no agreed range (float).
    """
    from PIL import Image, ImageOps

    if not data:
        raise DecodeError("empty file")
    try:
        with Image.open(io.BytesIO(data)) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise DecodeError(f"{opened.width}x{opened.height} pixels, more than the {MAX_PIXELS} allowed")
            opened.load()
            image: Image.Image = opened
            if _orientation(opened) != 1:
                image = ImageOps.exif_transpose(opened)
            return np.array(_to_rgb(image), dtype=np.uint8)
    except DecodeError:
        raise
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # Pillow's plugins raise SyntaxError, struct.error, IndexError and more on bad bytes
        raise DecodeError(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error


def _orientation(image: Any) -> int:
    """The EXIF orientation, 1 (upright) where there is none or where it cannot be read."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a damaged EXIF block is no reason to lose the pixels
        return 1
    return value if value in range(1, 9) else 1


def _to_rgb(image: Any) -> Any:
    from PIL import Image

    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        return Image.fromarray(_eight_bit(np.asarray(image))).convert("RGB")
    if image.mode == "F":
        raise DecodeError("floating-point pixels have no agreed range: convert the image to 8 or 16 bits")
    # Palette, 1-bit, grayscale and RGB images may name one colour (or one alpha a palette entry) as transparent.
    if image.mode in ("RGBA", "LA", "La", "RGBa", "PA") or "transparency" in image.info:
        layered = image.convert("RGBA")
        ground = Image.new("RGBA", layered.size, (255, 255, 255, 255))
        return Image.alpha_composite(ground, layered).convert("RGB")
    return image.convert("RGB")


def _eight_bit(values: np.ndarray) -> np.ndarray:
    """16-bit samples scaled to 0..255 (65535 -> 255). Pillow gives 32-bit integers for some files of 8 and 16 bits."""
    if values.dtype.itemsize == 2:
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    wide = np.clip(values, 0, 65535)
    return (wide if wide.max() <= 255 else (wide + 128) // 257).astype(np.uint8)
