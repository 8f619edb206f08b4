"""Which images of one dataset are in another, too: the same bytes, the same pixels, or re-encoded and resized.

Candidates come from the perceptual hashes that were stored at writing; they are then looked at: both images are read and
their thumbnails compared, because pictures of one kind (a plane on white) share a hash without being one picture.
"""

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from pipeline.data.format.index import SplitIndex
from pipeline.data.format.manifest import Manifest
from pipeline.data.images.decode import DecodeError, decode_image
from pipeline.data.images.perceptual_hash import FLAT_HASH
from pipeline.data.verify.hash_search import MAX_RADIUS, hash_pairs
from pipeline.display import csv_cell
from pipeline.errors import UserError
from pipeline.storage import objects

RADIUS = 6
MAX_DIFFERENCE = 10.0
"""Mean absolute difference of thumbnails, of 255: JPEG 50 gives at most 2 in photographs, 9 in images of 32 px."""
MIN_CORRELATION = 0.95
MAX_MATCHES = 100
"""Images of A that are listed for one image of B, the nearest first."""


@dataclass(frozen=True)
class Pair:
    """Two images that are one."""

    key_a: str
    key_b: str
    distance: int
    """Different bits of the hashes."""
    kind: str
    """`bytes`, `pixels`, `similar`; `hash` where the images were not looked at."""
    split_a: str
    split_b: str


@dataclass(frozen=True)
class Overlap:
    """What `overlap` found."""

    pairs: tuple[Pair, ...]
    """By image of B, the nearest first."""
    num_a: int
    num_b: int
    num_b_found: int
    """Images of B with at least one pair."""
    num_candidates: int
    """Pairs within the radius."""
    num_flat_b: int
    """Images of B of one colour: they have no hash and were not compared."""
    num_unlisted: int
    """Candidates above `MAX_MATCHES` for one image of B: not looked at and not listed."""

    def to_csv(self) -> bytes:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["key_a", "key_b", "distance", "kind", "split_a", "split_b"])
        writer.writerows(map(csv_cell, asdict(pair).values()) for pair in self.pairs)
        return text.getvalue().encode()

    def to_json(self) -> bytes:
        return (json.dumps({**asdict(self), "pairs": [asdict(pair) for pair in self.pairs]}, indent=1) + "\n").encode()


def overlap(
    url_a: str,
    url_b: str,
    *,
    splits_a: Sequence[str] | None = None,
    splits_b: Sequence[str] | None = None,
    radius: int = RADIUS,
    confirm: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Overlap:
    """The images of B (a downstream test split) that are in A (the upstream set).

    Args:
        splits_a, splits_b: None: all of A; of B test, else val, else all.
        radius: bits in which hashes may differ.
        confirm: read both images of each candidate pair and compare them.
        progress: called as progress(done, total) in candidate pairs.
    Raises:
        UserError: no dataset, no such split, or a radius that is not from 0 to 11.
    """
    if not 0 <= radius <= MAX_RADIUS:
        raise UserError(f"radius {radius} must be from 0 to {MAX_RADIUS} bits; {RADIUS} is usual")
    a, b = Manifest.open(url_a), Manifest.open(url_b)
    side_a = _Side(a, splits_a or list(a.splits))
    side_b = _Side(b, splits_b or [next((name for name in ("test", "val") if name in b.splits), "train")])
    hashes_b = side_b.hashes
    flat = hashes_b == FLAT_HASH
    structured = np.flatnonzero(~flat)
    in_a, in_b, distance = hash_pairs(side_a.hashes, hashes_b[structured], radius)
    in_b = structured[in_b]
    num_candidates = len(in_a)
    order = np.lexsort((in_a, distance, in_b))
    in_a, in_b, distance = in_a[order], in_b[order], distance[order]
    first = np.searchsorted(in_b, in_b)
    listed = np.arange(len(in_b)) - first < MAX_MATCHES
    pairs: list[Pair] = []
    rows = list(zip(in_a[listed].tolist(), in_b[listed].tolist(), distance[listed].tolist(), strict=True))
    for number, (place_a, place_b, bits) in enumerate(rows):
        kind = _compare(side_a.image(place_a), side_b.image(place_b)) if confirm else "hash"
        if kind is not None:
            (split_a, key_a), (split_b, key_b) = side_a.name(place_a), side_b.name(place_b)
            pairs.append(Pair(key_a, key_b, bits, kind, split_a, split_b))
        if progress is not None:
            progress(number + 1, len(rows))
    found = {(pair.split_b, pair.key_b) for pair in pairs}
    return Overlap(
        tuple(pairs),
        len(side_a.hashes),
        len(hashes_b),
        len(found),
        num_candidates,
        int(flat.sum()),
        int((~listed).sum()),
    )


class _Side:
    """Some splits of a dataset as one row of images."""

    def __init__(self, manifest: Manifest, splits: Sequence[str]) -> None:
        self._url = manifest.url
        self._indices: list[SplitIndex] = [manifest.split(name) for name in splits]
        self._ends = np.cumsum([index.num_samples for index in self._indices])
        self.hashes = np.concatenate([index.phash for index in self._indices])
        self._last: tuple[int, bytes] | None = None

    def name(self, place: int) -> tuple[str, str]:
        """(split, key) of an image."""
        index, row = self._find(place)
        return index.name, str(index.keys[row])

    def image(self, place: int) -> bytes:
        if self._last is None or self._last[0] != place:  # the pairs of one image of B follow each other
            index, number = self._find(place)
            row = index.rows([number])[0]
            url = objects.join(self._url, index.shards[int(row["shard"])].name)
            self._last = place, objects.read_range(url, int(row["offset"]), int(row["size"]))
        return self._last[1]

    def _find(self, place: int) -> tuple[SplitIndex, int]:
        number = int(np.searchsorted(self._ends, place, side="right"))
        return self._indices[number], place - int(self._ends[number] - self._indices[number].num_samples)


def _compare(a: bytes, b: bytes) -> str | None:
    """What two images have in common: `bytes`, `pixels`, `similar`, or None."""
    if a == b:
        return "bytes"
    try:
        pixels_a, pixels_b = decode_image(a), decode_image(b)
    except DecodeError:
        return None
    if np.array_equal(pixels_a, pixels_b):
        return "pixels"
    difference, correlation = likeness(pixels_a, pixels_b)
    return "similar" if difference <= MAX_DIFFERENCE and correlation >= MIN_CORRELATION else None


def likeness(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Of the thumbnails of two images, (H, W, 3) uint8 each: mean absolute difference, and correlation of their grays.

    The thumbnail has half the pixels a side of the smallest image, from 8 to 32: finer detail does not survive scaling.
    """
    from PIL import Image

    side = min(32, max(8, min(*a.shape[:2], *b.shape[:2]) // 2))
    small_a, small_b = (
        np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BILINEAR), dtype=np.float64)
        for pixels in (a, b)
    )
    gray_a, gray_b = (small.mean(axis=2) - small.mean() for small in (small_a, small_b))
    scale = float(np.sqrt((gray_a**2).sum() * (gray_b**2).sum()))
    return float(np.abs(small_a - small_b).mean()), float((gray_a * gray_b).sum()) / max(scale, 1e-9)
