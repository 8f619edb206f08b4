"""Image operations against Pillow's and torchvision's own, and the published strengths by hand."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from scipy import stats
from timm.data import auto_augment as timm_ops
from torchvision.transforms import InterpolationMode, autoaugment

from pipeline.data.augment.counter_rng import Draws
from pipeline.data.augment.image_ops import Canvas
from pipeline.data.augment.randaugment import CLASSIC, NFNET, rand_augment, three_augment

NOISE = np.random.default_rng(0).integers(0, 256, (96, 80, 3), np.uint8)
PHOTO = np.array(Image.fromarray(np.random.default_rng(1).integers(30, 220, (9, 8, 3), np.uint8)).resize((80, 96), 3))
FLAT = np.full((96, 80, 3), 77, np.uint8)
IMAGES = {"noise": NOISE, "photo": PHOTO, "flat": FLAT, "one pixel": NOISE[:1, :1]}


def drawn(pixels: np.ndarray, *steps: Callable[[Canvas], None]) -> np.ndarray:
    canvas = Canvas(pixels)
    for step in steps:
        step(canvas)
    return canvas.pixels()


def one(operations: dict, name: str, pixels: np.ndarray, magnitude: float, seed: int = 0) -> np.ndarray:
    return drawn(pixels, lambda c: operations[name](c, magnitude, Draws(seed)))


@pytest.mark.parametrize("pixels", IMAGES.values(), ids=IMAGES)
def test_operations_equal_pillows_bit_for_bit(pixels: np.ndarray) -> None:
    image = Image.fromarray(pixels)
    cases: list[tuple[Callable[[Canvas], None], Image.Image]] = [
        (Canvas.autocontrast, ImageOps.autocontrast(image)),
        (Canvas.equalize, ImageOps.equalize(image)),
        (Canvas.invert, ImageOps.invert(image)),
        (Canvas.grayscale, ImageOps.grayscale(image).convert("RGB")),
        *((lambda c, b=b: c.posterize(b), ImageOps.posterize(image, b)) for b in range(1, 9)),
        *((lambda c, t=t: c.solarize(t), ImageOps.solarize(image, t)) for t in (0, 1, 128, 255, 256)),
        *((lambda c, a=a: c.solarize_add(a), timm_ops.solarize_add(image, a)) for a in (0, 55, 110, 165)),
    ]
    for factor in (0.0, 0.1, 0.37, 1.0, 1.9, 2.8):
        cases += [
            (lambda c, f=factor: c.color(f), ImageEnhance.Color(image).enhance(factor)),
            (lambda c, f=factor: c.contrast(f), ImageEnhance.Contrast(image).enhance(factor)),
            (lambda c, f=factor: c.towards(0, f), ImageEnhance.Brightness(image).enhance(factor)),
            (lambda c, f=factor: c.sharpness(f), ImageEnhance.Sharpness(image).enhance(factor)),
        ]
    for i, (step, expected) in enumerate(cases):
        assert np.array_equal(drawn(pixels, step), np.asarray(expected)), i


def test_operations_in_a_row_equal_pillows_in_a_row() -> None:
    """They are fused into one table and one look-up."""
    image = ImageOps.equalize(ImageOps.invert(Image.fromarray(PHOTO)))
    image = ImageOps.autocontrast(ImageOps.posterize(ImageOps.solarize(image, 100), 4))
    image = ImageEnhance.Brightness(image.rotate(20, fillcolor=(128,) * 3)).enhance(1.9)
    found = drawn(
        PHOTO,
        Canvas.invert,
        Canvas.equalize,
        lambda c: c.solarize(100),
        lambda c: c.posterize(4),
        Canvas.autocontrast,
        lambda c: c.rotate(20),
        lambda c: c.towards(0, 1.9),
    )
    assert np.array_equal(found, np.asarray(image))


@pytest.mark.parametrize("magnitude", [0, 9, 15, 30])
@pytest.mark.parametrize("name", CLASSIC)
def test_classic_operations_are_torchvisions(name: str, magnitude: int) -> None:
    space = autoaugment.RandAugment()._augmentation_space(31, (96, 80))
    assert set(space) == set(CLASSIC)
    strengths, signed = space[name]
    strength = float(strengths[magnitude] if strengths.ndim else strengths)
    expected = [
        np.asarray(autoaugment._apply_op(Image.fromarray(PHOTO), name, s, InterpolationMode.NEAREST, [128] * 3))
        for s in ((strength, -strength) if signed else (strength,))
    ]
    hits = set()
    for seed in range(8):
        found = one(CLASSIC, name, PHOTO, magnitude, seed)
        # A pixel on the line between two may fall to either side.
        shares = [(found != e).any(axis=2).mean() for e in expected]
        assert min(shares) < 0.01, (name, shares)
        hits.add(int(np.argmin(shares)))
    assert len(hits) == len(expected) or magnitude == 0


def test_the_published_strengths() -> None:
    values = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)

    def table(name: str, magnitude: float) -> np.ndarray:
        return one(NFNET, name, values, magnitude).reshape(256, 3)[:, 0]

    v = np.arange(256)
    for magnitude, bits in ((5, 2), (10, 4), (15, 6)):
        assert np.array_equal(table("Posterize", magnitude), v >> (8 - bits) << (8 - bits))
    assert np.array_equal(table("Solarize", 5), np.where(v < 128, v, 255 - v))
    for magnitude in (10, 15):
        assert np.array_equal(table("Solarize", magnitude), v)
    for magnitude, addition in ((5, 55), (10, 110), (15, 165)):
        assert np.array_equal(table("SolarizeAdd", magnitude), np.where(v < 128, np.minimum(v + addition, 255), v))
    for name in ("Color", "Contrast", "Brightness", "Sharpness"):  # 0.1 + 1.8 / 2 = 1
        assert np.array_equal(one(NFNET, name, PHOTO, 5), PHOTO)
    brighter = ImageEnhance.Brightness(Image.fromarray(values)).enhance(1.9)
    assert np.array_equal(one(NFNET, "Brightness", values, 10), np.asarray(brighter))
    names = "AutoContrast Equalize Invert Rotate Posterize Solarize Color Contrast Brightness Sharpness ShearX ShearY "
    assert list(NFNET) == [*names.split(), "TranslateX", "TranslateY", "Cutout", "SolarizeAdd"]


def test_the_published_geometry_and_cutout() -> None:
    white = np.full((300, 300, 3), 255, np.uint8)
    for name, axis in (("TranslateX", 1), ("TranslateY", 0)):
        filled = {
            tuple(np.flatnonzero((one(NFNET, name, white, 10, s) == 128).all(axis=(1 - axis, 2)))) for s in range(9)
        }
        assert filled == {tuple(range(100)), tuple(range(200, 300))}
    sizes = [(one(NFNET, "Cutout", white, 10, s) == 128).all(axis=2).sum() for s in range(40)]
    assert max(sizes) == 80 * 80 and min(sizes) >= 40 * 40
    # Rows of a sheared image begin 0.3 pixels further with each row.
    starts = {int((one(NFNET, "ShearX", white, 10, s)[200] == 128).all(axis=1).sum()) for s in range(9)}
    assert starts == {60}
    turned = [np.asarray(Image.fromarray(white).rotate(a, fillcolor=(128,) * 3)) for a in (30, -30)]
    assert all(any(np.array_equal(one(NFNET, "Rotate", white, 10, s), t) for t in turned) for s in range(5))


def test_contrast_is_about_the_number_of_pixels_as_in_the_released_code() -> None:
    flat = np.full((224, 224, 3), 150, np.uint8)
    assert np.unique(one(NFNET, "Contrast", flat, 10)).tolist() == [int(196 + 1.9 * (150 - 196))]


def test_each_layer_draws_each_operation_equally_often() -> None:
    counts: Counter[str] = Counter()
    listed = {name: (lambda c, m, d, n=name: counts.update([n])) for name in NFNET}
    for seed in range(2000):
        rand_augment(Canvas(NOISE[:1, :1]), listed, layers=4, magnitude=10, draws=Draws(seed))
    assert counts.total() == 8000 and stats.chisquare([counts[n] for n in NFNET]).pvalue > 0.001


def test_three_augment_is_gray_solarised_or_blurred_and_then_jittered() -> None:
    found = [drawn(NOISE, lambda c, s=s: three_augment(c, Draws(s), jitter=0)).astype(int) for s in range(60)]
    gray = [np.ptp(f, axis=2).max() == 0 for f in found]
    solarised = [np.array_equal(f, np.asarray(ImageOps.solarize(Image.fromarray(NOISE), 128))) for f in found]
    roughness = np.abs(np.diff(NOISE.astype(int), axis=0)).sum()
    blurred = [np.abs(np.diff(f, axis=0)).sum() <= roughness for f in found]
    assert all(g or s or b for g, s, b in zip(gray, solarised, blurred, strict=True))
    assert 10 < sum(gray) < 30 and 10 < sum(solarised) < 30
    assert len({f.tobytes() for f in (drawn(FLAT, lambda c, s=s: three_augment(c, Draws(s))) for s in range(20))}) > 10


def test_draws_are_uniform_and_the_same_everywhere() -> None:
    draws = Draws(1, 2, 3)
    sample = [draws.unit() for _ in range(4000)]
    assert stats.kstest(sample, "uniform").pvalue > 0.001
    assert sample[0] == Draws(1, 2, 3).unit() == 0.010492590121206846  # pinned: a run repeats on another machine
    assert sample[0] != Draws(1, 3, 2).unit()
    assert Counter(Draws(i).below(3) for i in range(300)).keys() == {0, 1, 2}


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.8, 1.0])
def test_beta_draws_are_beta_distributed(alpha: float) -> None:
    draws = Draws(7)
    assert stats.kstest([draws.beta(alpha) for _ in range(2000)], stats.beta(alpha, alpha).cdf).pvalue > 0.001
