"""A crop that is decoded in part is the crop of the whole image, whatever the file."""

import io
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features
from torch.nn import functional as F

from pipeline.data.augment.counter_rng import Draws
from pipeline.data.augment.transforms import eval_image, mirror, resize_into, train_image
from pipeline.data.images import turbojpeg
from pipeline.data.images.decode import DecodeError, JpegPicture, WholePicture, decode_image, open_picture

PHOTO = np.asarray(
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (14, 17, 3), np.uint8)).resize((170, 140), Image.BICUBIC)
)
partial = pytest.mark.skipif(turbojpeg.library() is None, reason="no TurboJPEG 3 library: install the wheel turbojpeg")


def jpeg_bytes(pixels: np.ndarray = PHOTO, mode: str = "RGB", **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, "JPEG", **{"quality": 90, **options})
    return stream.getvalue()


def boxes(size: tuple[int, int], num: int) -> list[tuple[int, int, int, int]]:
    draws = Draws(*size)
    found = []
    for _ in range(num):
        left, top = draws.below(size[0]), draws.below(size[1])
        found.append((left, top, left + 1 + draws.below(size[0] - left), top + 1 + draws.below(size[1] - top)))
    return [*found, (0, 0, *size), (size[0] - 1, size[1] - 1, *size)]


def assert_crops_are_parts(data: bytes, num: int = 20) -> None:
    whole, picture = decode_image(data), open_picture(data)
    assert picture.size == (whole.shape[1], whole.shape[0])
    for left, top, right, bottom in boxes(picture.size, num):
        assert np.array_equal(picture.crop((left, top, right, bottom)), whole[top:bottom, left:right])


@partial
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_part_equals_the_part_of_the_whole(subsampling: str, progressive: bool) -> None:
    data = jpeg_bytes(subsampling=subsampling, progressive=progressive)
    assert isinstance(open_picture(data), JpegPicture)
    assert_crops_are_parts(data)


@partial
def test_parts_of_gray_tiny_and_restarted_images() -> None:
    assert_crops_are_parts(jpeg_bytes(mode="L"))
    assert_crops_are_parts(jpeg_bytes(PHOTO[:1, :1]), 1)
    assert_crops_are_parts(jpeg_bytes(PHOTO[:9, :33], restart_marker_blocks=1))


