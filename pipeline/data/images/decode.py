"""Image bytes -> upright sRGB pixels, for every mode that Pillow reads; a part of a JPEG without decoding the rest.

`open_picture` reads the header only: the crop is chosen from the size that it tells, and `Picture.crop` decodes no more than
the crop needs. All other formats are decoded whole. `decode_image` gives the whole picture.
"""

import io
import re
from typing import Any, Protocol

import numpy as np

from pipeline.data.images import png_chunks, turbojpeg
from pipeline.data.images.formats import PILLOW_FORMATS, other_file
from pipeline.data.images.icc import to_srgb

MAX_IMAGE_BYTES = 512 << 20
"""Files above this are skipped unread: no image, or an attack."""
MAX_PIXELS = 100_000_000
"""Images above this are refused before their pixels are decoded: 300 MB of RGB, or an attack."""
_FREE_PIXELS, _PIXELS_PER_BYTE = 16_000_000, 2000
"""Images above the first must bring a byte for so many pixels: a blank page of fax does, a bomb of a few kilobytes does not."""
_FREE_SCANS, _MAX_SCANNED_PIXELS, _SCAN_BYTES = 20, 500_000_000, 10
"""Encoders write some ten scans; each of more costs as much as the image, so that many in a large one are refused. The head of
one has ten bytes: files too small for that many are not searched."""
_END_OF_JPEG = b"\xff\xd9"

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels of the upright picture; right and bottom are outside."""

_ORIENTATION = 0x0112  # EXIF tag
_MIRRORED_X, _MIRRORED_Y, _TURNED = (2, 3, 7, 8), (3, 4, 6, 7), (5, 6, 7, 8)
"""EXIF orientations whose stored pixels are to be mirrored left-right, then upside down, then have rows and columns swapped."""


class DecodeError(ValueError):
    """These bytes are not an image that can be read whole; the message is the reason, without a name."""


class Picture(Protocol):
    @property
    def size(self) -> tuple[int, int]:
        """(width, height), upright."""

    def crop(self, box: Box, at_least: tuple[int, int] | None = None) -> np.ndarray:
        """Pixels of the box, (h, w, 3) uint8 sRGB; a view that holds until the next crop of this thread.

        Args:
            at_least: (width, height) that the caller will resize to: where the box is at least twice as large, it may come
                at 1/2, 1/4 or 1/8 of its size, but never smaller than this. None = at full size.

        Raises:
            DecodeError: the image is cut short or damaged.
        """


class WholePicture:
    """A picture whose pixels are there."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels

    @property
    def size(self) -> tuple[int, int]:
        return self.pixels.shape[1], self.pixels.shape[0]

    def crop(self, box: Box, at_least: tuple[int, int] | None = None) -> np.ndarray:  # noqa: ARG002
        left, top, right, bottom = box
        return self.pixels[top:bottom, left:right]


