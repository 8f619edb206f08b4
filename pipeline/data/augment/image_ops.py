"""Image operations on uint8 RGB with Pillow's results and, where Pillow is slow, not its way.

What maps each value of a channel to another (inverting, equalising, brightness ...) is kept as a table and only painted when
an operation needs pixels: any run of such operations costs one histogram and one look-up. Each result equals Pillow's own
operation bit for bit; the tests hold that.
"""

import numpy as np
from PIL import Image, ImageChops, ImageFilter

IDENTITY = np.arange(256)
INVERTED = 255 - IDENTITY
_FILL = (128, 128, 128)  # what comes in where geometry moves the image out
_BAND = 32
"""Rows worked on at once: their intermediate arrays fit the cache, and stay below the size that malloc maps anew each time."""


def blended(ground: np.ndarray | int, values: np.ndarray, factor: float) -> np.ndarray:
    """ground + factor * (values - ground), cut to 0 ... 255: how Pillow and the published code enhance. float32, truncated."""
    mixed = np.float32(factor) * (values - ground).astype(np.float32)
    mixed += np.float32(ground) if isinstance(ground, int) else ground
    return np.clip(mixed, 0, 255, out=mixed).astype(np.uint8)


def _smooth(rows: np.ndarray) -> np.ndarray:
    """(h + 2, 3 * (w + 2)) uint16 -> (h, 3 * w) int16: the means by (1 1 1, 1 5 1, 1 1 1) / 13, rounded."""
    down = rows[:-2] + rows[1:-1]
    down += rows[2:]
    total = down[:, :-6] + down[:, 3:-3]
    total += down[:, 6:]
    total += rows[1:-1, 3:-3] << 2
    total += 6
    total //= 13
    return total.view(np.int16)


class Canvas:
    """One image in the making."""

    def __init__(self, pixels: np.ndarray) -> None:
        """pixels: (H, W, 3) uint8, copied."""
        self._image = Image.fromarray(pixels)
        self._table: np.ndarray | None = None  # (3, 256): value of each channel -> value, not painted yet

    @property
    def size(self) -> tuple[int, int]:
        return self._image.size

    @property
    def image(self) -> Image.Image:
        """The painted image."""
        if self._table is not None:
            if (self._table == INVERTED).all():
                self._image = ImageChops.invert(self._image)
            else:
                self._image = self._image.point(self._table.ravel().tolist())
            self._table = None
        return self._image

    def pixels(self) -> np.ndarray:
        return np.asarray(self.image)

    # --- values to values -----------------------------------------------------------------------------------------------

    def map(self, table: np.ndarray) -> None:
        """Replace each value v of channel c by table[c, v], or by table[v]."""
        table = np.broadcast_to(table, (3, 256))
        self._table = table if self._table is None else np.take_along_axis(table, self._table, axis=1)

    def histogram(self) -> np.ndarray:
        """(3, 256) counts, through the pending table."""
        counts = np.array(self._image.histogram()).reshape(3, 256)
        if self._table is None:
            return counts
        pairs = zip(self._table, counts, strict=True)
        return np.stack([np.bincount(t, weights=c, minlength=256) for t, c in pairs]).astype(np.int64)

    def autocontrast(self) -> None:
        """Each channel stretched to 0 ... 255."""
        seen = self.histogram() > 0
        low, high = seen.argmax(axis=1)[:, None], 255 - seen[:, ::-1].argmax(axis=1)[:, None]
        scale = 255.0 / np.maximum(high - low, 1)
        stretched = np.clip((IDENTITY * scale - low * scale).astype(np.int64), 0, 255)
        self.map(np.where(high > low, stretched, IDENTITY))

    def equalize(self) -> None:
        """Each channel's histogram made flat, with Pillow's integer steps."""
        counts = self.histogram()
        last = 255 - (counts[:, ::-1] > 0).argmax(axis=1)
        step = (counts.sum(axis=1) - counts[np.arange(3), last])[:, None] // 255
        below = np.cumsum(counts, axis=1) - counts
        flat = np.minimum((below + step // 2) // np.maximum(step, 1), 255)
        self.map(np.where(step > 0, flat, IDENTITY))

    def invert(self) -> None:
        self.map(INVERTED)

    def posterize(self, bits: int) -> None:
        """Keep the upper bits of each value; 0 bits = black."""
        self.map(IDENTITY & (0xFF00 >> bits & 0xFF))

    def solarize(self, threshold: int) -> None:
        """Invert values from `threshold` up; above 255 there is none."""
        if threshold <= 255:
            self.map(np.where(threshold <= IDENTITY, INVERTED, IDENTITY))

    def solarize_add(self, addition: int, threshold: int = 128) -> None:
        """Add to values below `threshold`."""
        self.map(np.where(threshold > IDENTITY, np.clip(IDENTITY + addition, 0, 255), IDENTITY))

    def towards(self, ground: int, factor: float) -> None:
        """Away from (factor > 1) or towards (factor < 1) one gray: brightness with ground 0, contrast with the mean."""
        if factor != 1:
            self.map(blended(ground, IDENTITY, factor).astype(np.int64))

    def contrast(self, factor: float) -> None:
        """Pillow's: the ground is the mean of the gray image."""
        if factor != 1:
            counts = np.array(self.image.convert("L").histogram())
            self.towards(int((counts * IDENTITY).sum() / counts.sum() + 0.5), factor)

    # --- pixels ---------------------------------------------------------------------------------------------------------

    def color(self, factor: float) -> None:
        """Saturation; 0 is gray."""
        if factor != 1:
            image = self.image
            self._image = Image.blend(image.convert("L").convert("RGB"), image, factor)

    def sharpness(self, factor: float) -> None:
        """Away from the image smoothed by (1 1 1, 1 5 1, 1 1 1) / 13, borders left alone."""
        width, height = self.size
        if factor == 1 or width < 3 or height < 3:
            return
        source = self.pixels().reshape(height, 3 * width)
        sharp = source.copy()
        for top in range(1, height - 1, _BAND):
            bottom = min(top + _BAND, height - 1)
            wide = source[top - 1 : bottom + 1].astype(np.uint16)  # the sums stay below 13 * 255
            sharp[top:bottom, 3:-3] = blended(_smooth(wide), wide[1:-1, 3:-3].view(np.int16), factor)
        self._image = Image.fromarray(sharp.reshape(height, width, 3))

    def blur(self, radius: float) -> None:
        self._image = self.image.filter(ImageFilter.GaussianBlur(radius))

    def grayscale(self) -> None:
        self._image = self.image.convert("L").convert("RGB")

    def rotate(self, degrees: float) -> None:
        """Counter-clockwise about the centre, nearest pixel."""
        self._image = self.image.rotate(degrees, Image.Resampling.NEAREST, fillcolor=_FILL)

    def shear(self, x: float, y: float) -> None:
        """Output (u, v) shows input (u + x * v, v + y * u), nearest pixel."""
        self._image = self.image.transform(
            self.size, Image.Transform.AFFINE, (1, x, 0, y, 1, 0), Image.Resampling.NEAREST, fillcolor=_FILL
        )

    def translate(self, x: int, y: int) -> None:
        """To the right and down."""
        moved = Image.new("RGB", self.size, _FILL)
        moved.paste(self.image, (x, y))
        self._image = moved

    def cutout(self, x: int, y: int, half: int) -> None:
        """A square of side 2 * half around (x, y) filled, as much of it as lies inside."""
        width, height = self.size
        box = (max(0, x - half), max(0, y - half), min(width, x + half), min(height, y + half))
        image = self.image
        image.paste(_FILL, box)
