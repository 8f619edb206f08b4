"""Which files are images, which are not, and what is said of those; and that no image takes time or memory out of proportion."""

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from pipeline.data.images import turbojpeg
from pipeline.data.images.decode import DecodeError, decode_image, open_picture
from pipeline.data.images.formats import ENDINGS, FORMATS, ending_of, has_image_ending
from tests.fuzzing import fuzz, mutants

PIXELS = np.random.default_rng(0).integers(0, 255, (40, 56, 3), np.uint8)


def image_bytes(kind, pixels=PIXELS, **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def png_chunk(kind, content):
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


def with_chunk(kind, content):
    data = image_bytes("PNG")
    return data[:33] + png_chunk(kind, content) + data[33:]


@pytest.mark.parametrize("entry", FORMATS, ids=lambda entry: entry.pillow)
def test_every_format_is_read_and_known_by_its_first_bytes(entry):
    data = image_bytes(entry.pillow)
    assert decode_image(data).shape == PIXELS.shape and ending_of(data) == entry.endings[0]
    assert has_image_ending(f"a.b/photo.{entry.endings[-1].upper()}") and not has_image_ending(entry.endings[0])


def test_no_other_plugin_of_pillow_is_opened():
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    with pytest.raises(DecodeError, match="a PostScript file, no image"):  # Pillow would start Ghostscript
        decode_image(data)
    assert "eps" not in ENDINGS and "svg" not in ENDINGS


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"<!DOCTYPE html><html>404", "an HTML page, no image"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a pointer of Git LFS"),
        (b"\0\0\0\x18ftypheic" + bytes(40), "a HEIC image"),
        (b"no image at all", "no image of a format that is read"),
        (image_bytes("PNG")[:200], "."),
        (image_bytes("TIFF")[:90], "."),
    ],
)
def test_reasons_say_what_it_is_and_never_where_it_lay_in_memory(data, reason):
    with pytest.raises(DecodeError, match=reason) as first:
        decode_image(data)
    assert "0x" not in str(first.value) and "BytesIO" not in str(first.value)


@pytest.mark.skipif(turbojpeg.library() is None, reason="no TurboJPEG 3 here")
@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_a_jpeg_without_its_end_mark_is_the_same_picture(options):
    data = image_bytes("JPEG", **options)
    assert np.array_equal(decode_image(data[:-2]), decode_image(data))
    assert np.array_equal(open_picture(data[:-2]).crop((0, 0, 56, 40)), decode_image(data))
    for cut in (10, len(data) // 2):
        with pytest.raises(DecodeError):
            decode_image(data[:-cut])


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        (b"tEXt", b"Comment\0" + b"x" * (65 << 20)),
        (b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2 << 20))),
        (b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(bytes(2 << 20))),
        (b"iCCP", b"profile\0\0" + zlib.compress(bytes(2 << 20))),
    ],
)
def test_a_png_with_large_texts_is_an_image(kind, content):
    assert np.array_equal(decode_image(with_chunk(kind, content)), PIXELS)


def test_pixels_and_scans_out_of_proportion_are_refused_before_they_are_decoded():
    flat = image_bytes("GIF", np.zeros((9000, 9000), np.uint8))
    small = flat[:6] + (9400).to_bytes(2, "little") * 2 + flat[10:2000]
    with pytest.raises(DecodeError, match="which no picture has"):
        decode_image(small)
    data = image_bytes("JPEG", np.zeros((3000, 3000), np.uint8), progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    many = data[:-2] + last * 600 + data[-2:]
    for read in (decode_image, open_picture):
        with pytest.raises(DecodeError, match="scans of 3000x3000"):
            read(many)


SEEDS = [image_bytes(entry.pillow) for entry in FORMATS] + [
    image_bytes("JPEG", progressive=True),
    image_bytes("PNG", PIXELS[..., 0]),
    image_bytes("TIFF", compression="tiff_lzw"),
    image_bytes("TIFF", compression="jpeg"),
    image_bytes("GIF", PIXELS[..., 0]),
]


def _decode(data):
    decode_image(data)
    open_picture(data).crop((3, 5, 30, 20), (8, 8))


@pytest.mark.parametrize("num", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mutated_images_are_read_or_refused(tmp_path, num):
    counts = fuzz(_decode, mutants(SEEDS, num), tmp_path, refusals=(DecodeError,))
    assert counts["read"] > num / 20 and counts["refused"] > num / 20