@partial
def test_parts_of_real_photos(real_data: Path) -> None:
    for name in ("caltech101", "clothing", "flowers"):
        with tarfile.open(real_data / f"{name}.tar") as tar:
            members = [m for m in tar.getmembers() if m.isfile()]
            for member in members[:: len(members) // 12]:
                data = tar.extractfile(member).read()  # type: ignore[union-attr]
                assert_crops_are_parts(data, 4)


@partial
@pytest.mark.parametrize("orientation", range(1, 9))
def test_parts_of_turned_images(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert_crops_are_parts(jpeg_bytes(exif=exif), 8)


@partial
@pytest.mark.parametrize("denominator", [2, 4, 8])
def test_a_large_crop_is_decoded_at_a_fraction_as_pillow_drafts_it(denominator: int) -> None:
    large = np.asarray(Image.fromarray(PHOTO).resize((1040, 880), Image.BICUBIC))
    data = jpeg_bytes(large)
    drafted = Image.open(io.BytesIO(data))
    drafted.draft("RGB", (1040 // denominator, 880 // denominator))
    target = 880 // denominator - 2
    picture = open_picture(data)
    assert np.array_equal(picture.crop((0, 0, 1040, 880), (target, target)), np.asarray(drafted))
    # Against the full decode the same input to the network comes out, but for a few units at edges.
    outs = [torch.empty((64, 64, 3), dtype=torch.uint8) for _ in range(2)]
    resize_into(outs[0], picture.crop((80, 160, 960, 880), (64, 64)))
    resize_into(outs[1], decode_image(data)[160:880, 80:960])
    assert (outs[0].float() - outs[1].float()).abs().mean() < 2.0


@partial
@pytest.mark.parametrize("at_least", [1, 30, 64, 100, 139])
def test_a_fraction_is_never_smaller_than_what_is_asked_for(at_least: int) -> None:
    picture = open_picture(jpeg_bytes())
    for left, top, right, bottom in boxes(picture.size, 40):
        height, width, _ = picture.crop((left, top, right, bottom), (at_least, at_least)).shape
        assert width >= min(at_least, right - left) and height >= min(at_least, bottom - top)


@partial
def test_the_header_says_no_to_what_is_pillows_work() -> None:
    stream = io.BytesIO()
    Image.fromarray(PHOTO).convert("CMYK").save(stream, "JPEG")
    assert turbojpeg.read_header(stream.getvalue()) is None and turbojpeg.read_header(b"\xff\xd8junk") is None
    assert isinstance(open_picture(stream.getvalue()), WholePicture)


@partial
def test_a_cut_or_damaged_file_is_an_error_where_the_crop_needs_it() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    data = jpeg_bytes(noise)
    picture = open_picture(data[: len(data) // 2])
    with pytest.raises(DecodeError):
        picture.crop((0, 200, 256, 256))
    with pytest.raises(DecodeError):
        open_picture(data[:300]).crop((0, 0, 8, 8))


@partial
def test_a_broken_file_does_not_spoil_the_next() -> None:
    good = jpeg_bytes()
    for broken in (b"\xff\xd8junk", good[:300], good[: len(good) // 2]):
        header = turbojpeg.read_header(broken)
        if header is not None:
            assert turbojpeg.decode_box(broken, header, (0, 130, 170, 140)) is None
        assert_crops_are_parts(good, 2)


@partial
def test_too_many_pixels_are_refused_by_the_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data.images.decode.MAX_PIXELS", 100)
    with pytest.raises(DecodeError, match="170x140 pixels"):
        open_picture(jpeg_bytes())


def test_without_the_library_the_pixels_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    data, at = jpeg_bytes(), (20, 10, 120, 100)
    found = open_picture(data).crop(at).copy()
    monkeypatch.setattr(turbojpeg, "_decoder", lambda: None)
    assert isinstance(open_picture(data), WholePicture)
    assert np.array_equal(open_picture(data).crop(at), found)


def linear_profile(space: bytes = b"RGB ") -> bytes:
    """An ICC v2 profile with sRGB's primaries (or gray) and no curve: the numbers are amounts of light."""

    def fixed(*values: float) -> bytes:
        return b"".join(struct.pack(">i", round(v * 65536)) for v in values)

    curve = b"curv" + bytes(4) + struct.pack(">I", 0)
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", 7) + b"linear\0" + bytes(78),
        b"cprt": b"text" + bytes(4) + b"none\0",
        b"wtpt": b"XYZ " + bytes(4) + fixed(0.9642, 1, 0.8249),
    }
    if space == b"GRAY":
        tags[b"kTRC"] = curve
    else:
        for name, xyz in (
            ("r", (0.4360, 0.2225, 0.0139)),
            ("g", (0.3851, 0.7169, 0.0971)),
            ("b", (0.1431, 0.0606, 0.7141)),
        ):
            tags[name.encode() + b"XYZ"] = b"XYZ " + bytes(4) + fixed(*xyz)
            tags[name.encode() + b"TRC"] = curve
    table, body = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    head = struct.pack(">I4sI4s4s4s", start + len(body), b"test", 0x02100000, b"mntr", space, b"XYZ ")
    return (head + bytes(12) + b"acsp" + bytes(28) + fixed(0.9642, 1, 0.8249)).ljust(128, b"\0") + table + body


@pytest.mark.skipif(not features.check("littlecms2"), reason="this Pillow has no colour management")
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_profile_is_brought_to_srgb(kind: str, mode: str) -> None:
    image = Image.new("RGB", (16, 16), (55, 55, 55)).convert(mode)
    stream = io.BytesIO()
    image.save(stream, kind, icc_profile=linear_profile(b"RGB " if mode == "RGB" else b"GRAY"))
    expected = 255 * (1.055 * (55 / 255) ** (1 / 2.4) - 0.055)  # IEC 61966-2-1: 128
    for pixels in (decode_image(stream.getvalue()), open_picture(stream.getvalue()).crop((3, 3, 9, 9))):
        assert np.abs(pixels.astype(float) - expected).max() <= 2


def test_a_profile_that_is_srgb_or_broken_changes_nothing() -> None:
    from PIL import ImageCms

    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    plain = decode_image(jpeg_bytes())
    for profile in (srgb, b"broken", linear_profile(b"GRAY")):
        data = jpeg_bytes(icc_profile=profile)
        assert np.array_equal(decode_image(data), plain)
        assert np.array_equal(open_picture(data).crop((0, 0, 170, 140)), plain)


def test_inverted_cmyk_of_adobe_comes_out_right() -> None:
    stream = io.BytesIO()
    Image.new("CMYK", (16, 16), (0, 0, 0, 0)).save(stream, "JPEG", quality=100)  # Pillow writes Adobe's marker
    assert b"Adobe" in stream.getvalue() and decode_image(stream.getvalue()).min() == 255


@pytest.mark.parametrize("size", [(140, 170), (300, 200), (224, 224), (60, 500)])
def test_resizing_is_pillows_bicubic(size: tuple[int, int]) -> None:
    pixels = np.array(Image.fromarray(PHOTO).resize(size, Image.BICUBIC))
    out = torch.empty((224, 224, 3), dtype=torch.uint8)
    resize_into(out, pixels)
    expected = np.asarray(Image.fromarray(pixels).resize((224, 224), Image.BICUBIC)).astype(int)
    difference = np.abs(out.numpy().astype(int) - expected)
    assert difference.mean() < 0.1 and np.quantile(difference, 0.999) <= 2
    plain = F.interpolate(
        torch.from_numpy(pixels).permute(2, 0, 1)[None], size=(224, 224), mode="bicubic", antialias=True
    )
    assert torch.equal(out, plain[0].permute(1, 2, 0))
    mirror(out)
    assert torch.equal(out, plain[0].permute(1, 2, 0).flip(1))


@partial
def test_a_3024_px_photo_turned_in_exif(real_data: Path) -> None:
    from pipeline.data.augment.augment_config import AugmentConfig

    with tarfile.open(real_data / "signdigits.tar") as tar:
        data = tar.extractfile("train/7/IMG_5935.JPG").read()  # type: ignore[union-attr]
    picture, whole = open_picture(data), decode_image(data)
    left, top, right, bottom = box = (100, 700, 2900, 3000)
    assert np.array_equal(picture.crop(box), whole[top:bottom, left:right])
    assert picture.crop(box, (224, 224)).shape == (287, 350, 3)
    config = AugmentConfig(image_px=64)
    parts, from_whole = (train_image(p, config, Draws(3)).astype(float) for p in (picture, whole))
    assert np.abs(parts - from_whole).mean() < 2
    assert np.array_equal(eval_image(picture, config), eval_image(whole, config))
