"""RandAugment as the NFNet runs had it and as it is commonly had, and 3-Augment: a list of operations, and who is drawn.

Operations are those of `pipeline.data.augment.image_ops`, all with fill 128. Every layer draws one operation and always
applies it: the published code also draws a probability, and does not use it.
"""

from collections.abc import Callable

import numpy as np

from pipeline.data.augment.counter_rng import Draws
from pipeline.data.augment.image_ops import Canvas

TRANSLATE_PX = 100
"""By which the published RandAugment moves an image at magnitude 10, whatever the image's size."""

Operation = Callable[[Canvas, float, Draws], None]
"""Canvas, magnitude, draws -> the canvas is changed."""


def _enhance(magnitude: float) -> float:
    """0.1 to 1.9 for magnitudes 0 to 10. At 5 it is 1 exactly: Color, Contrast, Brightness and Sharpness do nothing in F0's
    recipe, so a quarter of its layers leave the image as it is."""
    return magnitude / 10 * 1.8 + 0.1


def _published_contrast(canvas: Canvas, magnitude: float, draws: Draws) -> None:  # noqa: ARG001
    # The published code means the mean gray but sums the histogram's counts: its ground is the number of pixels / 256,
    # which is 144 at 192 px, 196 at 224 px and white from 256 px up. The recipes were tuned with that.
    width, height = canvas.size
    canvas.towards(min(255, width * height // 256), _enhance(magnitude))


def _cutout(canvas: Canvas, magnitude: float, draws: Draws) -> None:
    width, height = canvas.size
    canvas.cutout(draws.below(width), draws.below(height), int(40 * magnitude / 10))


NFNET: dict[str, Operation] = {
    "AutoContrast": lambda c, m, d: c.autocontrast(),
    "Equalize": lambda c, m, d: c.equalize(),
    "Invert": lambda c, m, d: c.invert(),
    "Rotate": lambda c, m, d: c.rotate(d.signed(30 * m / 10)),
    "Posterize": lambda c, m, d: c.posterize(min(8, int(4 * m / 10))),
    "Solarize": lambda c, m, d: c.solarize(int(256 * m / 10)),  # nothing from magnitude 10 up: no value reaches 256
    "Color": lambda c, m, d: c.color(_enhance(m)),
    "Contrast": _published_contrast,
    "Brightness": lambda c, m, d: c.towards(0, _enhance(m)),
    "Sharpness": lambda c, m, d: c.sharpness(_enhance(m)),
    "ShearX": lambda c, m, d: c.shear(d.signed(0.3 * m / 10), 0),
    "ShearY": lambda c, m, d: c.shear(0, d.signed(0.3 * m / 10)),
    "TranslateX": lambda c, m, d: c.translate(round(d.signed(TRANSLATE_PX * m / 10)), 0),
    "TranslateY": lambda c, m, d: c.translate(0, round(d.signed(TRANSLATE_PX * m / 10))),
    "Cutout": _cutout,
    "SolarizeAdd": lambda c, m, d: c.solarize_add(int(110 * m / 10)),
}
"""Brock et al. 2021, A.3 and the code released with it; magnitude 10 is the unit, 5 to 15 are used."""


def _classic(m: float, greatest: float) -> float:
    """Magnitudes go from 0 to 30."""
    return m / 30 * greatest


CLASSIC: dict[str, Operation] = {
    "Identity": lambda c, m, d: None,
    "ShearX": lambda c, m, d: c.shear(d.signed(_classic(m, 0.3)), 0),
    "ShearY": lambda c, m, d: c.shear(0, d.signed(_classic(m, 0.3))),
    "TranslateX": lambda c, m, d: c.translate(int(d.signed(_classic(m, 150 / 331) * c.size[0])), 0),
    "TranslateY": lambda c, m, d: c.translate(0, int(d.signed(_classic(m, 150 / 331) * c.size[1]))),
    "Rotate": lambda c, m, d: c.rotate(d.signed(_classic(m, 30))),
    "Brightness": lambda c, m, d: c.towards(0, 1 + d.signed(_classic(m, 0.9))),
    "Color": lambda c, m, d: c.color(1 + d.signed(_classic(m, 0.9))),
    "Contrast": lambda c, m, d: c.contrast(1 + d.signed(_classic(m, 0.9))),
    "Sharpness": lambda c, m, d: c.sharpness(1 + d.signed(_classic(m, 0.9))),
    "Posterize": lambda c, m, d: c.posterize(8 - round(_classic(m, 4))),
    "Solarize": lambda c, m, d: c.solarize(int(np.ceil(255 - _classic(m, 255)))),
    "AutoContrast": lambda c, m, d: c.autocontrast(),
    "Equalize": lambda c, m, d: c.equalize(),
}
"""Cubuk et al. 2019 with torchvision's strengths (`RandAugment`, 31 bins)."""


def rand_augment(
    canvas: Canvas, operations: dict[str, Operation], *, layers: int, magnitude: float, draws: Draws
) -> None:
    """`layers` operations, each drawn uniformly."""
    listed = tuple(operations.values())
    for _ in range(layers):
        listed[draws.below(len(listed))](canvas, magnitude, draws)


def three_augment(canvas: Canvas, draws: Draws, jitter: float = 0.3) -> None:
    """Gray, solarised or blurred (radius 0.1 to 2 px), then brightness, contrast and saturation by 1 - jitter to 1 + jitter in
    random order (DeiT III: Touvron et al. 2022, section 3.2 and its code)."""
    kind = draws.below(3)
    if kind == 0:
        canvas.grayscale()
    elif kind == 1:
        canvas.solarize(128)
    else:
        canvas.blur(draws.uniform(0.1, 2.0))
    steps: list[Callable[[float], None]] = [lambda f: canvas.towards(0, f), canvas.contrast, canvas.color]
    while steps:
        steps.pop(draws.below(len(steps)))(draws.uniform(1 - jitter, 1 + jitter))
