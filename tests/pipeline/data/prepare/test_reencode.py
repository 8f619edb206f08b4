"""Re-encoding at writing: sizes are bounded, small images keep their bytes, and the quality is the one asked for."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from pipeline.data.images.decode import decode_image
from pipeline.data.prepare.prepare import prepare
from pipeline.data.prepare.reencode import Reencode
from pipeline.data.sources.cards import load_card
from pipeline.data.verify.verify import verify
from pipeline.errors import UserError


def encoded(width, height, kind="JPEG", **options):
    ramp = np.add.outer(np.linspace(0, 120, height), np.linspace(0, 120, width))
    buffer = io.BytesIO()
    Image.fromarray(np.repeat(ramp[..., None], 3, axis=2).astype(np.uint8)).save(buffer, kind, **options)
    return buffer.getvalue()


def applied(data, **options):
    content, extension, pixels = Reencode(**options).apply(data, "png", decode_image(data))
    return content, extension, pixels


@pytest.mark.parametrize(
    ("options", "size", "expected"),
    [
        ({"shortest_px": 32}, (100, 50), (64, 32)),
        ({"longest_px": 32}, (100, 50), (32, 16)),
        ({"longest_px": 32}, (50, 100), (16, 32)),
        ({"shortest_px": 32}, (1000, 33), (970, 32)),
    ],
)
def test_the_side_is_as_asked_and_the_picture_the_same(options, size, expected):
    data = encoded(*size, "PNG")
    content, extension, pixels = applied(data, **options)
    assert Image.open(io.BytesIO(content)).size == expected == pixels.shape[1::-1] and extension == "jpg"
    again = np.asarray(Image.fromarray(decode_image(content)).resize(size, Image.Resampling.BILINEAR), dtype=float)
    assert np.abs(again - decode_image(data)).mean() < 2


def test_small_images_keep_their_bytes_and_nothing_is_scaled_up():
    data = encoded(30, 20, "PNG")
    assert applied(data, shortest_px=32)[0] == applied(data, longest_px=32)[0] == data
    assert Image.open(io.BytesIO(applied(data, longest_px=64, jpeg_quality=80)[0])).size == (30, 20)


@pytest.mark.parametrize("quality", [30, 90])
def test_the_quality_is_pillows(quality):
    data = encoded(64, 48, "PNG")
    content, *_ = applied(data, jpeg_quality=quality)
    assert (
        Image.open(io.BytesIO(content)).quantization
        == Image.open(io.BytesIO(encoded(64, 48, quality=quality))).quantization
    )


@pytest.mark.parametrize(
    "options",
    [
        {"shortest_px": 4},
        {"longest_px": 0},
        {"jpeg_quality": 0},
        {"jpeg_quality": 101},
        {"shortest_px": 64, "longest_px": 64},
    ],
)
def test_nonsense_is_refused(options):
    with pytest.raises(UserError):
        Reencode(**options)


def test_real_photographs_in_shards(real_data, tmp_path):
    """With their EXIF orientation (signdigits has one photograph of 3024 px on its side), and cut into shards by size."""
    with tarfile.open(real_data / "signdigits.tar") as tar, tarfile.open(tmp_path / "some.tar", "w") as some:
        for number, member in enumerate(tar):
            if member.isreg() and (number % 8 == 0 or "IMG_5935" in member.name):
                some.addfile(member, tar.extractfile(member))
    out = str(tmp_path / "out")
    options = {"reencode": Reencode(longest_px=64, jpeg_quality=75), "shard_bytes": 64 << 10}
    manifest = prepare(load_card("images"), out, source=str(tmp_path / "some.tar"), **options)
    assert verify(out).problems == () and manifest.recipe["reencode"]["jpeg_quality"] == 75
    sizes = [shard.size_bytes for shard in manifest.split("train").shards]
    assert len(sizes) > 2 and max(sizes) < 1.5 * (64 << 10)
    with pytest.raises(UserError, match="prepared otherwise"):
        prepare(load_card("images"), out, source=str(tmp_path / "some.tar"))
