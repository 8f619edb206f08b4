"""A part of a JPEG, decoded at a fraction of its size if asked, without decoding the rest: libjpeg-turbo's TurboJPEG 3 API.

Only the blocks of the part go through the inverse DCT, upsampling and colour conversion; the rows above it are entropy
decoded and dropped. That is what TensorFlow's decode_and_crop_jpeg did for the published NFNet runs. No Python package of
libjpeg-turbo offers it, so its C interface is called here: from the wheel `turbojpeg`, which carries the library, or from
the system's. Where there is neither (`library()` is None, and the plan of a run says so) Pillow decodes the whole image and
the crop is cut out of it: the same pixels where nothing is scaled, nearly the same where it is, and later.
"""

import ctypes
import ctypes.util
import functools
import importlib.metadata
import re
import threading
from typing import NamedTuple

import numpy as np

_INIT_DECOMPRESS = 1
_PIXELS_RGB = 0
_STOP_ON_WARNING, _SCAN_LIMIT = 0, 13
_MAX_SCANS = 500  # a progressive image of a few kilobytes can hold thousands, each as dear as an image
_MARGIN = 2
"""Columns decoded next to the part: chroma upsampling looks at its neighbours, and the part shall not show its edge."""
_SCRATCH_BYTES = 16 << 20
_METADATA = {0xE1: b"Exif\0\0", 0xE2: b"ICC_PROFILE\0"}
_LOOKED_AT = {0xDA, 0xC0, 0xC1, 0xC2, *_METADATA}
"""Segments: the pixels, frames, metadata."""


class Header(NamedTuple):
    """What the segments before the pixels say."""

    width: int
    height: int
    gray: bool
    block_width: int
    """Width of the smallest part that can be skipped, 8 to 32 pixels."""
    has_metadata: bool
    """There is EXIF (how the pixels are to be turned) or an ICC profile (what their numbers mean)."""


class _Region(ctypes.Structure):
    _fields_ = (("x", ctypes.c_int), ("y", ctypes.c_int), ("w", ctypes.c_int), ("h", ctypes.c_int))


class _Scale(ctypes.Structure):
    _fields_ = (("numerator", ctypes.c_int), ("denominator", ctypes.c_int))


@functools.cache
def library() -> str | None:
    """Path of the TurboJPEG 3 library in use, None where there is none."""
    found = _in_wheel() or ctypes.util.find_library("turbojpeg")
    if found is None:
        return None
    try:
        return found if hasattr(ctypes.CDLL(found), "tj3SetCroppingRegion") else None  # 2.x cannot crop
    except OSError:
        return None


def _in_wheel() -> str | None:
    try:
        files = importlib.metadata.files("turbojpeg") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    named = (f for f in files if re.match(r"(lib)?turbojpeg-?\w*\.(so[.\d]*|\d*\.?\d*\.?\d*\.?dylib|dll)$", f.name))
    return next((str(f.locate()) for f in named), None)


class _Decoder:
    """One thread's TurboJPEG instance and the buffer that it decodes into."""

    def __init__(self, path: str) -> None:
        tj = ctypes.CDLL(path)
        tj.tj3Init.restype = ctypes.c_void_p
        pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
        tj.tj3Set.argtypes = (pointer, number, number)
        tj.tj3DecompressHeader.argtypes = (pointer, ctypes.c_char_p, size)
        tj.tj3SetScalingFactor.argtypes = (pointer, _Scale)
        tj.tj3SetCroppingRegion.argtypes = (pointer, _Region)
        tj.tj3Decompress8.argtypes = (pointer, ctypes.c_char_p, size, pointer, number, number)
        tj.tj3Destroy.argtypes = (pointer,)
        self._tj, self._handle = tj, None
        self._make_room(0)
        self._renew()

    def _make_room(self, num_bytes: int) -> None:
        self._scratch = np.empty(num_bytes, np.uint8)
        self._address = self._scratch.ctypes.data

    def _renew(self) -> None:
        """A new instance: one that has failed may refuse every file that comes after (seen in 2.1.92)."""
        if self._handle is not None:
            self._tj.tj3Destroy(self._handle)
        self._handle = self._tj.tj3Init(_INIT_DECOMPRESS)
        self._tj.tj3Set(self._handle, _STOP_ON_WARNING, 1)
        self._tj.tj3Set(self._handle, _SCAN_LIMIT, _MAX_SCANS)

    def decode(self, data: bytes, region: _Region, denominator: int) -> np.ndarray | None:
        tj, handle = self._tj, self._handle
        num_bytes = region.w * region.h * 3
        if num_bytes > self._scratch.size:
            self._make_room(num_bytes)
        pixels = self._scratch[:num_bytes].reshape(region.h, region.w, 3)
        failed = (
            tj.tj3DecompressHeader(handle, data, len(data))
            or tj.tj3SetScalingFactor(handle, _Scale(1, denominator))
            or tj.tj3SetCroppingRegion(handle, region)
            or tj.tj3Decompress8(handle, data, len(data), self._address, 0, _PIXELS_RGB)
        )
        if failed:
            self._renew()
        if self._scratch.size > _SCRATCH_BYTES:
            self._make_room(0)  # `pixels` keeps its memory alive
        return None if failed else pixels


