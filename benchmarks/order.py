"""The order in lanes at the sizes of the papers: from nothing to the positions of a batch, one process; no peer, limits printed.

What a run does at its start and at each step (`LaneOrder`), for all lanes of a batch of 4,096; a rank computes its own
only.
"""

import resource
import time

from pipeline.data.sampling.lanes import LaneOrder, choose_layout

BATCH = 4096
SIZES = (("10M", 10_000_000, 0, 0.5, 50), ("300M", 300_000_000, 0, 0.5, 100), ("4B", 4_000_000_000, 1024, 1.0, 200))
"""Name, samples, lanes (0: as a run chooses), and what is to be reached: seconds, MB above numpy."""


def main() -> None:
    print(f"order in lanes: positions of a batch of {BATCH}, blocks of 60 samples, 16 of a lane open")
    for name, num, lanes, limit_s, limit_mb in SIZES:
        before_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        begin = time.perf_counter()
        layout = choose_layout(num, block_samples=60, lanes=lanes, window=16, batch=BATCH)
        assert layout is not None
        LaneOrder(layout, 0).positions(0, BATCH)
        first_s = time.perf_counter() - begin
        begin = time.perf_counter()
        order = LaneOrder(layout, 0)
        order.positions(num // 2, BATCH)
        anywhere_s = time.perf_counter() - begin
        begin = time.perf_counter()
        order.positions(num // 2 + BATCH, BATCH)
        next_s = time.perf_counter() - begin
        grown_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3 - before_mb
        verdict = "reached" if max(first_s, anywhere_s) <= limit_s and grown_mb <= limit_mb else "missed"
        print(
            f"  {name:>4} in {layout.lanes:>5} lanes: first {first_s:.3f} s, anywhere {anywhere_s:.3f} s, the next "
            f"{next_s:.4f} s, {grown_mb:.0f} MB more; target {limit_s:g} s, {limit_mb} MB {verdict}"
        )
