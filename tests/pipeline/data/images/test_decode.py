"""Decoding: every mode comes out as upright uint8 RGB with the right values."""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.images import decode
from pipeline.data.images.decode import DecodeError, decode_image

DATA = Path(os.environ.get("NORMFREE_TEST_DATA", Path(__file__).resolve().parents[5] / "shared" / "data"))


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def palette_with_hole():
    image = Image.new("P", (3, 2), 1)
    image.putpalette([255, 0, 0, 10, 20, 30])
    image.putpixel((0, 0), 0)
    return encoded(image, transparency=0)


CASES = {
    "1-bit": (encoded(Image.new("1", (3, 2), 1)), (255, 255, 255)),
    "L": (encoded(Image.new("L", (3, 2), 77)), (77, 77, 77)),
    "LA, half seen": (encoded(Image.new("LA", (3, 2), (0, 128))), (127, 127, 127)),
    "P": (encoded(Image.new("RGB", (3, 2), (10, 20, 30)).convert("P", palette=Image.Palette.ADAPTIVE)), (10, 20, 30)),
    "P, one colour clear": (palette_with_hole(), (10, 20, 30)),
    "RGB": (encoded(Image.new("RGB", (3, 2), (1, 2, 3))), (1, 2, 3)),
    "RGBA, not seen": (encoded(Image.new("RGBA", (3, 2), (1, 2, 3, 0))), (255, 255, 255)),
    "RGBA, seen": (encoded(Image.new("RGBA", (3, 2), (1, 2, 3, 255))), (1, 2, 3)),
    "CMYK": (encoded(Image.new("CMYK", (3, 2), (0, 0, 0, 255)), "JPEG", quality=100), (0, 0, 0)),
    "16-bit": (encoded(Image.fromarray(np.full((2, 3), 32896, np.uint16))), (128, 128, 128)),
    "16-bit, white": (encoded(Image.fromarray(np.full((2, 3), 65535, np.uint16))), (255, 255, 255)),
    "16-bit TIFF": (encoded(Image.fromarray(np.full((2, 3), 257, np.uint16)), "TIFF"), (1, 1, 1)),
    "GIF": (encoded(Image.new("L", (3, 2), 9), "GIF"), (9, 9, 9)),
    "WebP": (encoded(Image.new("RGB", (3, 2), (255, 255, 255)), "WEBP", lossless=True), (255, 255, 255)),
    "BMP": (encoded(Image.new("RGB", (3, 2), (4, 5, 6)), "BMP"), (4, 5, 6)),
}


@pytest.mark.parametrize("name", CASES)
def test_modes(name):
    data, expected = CASES[name]
    pixels = decode_image(data)
    assert pixels.shape == (2, 3, 3) and pixels.dtype == np.uint8 and pixels.flags.writeable
    assert pixels[1, 2].tolist() == list(expected)


def test_transparent_palette_colour_is_white():
    assert decode_image(palette_with_hole())[0, 0].tolist() == [255, 255, 255]


def test_one_pixel():
    assert decode_image(encoded(Image.new("RGB", (1, 1), (5, 6, 7)))).tolist() == [[[5, 6, 7]]]


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_every_exif_orientation_comes_out_upright(kind):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :8] = 255  # a white corner at the top left
    # What is stored for orientation o is the upright image under the inverse of what a viewer does with o.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }
    for orientation, pixels in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encoded(
            Image.fromarray(np.ascontiguousarray(pixels)),
            kind,
            exif=exif,
            **({"quality": 95} if kind == "JPEG" else {}),
        )
        assert np.abs(decode_image(data).astype(int) - upright).max() < 10, orientation


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
NOISY = {kind: encoded(NOISE, kind) for kind in ("JPEG", "PNG")}


@pytest.mark.parametrize(
    "data", [b"", b"not an image", b"\x89PNG\r\n\x1a\n", NOISY["JPEG"][:-400], NOISY["PNG"][:-400]]
)
def test_what_cannot_be_read_whole_is_an_error(data):
    with pytest.raises(DecodeError):
        decode_image(data)


def test_too_many_pixels_are_refused_before_they_are_decoded(monkeypatch):
    with pytest.raises(DecodeError):  # 20,000 x 20,000 in a few kilobytes
        decode_image(encoded(Image.new("1", (20_000, 20_000))))
    monkeypatch.setattr(decode, "MAX_PIXELS", 5)
    with pytest.raises(DecodeError, match="3x2 pixels"):
        decode_image(CASES["RGB"][0])


def test_float_pixels_are_refused():
    with pytest.raises(DecodeError, match="floating-point"):
        decode_image(encoded(Image.fromarray(np.ones((2, 3), np.float32)), "TIFF"))


@pytest.mark.skipif(not (DATA / "signdigits.tar").is_file(), reason=f"no test data in {DATA} (set NORMFREE_TEST_DATA)")
def test_the_large_rotated_photo():
    with tarfile.open(DATA / "signdigits.tar") as tar:
        data = tar.extractfile("train/7/IMG_5935.JPG").read()
    pixels = decode_image(data)
    assert pixels.shape == (3024, 3024, 3)
    with Image.open(io.BytesIO(data)) as raw:
        turned = np.rot90(np.asarray(raw), -1)  # orientation 6: turned clockwise to be seen
    assert np.abs(pixels.astype(int) - turned).mean() < 3  # its colours go through the camera's profile
