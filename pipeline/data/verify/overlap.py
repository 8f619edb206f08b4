"""Which images of one dataset are in another, too: the same bytes, the same pixels, or re-encoded and resized.

Candidates come from the perceptual hashes that were stored at writing; they are then looked at: both images are read and
their thumbnails compared, because pictures of one kind (a plane on white) share a hash without being one picture. Brightness and
contrast may differ, and left and right may be exchanged. Blind spots: crops, borders and rotations change the hash.

Of the larger dataset no more than `CHUNK_SAMPLES` hashes are held at a time; chunks are searched by any number of processes.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np

from pipeline.data.format.index import SplitIndex
from pipeline.data.format.manifest import Manifest
from pipeline.data.images.decode import DecodeError, decode_image
from pipeline.data.images.perceptual_hash import FLAT_HASH, mirrored
from pipeline.data.parts import Part
from pipeline.data.process_pool import Each, each
from pipeline.data.verify.hash_search import MAX_RADIUS, hash_pairs
from pipeline.display import csv_cell
from pipeline.errors import UserError
from pipeline.storage import objects

RADIUS = 6
MAX_DIFFERENCE = 10.0
"""Mean absolute difference of thumbnails, of 255: JPEG 50 gives at most 2 in photographs, 9 in images of 32 px."""
MIN_CORRELATION = 0.95
MAX_GAIN = 2.0
"""Contrast by which copies may differ, either way."""
CHUNK_SAMPLES = 1 << 22
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
    """`bytes`, `pixels`, `similar`, `mirrored`; `hash` where the images were not looked at."""
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
        return (json.dumps(asdict(self), indent=1) + "\n").encode()


@dataclass(frozen=True)
class _Chunk:
    """Neighbouring pieces of a split of A."""

    index: int
    pieces: range
    first: int
    """Number of its first image in A."""


@dataclass(frozen=True)
class _Search:
    """Finds the candidates of a chunk; what is sent to a worker process."""

    indices: Sequence[SplitIndex]
    hashes_b: np.ndarray
    radius: int

    def __call__(self, chunk: _Chunk) -> np.ndarray:
        """(candidates, 4) int64: image of A, place in `hashes_b`, distance, whether it is the mirrored hash that is near."""
        keys = self.indices[chunk.index].keys
        hashes = np.concatenate([keys.hashes(piece) for piece in chunk.pieces])
        found = []
        for is_mirrored, theirs in enumerate((self.hashes_b, mirrored(self.hashes_b))):
            in_a, in_b, distance = hash_pairs(hashes, theirs, self.radius)
            structured = hashes[in_a] != FLAT_HASH
            rows = np.stack([in_a + chunk.first, in_b, distance, np.full(len(in_a), is_mirrored)], axis=1)
            found.append(rows[structured])
        return np.concatenate(found)


def overlap(
    url_a: str,
    url_b: str,
    *,
    splits_a: Sequence[str] | None = None,
    splits_b: Sequence[str] | None = None,
    radius: int = RADIUS,
    confirm: bool = True,
    run_each: Each | None = None,
    part: Part | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Overlap:
    """The images of B (a downstream test split) that are in A (the upstream set).

    Args:
        splits_a, splits_b: None: all of A; of B test, else val, else all.
        radius: bits in which hashes may differ.
        confirm: read both images of each candidate pair and compare them.
        run_each: runs the search over chunks of A; None: this process.
        part: search a share of A only; `merged` puts such together.
        progress: called as progress(done, total) in candidate pairs.
    Raises:
        UserError: no dataset, no such split, or a radius that is not from 0 to 11.
    """
    if not 0 <= radius <= MAX_RADIUS:
        raise UserError(f"radius {radius} must be from 0 to {MAX_RADIUS} bits; {RADIUS} is usual")
    a, b = Manifest.open(url_a), Manifest.open(url_b)
    side_a = _Side(a, splits_a or list(a.splits))
    side_b = _Side(b, splits_b or [next((name for name in ("test", "val") if name in b.splits), "train")])
    hashes_b = np.concatenate([index.phash for index in side_b.indices])
    flat = hashes_b == FLAT_HASH
    structured = np.flatnonzero(~flat)
    chunks = list(side_a.chunks())
    chunks = list(part.share(chunks)) if part else chunks
    run_each = run_each or partial(each, num_workers=1)
    searched = list(run_each(_Search(side_a.indices, hashes_b[structured], radius), chunks))
    found = np.concatenate([np.zeros((0, 4), np.int64), *searched])
    found[:, 1] = structured[found[:, 1]]
    found = found[np.lexsort((found[:, 3], found[:, 0], found[:, 2], found[:, 1]))]
    is_listed = np.arange(len(found)) - np.searchsorted(found[:, 1], found[:, 1]) < MAX_MATCHES
    pairs: dict[tuple[int, int], Pair] = {}
    rows = found[is_listed].tolist()
    for number, (place_a, place_b, bits, is_mirrored) in enumerate(rows):
        kind: str | None = "hash"
        if confirm and (place_a, place_b) not in pairs:
            kind = _compare(side_a.image(place_a), side_b.image(place_b), is_mirrored=bool(is_mirrored))
        if kind is not None and (place_a, place_b) not in pairs:
            (split_a, key_a), (split_b, key_b) = side_a.name(place_a), side_b.name(place_b)
            pairs[place_a, place_b] = Pair(key_a, key_b, bits, kind, split_a, split_b)
        if progress is not None:
            progress(number + 1, len(rows))
    num_a = sum(index.num_samples for index in side_a.indices)
    num_unlisted = int((~is_listed).sum())
    num_found = len({(pair.split_b, pair.key_b) for pair in pairs.values()})
    return Overlap(tuple(pairs.values()), num_a, len(hashes_b), num_found, len(found), int(flat.sum()), num_unlisted)


def merged(found: Sequence[Overlap]) -> Overlap:
    """What parts of A have found, as of all of it."""
    pairs = sorted(
        (pair for part in found for pair in part.pairs), key=lambda p: (p.split_b, p.key_b, p.distance, p.key_a)
    )
    return replace(
        found[0],
        pairs=tuple(pairs),
        num_b_found=len({(pair.split_b, pair.key_b) for pair in pairs}),
        num_candidates=sum(part.num_candidates for part in found),
        num_unlisted=sum(part.num_unlisted for part in found),
    )


class _Side:
    """Some splits of a dataset as one row of images."""

    def __init__(self, manifest: Manifest, splits: Sequence[str]) -> None:
        self._url = manifest.url
        self.indices = [manifest.split(name) for name in splits]
        self._ends = np.cumsum([index.num_samples for index in self.indices])
        self._last: tuple[int, bytes] | None = None

    def chunks(self) -> Iterator[_Chunk]:
        first = 0
        for number, index in enumerate(self.indices):
            begin = 0
            for end in range(1, len(index.pieces) + 1):
                held = int(index.first_samples[end] - index.first_samples[begin])
                if end == len(index.pieces) or held + index.pieces[end].num_samples > CHUNK_SAMPLES:
                    yield _Chunk(number, range(begin, end), first)
                    first, begin = first + held, end

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
        return self.indices[number], place - int(self._ends[number] - self.indices[number].num_samples)


def _compare(a: bytes, b: bytes, *, is_mirrored: bool) -> str | None:
    """What two images have in common: `bytes`, `pixels`, `similar`, or None; `mirrored` where b is to be, and is."""
    if a == b:
        return "bytes"
    try:
        pixels_a, pixels_b = decode_image(a), decode_image(b)
    except DecodeError:
        return None
    if np.array_equal(pixels_a, pixels_b):
        return "pixels"
    difference, correlation = likeness(pixels_a, pixels_b[:, ::-1] if is_mirrored else pixels_b)
    is_one = difference <= MAX_DIFFERENCE and correlation >= MIN_CORRELATION
    return ("mirrored" if is_mirrored else "similar") if is_one else None


def likeness(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Of the thumbnails of two images, (H, W, 3) uint8 each: mean absolute difference, and correlation of their grays.

    The thumbnail has half the pixels a side of the smallest image, from 8 to 32: finer detail does not survive scaling. The
    difference is what remains when brightness and contrast of the flatter one were brought to the other's.
    """
    from PIL import Image

    side = min(32, max(8, min(*a.shape[:2], *b.shape[:2]) // 2))
    small_a, small_b = (
        np.asarray(Image.fromarray(np.ascontiguousarray(p)).resize((side, side), Image.Resampling.BILINEAR), np.float64)
        for p in (a, b)
    )
    gray_a, gray_b = (small.mean(axis=2) - small.mean() for small in (small_a, small_b))
    power_a, power_b = float((gray_a**2).sum()), float((gray_b**2).sum())
    correlation = float((gray_a * gray_b).sum()) / max(float(np.sqrt(power_a * power_b)), 1e-9)
    gain = float(np.clip(np.sqrt(power_a / max(power_b, 1e-9)), 1 / MAX_GAIN, MAX_GAIN))
    fitted = (small_b - small_b.mean()) * gain + small_a.mean()
    return float(np.abs(small_a - fitted).mean()) / min(gain, 1.0), correlation
