"""ImageNet-C's corruptions against its formulas, written a second time in the plainest way."""

import colorsys
import io

import numpy as np
import pytest
from PIL import Image

from pipeline.data.augment.corruptions import CORRUPTIONS, NOT_OFFERED, SEVERITIES, corrupt

SIDE = 64


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    rng = np.random.default_rng(0)
    rough = rng.random((8, 8, 3)) * 255
    return np.asarray(Image.fromarray(rough.astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def test_the_published_fifteen_are_offered_or_named() -> None:
    assert len(CORRUPTIONS) + len(NOT_OFFERED) == 15 and not set(CORRUPTIONS) & set(NOT_OFFERED)
    for name, corruption in CORRUPTIONS.items():
        assert len(corruption.constants) == len(SEVERITIES) == 5 and 0.5 < corruption.alexnet < 0.95, name


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_each_is_a_pure_function_and_does_something(name: str, image: np.ndarray) -> None:
    for severity in (1, 5):
        found = corrupt(name, severity, image, 3)
        assert found.shape == image.shape and found.dtype == np.uint8
        assert np.array_equal(found, corrupt(name, severity, image, 3)) and not np.array_equal(found, image)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_noises_have_their_moments(severity: int) -> None:
    grey = np.full((200, 200, 3), 128, np.uint8)
    x = 128 / 255
    small = CORRUPTIONS["gaussian_noise"].constants[severity - 1]
    drawn = np.clip(x + np.random.default_rng(1).normal(scale=small, size=10**6), 0, 1)
    assert corrupt("gaussian_noise", severity, grey, 0).std() / 255 == pytest.approx(drawn.std(), rel=0.02)
    photons = (60, 25, 12, 5, 3)[severity - 1]
    drawn = np.clip(np.random.default_rng(2).poisson(x * photons, 10**6) / photons, 0, 1)
    assert corrupt("shot_noise", severity, grey, 0).mean() / 255 == pytest.approx(drawn.mean(), rel=0.02)
    pixels = corrupt("impulse_noise", severity, grey, 0)
    share = (0.03, 0.06, 0.09, 0.17, 0.27)[severity - 1]
    assert (pixels == 0).mean() == pytest.approx(share / 2, rel=0.1) == (pixels == 255).mean()


def test_brightness_equals_colorsys(image: np.ndarray) -> None:
    found = corrupt("brightness", 2, image, 0)
    for y, x in ((0, 0), (10, 50), (63, 31), (40, 2)):
        hue, saturation, value = colorsys.rgb_to_hsv(*(image[y, x] / 255))
        wanted = np.array(colorsys.hsv_to_rgb(hue, saturation, min(1.0, value + 0.2))) * 255
        assert np.abs(found[y, x] - wanted).max() <= 1
    assert corrupt("brightness", 5, np.zeros_like(image), 0).tolist()[0][0] == [127] * 3


def test_contrast_pixelate_and_jpeg_equal_their_formulas(image: np.ndarray) -> None:
    mean = image.reshape(-1, 3).mean(0)
    assert np.abs(corrupt("contrast", 3, image, 0) - ((image - mean) * 0.2 + mean)).max() <= 1
    small = Image.fromarray(image).resize((int(SIDE * 0.4), int(SIDE * 0.4)), Image.Resampling.BOX)
    wanted = np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BOX))
    assert np.abs(corrupt("pixelate", 3, image, 0).astype(int) - wanted).max() <= 1
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=7)
    assert np.abs(corrupt("jpeg_compression", 5, image, 0).astype(int) - np.asarray(Image.open(stream))).max() <= 1


def test_blurs_keep_what_is_even_and_spread_a_point_by_their_size() -> None:
    even, point = np.full((SIDE, SIDE, 3), 90, np.uint8), np.zeros((SIDE, SIDE, 3), np.uint8)
    point[32, 32] = 255
    for name in ("defocus_blur", "glass_blur", "zoom_blur", "elastic_transform"):
        assert np.abs(corrupt(name, 4, even, 0).astype(int) - 90).max() <= 1, name
    # A disk of radius 3 holds 29 pixels (Gauss's circle problem), and an edge that is softened by a sigma of 0.1, which is none.
    spread = corrupt("defocus_blur", 1, point, 0)[..., 0]
    assert (spread > 0).sum() == 29 and set(np.unique(spread)) == {0, int(255 / 29)}


def test_fog_whitens_and_never_darkens_below_its_own_scale(image: np.ndarray) -> None:
    x, found = image / 255, corrupt("fog", 1, image, 0) / 255
    brightest = x.max()
    low, high = x * brightest / (brightest + 1.5), (x + 1.5) * brightest / (brightest + 1.5)
    assert (found >= low - 0.01).all() and (found <= np.minimum(high, 1) + 0.01).all()
    assert found.std() > 0.02
