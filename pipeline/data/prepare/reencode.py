"""Smaller images at writing: longest or shortest side bounded, JPEG of a given quality."""

import io
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pipeline.errors import UserError

DEFAULT_QUALITY = 95


@dataclass(frozen=True, kw_only=True)
class Reencode:
    """How images are changed at writing. An image that is small enough stays byte for byte, unless a quality is given.

    What is re-encoded becomes an upright sRGB-as-stored RGB JPEG without metadata.
    """

    shortest_px: int | None = None
    """Scale down (never up) to this shortest side."""
    longest_px: int | None = None
    """Scale down (never up) to this longest side."""
    jpeg_quality: int | None = None
    """Given: every image is written anew with it. None: only images that are scaled, with quality 95."""

    def __post_init__(self) -> None:
        if self.shortest_px is not None and self.longest_px is not None:
            raise UserError("resize the shortest side or the longest, not both: leave one of the two options out")
        for name, value in (("shortest_px", self.shortest_px), ("longest_px", self.longest_px)):
            if value is not None and value < 8:
                raise UserError(f"{name} {value} is too small: give at least 8 pixels")
        if self.jpeg_quality is not None and not 1 <= self.jpeg_quality <= 100:
            raise UserError(f"JPEG quality {self.jpeg_quality} must be from 1 to 100, for example 90")

    def __bool__(self) -> bool:
        return any(value is not None for value in asdict(self).values())

    @property
    def scales(self) -> bool:
        return self.shortest_px is not None or self.longest_px is not None

    def apply(self, data: bytes, extension: str, pixels: np.ndarray) -> tuple[bytes, str, np.ndarray]:
        """Bytes, extension and pixels as they are written, from the bytes of an image and its pixels (H, W, 3)."""
        from PIL import Image

        height, width = pixels.shape[:2]
        side = min(height, width) if self.shortest_px is not None else max(height, width)
        limit = self.shortest_px if self.shortest_px is not None else self.longest_px
        scaled = limit is not None and side > limit
        if not scaled and self.jpeg_quality is None:
            return data, extension, pixels
        image = Image.fromarray(pixels)
        if scaled and limit is not None:
            size = (max(1, round(width * limit / side)), max(1, round(height * limit / side)))
            image = image.resize(size, Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=self.jpeg_quality or DEFAULT_QUALITY)
        return buffer.getvalue(), "jpg", np.asarray(image)

    def to_recipe(self) -> dict[str, Any] | None:
        """What the manifest says of it; None where nothing is changed."""
        return asdict(self) if self else None
