"""Hashes of a test set against those of an upstream set, in chunks as `data overlap` searches them; no peer.

python -m benchmarks overlap           NORMFREE_BENCH_HASHES=100000000: so many of the upstream set, instead of 10 million
"""

import os
import resource
import time

import numpy as np

from pipeline.data.images.perceptual_hash import mirrored
from pipeline.data.verify.hash_search import hash_pairs
from pipeline.data.verify.overlap import CHUNK_SAMPLES, RADIUS

TEST_IMAGES, PLANTED = 100_000, 1000


def main() -> None:
    num, rng = int(os.environ.get("NORMFREE_BENCH_HASHES", "10000000")), np.random.default_rng(0)
    theirs = rng.integers(1, 1 << 63, TEST_IMAGES, dtype=np.uint64)
    begin, found, pairs = time.process_time(), set[int](), 0
    for first in range(0, num, CHUNK_SAMPLES):
        chunk = rng.integers(1, 1 << 63, min(CHUNK_SAMPLES, num - first), dtype=np.uint64)
        if first == 0:  # copies with up to the radius of different bits, half of them mirrored
            chunk[:PLANTED] = theirs[:PLANTED] ^ np.uint64(0b111)
            chunk[: PLANTED // 2] = mirrored(chunk[: PLANTED // 2])
        for hashes in (theirs, mirrored(theirs)):
            in_a, in_b, _ = hash_pairs(chunk, hashes, RADIUS)
            found.update(in_b[(in_a < PLANTED) & (in_a == in_b)].tolist() if first == 0 else ())
            pairs += len(in_a)
    spent_s = time.process_time() - begin
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(
        f"{TEST_IMAGES:,} hashes against {num:,}, also mirrored, radius {RADIUS}: {spent_s:.0f} s of the processor, at most "
        f"{peak_mb:.0f} MB; {len(found)} of {PLANTED} planted found, {pairs - len(found)} other pairs; for 300 million "
        f"{spent_s / num * 300e6 / 60:.0f} min on one core"
    )