class _Decoders(threading.local):
    decoder: _Decoder | None = None


_DECODERS = _Decoders()


def _decoder() -> _Decoder | None:
    if _DECODERS.decoder is None:
        path = library()
        _DECODERS.decoder = _Decoder(path) if path else None
    return _DECODERS.decoder


def read_header(data: bytes) -> Header | None:
    """Size and kind of an 8-bit gray or three-channel JPEG; None for all else, which is Pillow's work.

    Read here and not by the library, because a dozen calls through ctypes cost more than this walk.
    """
    if data[:2] != b"\xff\xd8" or _decoder() is None:
        return None
    at, last, frame, has_metadata = 2, len(data) - 4, b"", False
    while at <= last:
        mark, kind, high, low = data[at : at + 4]
        if mark != 0xFF:
            return None
        end = at + 2 + (high << 8 | low)
        if kind in _LOOKED_AT:
            if kind == 0xDA:  # the pixels begin
                return _header(frame, has_metadata)
            if kind in _METADATA:
                has_metadata = has_metadata or data.startswith(_METADATA[kind], at + 4)
            else:
                frame = data[at + 4 : end]
        at = end
    return None  # cut short, or padded in a way that the library may understand


def _header(frame: bytes, has_metadata: bool) -> Header | None:
    """From the frame segment: precision, height, width, channels, then (name, sampling, table) of each."""
    if len(frame) < 9 or frame[0] != 8 or frame[5] not in (1, 3) or len(frame) < 6 + 3 * frame[5]:
        return None
    height, width, gray = frame[1] << 8 | frame[2], frame[3] << 8 | frame[4], frame[5] == 1
    if not (width and height):
        return None
    # One channel is stored block by block, whatever sampling it states.
    block_width = 8 if gray else 8 * max(frame[7] >> 4, frame[10] >> 4, frame[13] >> 4)
    return Header(width, height, gray, block_width, has_metadata)


def decode_box(data: bytes, header: Header, box: tuple[int, int, int, int], denominator: int = 1) -> np.ndarray | None:
    """Pixels (h, w, 3) uint8 RGB of a box (left, top, right, bottom) of the image at 1, 1/2, 1/4 or 1/8 of its size.

    Args:
        box: in pixels of the whole image; at a fraction it is rounded to the nearest.

    Returns:
        A view that holds until this thread's next call; None where the data are damaged or not for this decoder.
    """
    decoder = _decoder()
    if decoder is None:
        return None
    width, height = (-(-side // denominator) for side in (header.width, header.height))
    left, top, right, bottom = ((v + denominator // 2) // denominator for v in box)
    right, bottom = min(max(right, left + 1), width), min(max(bottom, top + 1), height)
    left, top = min(left, right - 1), min(top, bottom - 1)
    step = max(1, header.block_width // denominator)
    first = max(0, left - _MARGIN) // step * step
    last = min(width, right + _MARGIN)
    pixels = decoder.decode(data, _Region(first, top, last - first, bottom - top), denominator)
    return None if pixels is None else pixels[:, left - first : right - first]