class JpegPicture:
    """A JPEG whose header is read; its pixels are decoded crop by crop.

    The crop equals the same part of the whole decoded image bit for bit at full size. At a fraction it equals the crop of
    libjpeg's own scaled decoding, which is the inverse DCT of fewer coefficients: against averaging the full-size pixels it
    differs by a few units of 255 at edges.
    """

    def __init__(self, data: bytes, header: turbojpeg.Header, *, convert_icc: bool) -> None:
        self._data, self._header, self._convert_icc = data, header, convert_icc
        self._orientation, self._profile = _jpeg_metadata(data) if header.has_metadata else (1, None)
        width, height = header.width, header.height
        self.size = (height, width) if self._orientation in _TURNED else (width, height)

    def crop(self, box: Box, at_least: tuple[int, int] | None = None) -> np.ndarray:
        denominator = 1
        if at_least is not None:
            width, height = box[2] - box[0], box[3] - box[1]
            # One pixel to spare, because a box that is off the grid of the fraction is rounded to it.
            most = min(width // (at_least[0] + 1), height // (at_least[1] + 1))
            while denominator < 8 and 2 * denominator <= most:
                denominator *= 2
        pixels = turbojpeg.decode_box(self._data, self._header, self._stored(box), denominator)
        if pixels is None:  # damaged, or odd: Pillow has the last word on what can be read
            left, top, right, bottom = box
            return decode_image(self._data, convert_icc=self._convert_icc)[top:bottom, left:right]
        if self._profile is not None and self._convert_icc:
            pixels = _srgb_pixels(pixels, self._profile, gray=self._header.gray)
        return _upright(pixels, self._orientation)

    def _stored(self, box: Box) -> Box:
        """The box in the file's own pixels, before they are turned upright."""
        left, top, right, bottom = box
        orientation, width, height = self._orientation, self._header.width, self._header.height
        if orientation in _TURNED:
            left, top, right, bottom = top, left, bottom, right
        if orientation in _MIRRORED_X:
            left, right = width - right, width - left
        if orientation in _MIRRORED_Y:
            top, bottom = height - bottom, height - top
        return left, top, right, bottom


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    if orientation == 1:
        return pixels
    if orientation in _MIRRORED_X:
        pixels = pixels[:, ::-1]
    if orientation in _MIRRORED_Y:
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels.transpose(1, 0, 2) if orientation in _TURNED else pixels)


def _srgb_pixels(pixels: np.ndarray, profile: bytes, *, gray: bool) -> np.ndarray:
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(pixels[..., 0] if gray else pixels))
    return np.asarray(to_srgb(image, profile).convert("RGB"))


def open_picture(data: bytes, *, convert_icc: bool = True) -> Picture:
    """A picture from the bytes of an image file; of a JPEG only the header is read.

    Args:
        convert_icc: as of `decode_image`.
    Raises:
        DecodeError: as `decode_image`; what is wrong with a JPEG's pixels shows when they are cropped.
    """
    header = turbojpeg.read_header(data)
    if header is None:
        return WholePicture(decode_image(data, convert_icc=convert_icc))
    _refuse_large(header.width, header.height, data)
    return JpegPicture(data, header, convert_icc=convert_icc)


def _jpeg_metadata(data: bytes) -> tuple[int, bytes | None]:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=PILLOW_FORMATS) as opened:
            return _orientation(opened), opened.info.get("icc_profile")
    except Exception as error:
        raise DecodeError(_reason(error, data)) from error


def decode_image(data: bytes, *, convert_icc: bool = True) -> np.ndarray:
    """Pixels of an image as uint8 sRGB of shape (H, W, 3), upright (EXIF orientation applied), writable.

    Grayscale and 1-bit are repeated over the channels (1-bit: 0 and 255), 16-bit is scaled to 8, colours are brought to sRGB
    by the file's ICC profile where it has one, CMYK and YCbCr without a profile go through Pillow's conversion, and
    transparent pixels are laid on white, the ground that drawings and cut-outs are made for. The first frame of an
    animation counts.

    Args:
        convert_icc: False: an embedded profile is ignored, its numbers taken as sRGB, as torchvision, timm and TensorFlow do.
    Raises:
        DecodeError: not an image, cut short, damaged, too large, or with pixels that have no agreed range (float).
    """
    if not data:
        raise DecodeError("empty file")
    try:
        return _decoded(data, convert_icc)
    except (DecodeError, MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # Pillow's plugins raise SyntaxError, struct.error, IndexError and more on bad bytes
        mended = _mended(data)
        if mended is not None:
            return decode_image(mended, convert_icc=convert_icc)
        raise DecodeError(_reason(error, data)) from error


def _decoded(data: bytes, convert_icc: bool) -> np.ndarray:
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(data), formats=PILLOW_FORMATS) as opened:
        _refuse_large(opened.width, opened.height, data)
        opened.load()
        image: Image.Image = opened
        if _orientation(opened) != 1:
            image = ImageOps.exif_transpose(opened)
        return np.array(_to_rgb(image, convert_icc), dtype=np.uint8)


def _mended(data: bytes) -> bytes | None:
    """The same picture as Pillow takes it, where only what is not picture keeps it from that; None where it does not.

    A JPEG may lack its end mark: then all pixels are there, which a decoder that stops at every warning can tell. A PNG may
    carry more text than Pillow keeps.
    """
    if data.startswith(b"\x89PNG"):
        smaller = png_chunks.without_large_texts(data)
        return smaller if len(smaller) < len(data) else None
    if data.startswith(b"\xff\xd8") and not data.endswith(_END_OF_JPEG):
        whole = data + _END_OF_JPEG
        header = turbojpeg.read_header(whole)
        if header is not None and turbojpeg.decode_box(whole, header, (0, 0, header.width, header.height)) is not None:
            return whole
    return None


def _refuse_large(width: int, height: int, data: bytes) -> None:
    """DecodeError for an image whose pixels are out of all proportion, before they are decoded."""
    pixels = width * height
    if pixels > MAX_PIXELS:
        raise DecodeError(f"{width}x{height} pixels, more than the {MAX_PIXELS} allowed")
    if pixels > max(_FREE_PIXELS, _PIXELS_PER_BYTE * len(data)):
        raise DecodeError(f"{width}x{height} pixels in {len(data)} bytes, which no picture has")
    if len(data) // _SCAN_BYTES * pixels <= _MAX_SCANNED_PIXELS or not data.startswith(b"\xff\xd8"):
        return
    # Inside the pixels of a JPEG 0xFF is never followed by this mark; a thumbnail in the metadata adds one or a few.
    num_scans = data.count(b"\xff\xda")
    if num_scans > _FREE_SCANS and num_scans * pixels > _MAX_SCANNED_PIXELS:
        raise DecodeError(f"{num_scans} scans of {width}x{height} pixels, where encoders write about ten")


def _reason(error: Exception, data: bytes) -> str:
    """Why an image cannot be read, the same for the same bytes: without the addresses of objects."""
    if type(error).__name__ == "UnidentifiedImageError":
        what = other_file(data)
        return f"{what}, no image" if what else "no image of a format that is read"
    text = re.sub(r"<[^<>]* at 0x[0-9a-f]+>", "the file", str(error))
    return f"{type(error).__name__}: {' '.join(text.split())[:200]}"


def _orientation(image: Any) -> int:
    """The EXIF orientation, 1 (upright) where there is none or where it cannot be read."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a damaged EXIF block is no reason to lose the pixels
        return 1
    return value if value in range(1, 9) else 1


def _to_rgb(image: Any, convert_icc: bool) -> Any:
    from PIL import Image

    profile = image.info.get("icc_profile") if convert_icc else None
    if image.mode.startswith("I"):
        return Image.fromarray(_eight_bit(np.asarray(image))).convert("RGB")
    if image.mode == "F":
        raise DecodeError("floating-point pixels have no agreed range: convert the image to 8 or 16 bits")
    # Palette, 1-bit, grayscale and RGB images may name one colour (or one alpha a palette entry) as transparent.
    if image.mode in ("RGBA", "LA", "La", "RGBa", "PA") or "transparency" in image.info:
        layered = image.convert("RGBA")
        ground = Image.new("RGBA", layered.size, (255, 255, 255, 255))
        image = Image.alpha_composite(ground, layered).convert("RGB")
    elif image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("RGB")
    return to_srgb(image, profile).convert("RGB")


def _eight_bit(values: np.ndarray) -> np.ndarray:
    """16-bit samples scaled to 0..255 (65535 -> 255). Pillow gives 32-bit integers for some files of 8 and 16 bits."""
    if values.dtype.itemsize == 2:
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    wide = np.clip(values, 0, 65535)
    return (wide if wide.max() <= 255 else (wide + 128) // 257).astype(np.uint8)
